"""The object store that the settings name."""

from pathlib import Path

from core.settings import Settings
from core.storage.base import ObjectStore


def open_store(settings: Settings) -> ObjectStore:
    """A folder, or S3 for `s3://bucket/prefix`."""
    if settings.objects.startswith("s3://"):
        from core.storage.s3 import S3Store  # noqa: PLC0415  # boto3 takes 200 ms to import: only who uses it pays

        bucket, _, prefix = settings.objects.removeprefix("s3://").partition("/")
        return S3Store(bucket, prefix, settings)

    from core.storage.local import LocalStore  # noqa: PLC0415  # beside its twin

    return LocalStore(Path(settings.objects))
