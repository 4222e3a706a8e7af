"""The tables. Importing this package registers them all on `Base.metadata`."""

from core.models.adapter import Adapter
from core.models.dataset import Dataset
from core.models.evaluation import Evaluation
from core.models.idempotency import IdempotencyKey
from core.models.job import Checkpoint, Job, JobEvent, JobMetric, Preview
from core.models.outbox import OutboxMessage
from core.models.sample import Sample
from core.models.tenant import ApiKey, Tenant

__all__ = [
    "Adapter",
    "ApiKey",
    "Checkpoint",
    "Dataset",
    "Evaluation",
    "IdempotencyKey",
    "Job",
    "JobEvent",
    "JobMetric",
    "OutboxMessage",
    "Preview",
    "Sample",
    "Tenant",
]
