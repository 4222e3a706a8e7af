"""Names of objects: made of ids and digests alone, each under its tenant."""

import re

_OURS = re.compile(r"tenant-[0-9a-z]{25}/(datasets|jobs|adapters|samples|evaluations)/[^/]+/[^/]+")


def is_ours(key: str) -> bool:
    """Whether the key is of the kind that this module makes; anything else in the store is somebody else's."""
    return _OURS.fullmatch(key) is not None


def archive(tenant_id: str, dataset_id: str) -> str:
    return f"{tenant_id}/datasets/{dataset_id}/archive"


def pack(tenant_id: str, dataset_id: str, attempt: int) -> str:
    return f"{tenant_id}/datasets/{dataset_id}/pack-{attempt}.zip"


def report(tenant_id: str, dataset_id: str, attempt: int) -> str:
    return f"{tenant_id}/datasets/{dataset_id}/report-{attempt}.json"


def checkpoint(tenant_id: str, job_id: str, attempt: int, step: int) -> str:
    """The attempt is in the key: a late worker can never overwrite what the current one wrote."""
    return f"{tenant_id}/jobs/{job_id}/checkpoint-{attempt:04d}-{step:08d}.safetensors"


def preview(tenant_id: str, job_id: str, attempt: int, step: int) -> str:
    return f"{tenant_id}/jobs/{job_id}/preview-{attempt:04d}-{step:08d}.png"


def adapter(tenant_id: str, adapter_id: str, sha256: str) -> str:
    return f"{tenant_id}/adapters/{adapter_id}/{sha256}.safetensors"


def image(tenant_id: str, sample_id: str, attempt: int, index: int) -> str:
    return f"{tenant_id}/samples/{sample_id}/{attempt:04d}-{index:03d}"


def partial_image(tenant_id: str, sample_id: str, attempt: int, index: int, number: int) -> str:
    return f"{tenant_id}/samples/{sample_id}/{attempt:04d}-{index:03d}-partial-{number}"


def evaluation(tenant_id: str, evaluation_id: str, attempt: int) -> str:
    return f"{tenant_id}/evaluations/{evaluation_id}/features-{attempt:04d}.npz"
