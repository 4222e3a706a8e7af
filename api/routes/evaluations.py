"""Evaluations: a model's pictures measured against a file's, by a device worker."""

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from sqlalchemy.orm import Session

from api.deps import AfterParam, CatalogDep, LimitParam, ReadSessionDep, SessionDep, SettingsDep, TenantDep
from api.once import OnceDep
from api.routes.images import named_model
from api.schemas.base import UNCHANGED, ListRead, problems
from api.schemas.evaluations import EvaluationCreate, EvaluationRead
from api.states import check_state, state_reply
from core.bases import Catalog
from core.datasets.repository import DatasetRepository
from core.evaluations import service as evaluations
from core.evaluations.repository import EvaluationRepository
from core.evaluations.spec import resolve
from core.models import Evaluation, Job
from core.samples import spec as sample_spec
from core.samples.spec import Asked

router = APIRouter(prefix="/v1/evaluations", tags=["evaluations"])


@router.post("", response_model=EvaluationRead, responses=problems(400, 404, 409, 422), summary="Measure a model")
def create_evaluation(
    body: EvaluationCreate,
    session: SessionDep,
    caller: TenantDep,
    once: OnceDep,
    catalog: CatalogDep,
    settings: SettingsDep,
) -> JSONResponse:
    """Distances of its pictures to the file's: to those that training held out, where the file is its own."""

    def create() -> EvaluationRead:
        return EvaluationRead.of(_create(catalog, session, caller.tenant_id, body, settings.max_queued_evaluations))

    return once.reply(session, create)


@router.get("", responses=problems(404, 422), summary="List evaluations, newest first")
def list_evaluations(
    session: ReadSessionDep, caller: TenantDep, after: AfterParam = None, limit: LimitParam = 20
) -> ListRead[EvaluationRead]:
    page = EvaluationRepository(session, caller.tenant_id).list_newest(after, limit)
    return ListRead[EvaluationRead].of([EvaluationRead.of(row) for row in page.rows], page.has_more)


@router.get(
    "/{evaluation_id}",
    response_model=EvaluationRead,
    responses={**UNCHANGED, **problems(404)},
    summary="An evaluation and its result",
)
def get_evaluation(evaluation_id: str, request: Request, session: ReadSessionDep, caller: TenantDep) -> Response:
    return state_reply(request, EvaluationRead.of(EvaluationRepository(session, caller.tenant_id).get(evaluation_id)))


@router.post(
    "/{evaluation_id}/cancel",
    response_model=EvaluationRead,
    responses=problems(404, 409, 412),
    summary="Cancel an evaluation",
)
def cancel_evaluation(
    evaluation_id: str, request: Request, session: SessionDep, caller: TenantDep, once: OnceDep
) -> JSONResponse:
    """At once where no worker holds it, else within seconds. One that has ended answers 409."""

    def cancel() -> EvaluationRead:
        present = EvaluationRepository(session, caller.tenant_id).get(evaluation_id)
        check_state(request, EvaluationRead.of(present))
        return EvaluationRead.of(evaluations.cancel_evaluation(session, caller.tenant_id, evaluation_id))

    return once.reply(session, cancel)


def _create(catalog: Catalog, session: Session, tenant_id: str, body: EvaluationCreate, max_queued: int) -> Evaluation:
    base, adapter = named_model(catalog, session, tenant_id, body.model)
    dataset = DatasetRepository(session, tenant_id).get(body.file, pointer="/file", lock=True)
    asked = Asked(
        seed=body.seed or 0,
        steps=body.steps,
        solver=body.solver,
        guidance=body.guidance,
        guidance_scale=body.guidance_scale,
    )
    drawn = sample_spec.resolve(base, [] if adapter is None else [(adapter, 1.0)], asked, max_n=1)
    job = session.get(Job, adapter.job_id) if adapter is not None and adapter.job_id else None
    spec = resolve(dataset, adapter, job, drawn, images=body.images, baseline=body.baseline)
    return evaluations.create_evaluation(session, tenant_id, base, adapter, dataset, spec, max_queued)
