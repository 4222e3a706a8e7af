"""Models: the bases, and the tenant's own adapters by their model names."""

from fastapi import APIRouter, Request
from sqlalchemy.orm import Session

from api.deps import CatalogDep, ReadSessionDep, SessionDep, TenantDep
from api.routes.adapters import delete_unchanged
from api.schemas.base import Deleted, ListRead, problems
from api.schemas.models import ModelRead
from core.adapters.repository import AdapterRepository
from core.bases import Catalog
from core.errors import Conflict, NotFound
from core.models import Adapter

router = APIRouter(prefix="/v1/models", tags=["models"])


@router.get("", responses=problems(), summary="List bases and your own tuned models")
def list_models(session: ReadSessionDep, caller: TenantDep, catalog: CatalogDep) -> ListRead[ModelRead]:
    own = AdapterRepository(session, caller.tenant_id).list_all()
    bases = [_base(catalog, name) for name in catalog.names()]
    return ListRead[ModelRead].of([*bases, *(_tuned(catalog, row) for row in own)])


@router.get("/{model_id:path}", responses=problems(404), summary="A model")
def get_model(model_id: str, session: ReadSessionDep, caller: TenantDep, catalog: CatalogDep) -> ModelRead:
    if model_id in catalog.names():
        return _base(catalog, model_id)
    return _tuned(catalog, _own(session, caller.tenant_id, model_id))


@router.delete("/{model_id:path}", responses=problems(404, 409, 412), summary="Delete a tuned model of your own")
def delete_model(
    model_id: str, request: Request, session: SessionDep, caller: TenantDep, catalog: CatalogDep
) -> Deleted:
    """The same as deleting its adapter; `If-Match` names the adapter's `ETag`."""
    if model_id in catalog.names():
        raise Conflict("a base model belongs to the service and cannot be deleted", code="base_model")
    delete_unchanged(request, session, caller.tenant_id, _own(session, caller.tenant_id, model_id).id)
    return Deleted(id=model_id, object="model")


def _own(session: Session, tenant_id: str, model: str) -> Adapter:
    found = AdapterRepository(session, tenant_id).find_model(model)
    if found is None:
        raise NotFound(f"no model {model}", code="model_not_found")
    return found


def _base(catalog: Catalog, name: str) -> ModelRead:
    changed = (catalog.folder(name) / "model_index.json").stat().st_mtime
    return ModelRead.of_base(catalog.get(name), int(changed))


def _tuned(catalog: Catalog, row: Adapter) -> ModelRead:
    return ModelRead.of_adapter(row, catalog.get(row.base) if row.base in catalog.names() else None)
