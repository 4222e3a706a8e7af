"""Files: archives of images, OpenAI's shape. Stored at once, validated by a worker."""

import json
from typing import Annotated, Literal

from anyio import to_thread
from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse, Response

from api.content import Stored, object_reply
from api.deps import (
    AfterParam,
    LimitParam,
    ReadSessionDep,
    ServicesDep,
    SessionDep,
    TenantDep,
    committed,
)
from api.middleware import Caller
from api.once import REPLAYED, Once, fingerprint, key_of
from api.schemas.base import UNCHANGED, Deleted, ListRead, Text, problems
from api.schemas.files import FileRead, ReportRead
from api.services import Services
from api.upload import Upload, received
from core import faults
from core.datasets import service as datasets
from core.datasets.intake import quick_check
from core.datasets.limits import Limits
from core.datasets.repository import DatasetRepository
from core.errors import Conflict, Invalid
from core.models import Dataset

router = APIRouter(prefix="/v1/files", tags=["files"])

_FORM = {
    "required": True,
    "content": {
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "required": ["file", "purpose"],
                "properties": {
                    "file": {"type": "string", "format": "binary", "description": "A .zip, .tar or .tar.gz of images."},
                    "purpose": {"type": "string", "enum": ["fine-tune"]},
                },
            }
        }
    },
}


@router.post(
    "",
    response_model=FileRead,
    responses=problems(400, 408, 409, 413, 415, 422),
    openapi_extra={"requestBody": _FORM},
    summary="Upload an archive of images",
)
async def create_file(request: Request, caller: TenantDep, services: ServicesDep) -> Response:
    """Plain faults of the archive are said at once; the images are validated after, see `status` and `/report`."""
    key = key_of(request)
    settings = services.settings
    spool = settings.data_dir.absolute() / "spool"
    with request.app.state.uploads.one(caller.tenant_id):
        async with received(request, spool, settings.max_upload_bytes, frozenset({"purpose"})) as upload:
            faults.point("body_staged")
            once = Once(caller.tenant_id, key, fingerprint(request, upload.sha256, upload.filename, upload.fields))
            return await to_thread.run_sync(_keep, services, caller, upload, once)


@router.get("", responses=problems(422), summary="List files, newest first")
def list_files(
    session: ReadSessionDep,
    caller: TenantDep,
    after: AfterParam = None,
    limit: LimitParam = 20,
    purpose: Annotated[Text | None, Query(max_length=50)] = None,
    order: Literal["desc"] = "desc",
) -> ListRead[FileRead]:
    if purpose not in (None, "fine-tune"):
        return ListRead[FileRead].of([])
    page = DatasetRepository(session, caller.tenant_id).list_newest(after, limit)
    return ListRead[FileRead].of([FileRead.of(row) for row in page.rows], page.has_more)


@router.get("/{file_id}", responses=problems(404), summary="A file and what its validation said")
def get_file(file_id: str, session: ReadSessionDep, caller: TenantDep) -> FileRead:
    return FileRead.of(DatasetRepository(session, caller.tenant_id).get(file_id))


@router.delete("/{file_id}", responses=problems(404, 409), summary="Delete a file")
def delete_file(file_id: str, session: SessionDep, caller: TenantDep) -> Deleted:
    datasets.delete_dataset(session, caller.tenant_id, file_id)
    return Deleted(id=file_id, object="file")


@router.head("/{file_id}/content", include_in_schema=False)
@router.get(
    "/{file_id}/content",
    response_class=Response,
    responses={200: {"content": {"application/octet-stream": {}}}, **UNCHANGED, **problems(404, 410)},
    summary="The archive as it was uploaded",
)
def get_file_content(file_id: str, request: Request, services: ServicesDep, caller: TenantDep) -> Response:
    with services.database.read() as session:
        row = DatasetRepository(session, caller.tenant_id).get(file_id)
    return object_reply(request, services.store, Stored(row.object_key, row.sha256, row.bytes, row.filename))


@router.get("/{file_id}/report", responses=problems(404, 409, 410), summary="The verdict per image")
def get_file_report(file_id: str, services: ServicesDep, caller: TenantDep) -> ReportRead:
    with services.database.read() as session:
        row = DatasetRepository(session, caller.tenant_id).get(file_id)
    if row.status == "uploaded":
        raise Conflict(
            f"file {row.id} is not validated yet: ask again", code="file_not_validated", retry_after_seconds=2
        )
    if row.report_key is None:
        return ReportRead.model_validate(
            {**_OWN_ERROR, "id": row.id, "code": row.error_code, "detail": row.status_details}
        )
    return ReportRead.model_validate({"id": row.id, **json.loads(services.store.get(row.report_key))})


_OWN_ERROR = {"status": "error", "images": 0, "rejected": 0, "classes": [], "verdicts": []}


def _keep(services: Services, caller: Caller, upload: Upload, once: Once) -> JSONResponse:
    """Bytes first, then the row; what fails leaves neither."""
    if upload.fields.get("purpose") != "fine-tune":
        raise Invalid("purpose must be fine-tune", pointer="/purpose")
    with services.database.read() as session:
        if (before := once.find(session)) is not None:
            return JSONResponse(before, headers=REPLAYED)
    settings = services.settings
    quick_check(upload.path, Limits(max_archive_bytes=settings.max_upload_bytes, max_images=settings.max_images))
    dataset_id, key = datasets.new_dataset_id(caller.tenant_id)
    is_kept = False
    try:
        services.store.put_file(key, upload.path)
        is_kept, reply = _record(services, caller, upload, once, dataset_id)
        return reply
    except BaseException:
        is_kept = _is_recorded(services, dataset_id)
        raise
    finally:
        if not is_kept:
            services.store.delete(key)


def _record(
    services: Services, caller: Caller, upload: Upload, once: Once, dataset_id: str
) -> tuple[bool, JSONResponse]:
    """Whether the row is ours: a request that ran beside this one may have been the first."""

    def create() -> FileRead:
        facts = {"filename": upload.filename, "purpose": "fine-tune", "size": upload.size, "sha256": upload.sha256}
        return FileRead.of(datasets.create_dataset(session, caller.tenant_id, dataset_id, **facts))

    with services.database.write() as session:
        reply = once.reply(session, create)
        faults.point("before_commit")
    committed(services, session)
    return "idempotency-replayed" not in reply.headers, reply


def _is_recorded(services: Services, dataset_id: str) -> bool:
    """A commit that failed may have come through all the same; where nobody can say, upkeep looks for orphans later."""
    try:
        with services.database.read() as session:
            return session.get(Dataset, dataset_id) is not None
    except Exception:
        return True
