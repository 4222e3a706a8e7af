"""Any S3. The one file that imports boto3."""

import logging
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import boto3
from boto3.exceptions import Boto3Error
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from core import faults
from core.clock import utc_now
from core.settings import Settings
from core.storage import keys
from core.storage.base import ObjectInfo, ObjectMissing, StorageUnavailable

_log = logging.getLogger(__name__)
_UPLOAD_TIME = timedelta(days=1)  # far more than an upload takes, or two clocks differ
_MISSING = {"NoSuchKey", "404", "NotFound"}


class S3Store:
    """Objects under `s3://bucket/prefix/`. A put is atomic in S3 itself; botocore retries with backoff and jitter."""

    def __init__(self, bucket: str, prefix: str, settings: Settings) -> None:
        self._bucket = bucket
        self._prefix = f"{prefix.strip('/')}/" if prefix.strip("/") else ""
        secret = settings.s3_secret_access_key
        self._client: Any = boto3.client(
            "s3",
            endpoint_url=settings.s3_endpoint_url,
            region_name=settings.s3_region,
            aws_access_key_id=settings.s3_access_key_id,
            aws_secret_access_key=secret.get_secret_value() if secret else None,
            config=Config(
                connect_timeout=5,
                read_timeout=30,  # five silent tries end within `stall_seconds`: a worker that waits here does not hang
                retries={"mode": "standard", "total_max_attempts": 5},
                s3={"addressing_style": "path"},
            ),
        )

    def put(self, key: str, data: bytes, content_type: str = "application/octet-stream") -> None:
        with _translated(key):
            self._client.put_object(Bucket=self._bucket, Key=self._prefix + key, Body=data, ContentType=content_type)

    def put_file(self, key: str, path: Path, content_type: str = "application/octet-stream") -> None:
        with _translated(key):
            self._client.upload_file(
                str(path),
                self._bucket,
                self._prefix + key,
                ExtraArgs={"ContentType": content_type},
                Callback=lambda _bytes: faults.point("upload_part"),
            )

    def get(self, key: str) -> bytes:
        with _translated(key):
            return self._client.get_object(Bucket=self._bucket, Key=self._prefix + key)["Body"].read()

    def get_file(self, key: str, path: Path) -> None:
        with _translated(key):
            self._client.download_file(self._bucket, self._prefix + key, str(path))

    def stream(self, key: str, chunk_bytes: int = 1 << 20) -> Iterator[bytes]:
        with _translated(key):
            body = self._client.get_object(Bucket=self._bucket, Key=self._prefix + key)["Body"]
        return self._chunks(key, body, chunk_bytes)

    def delete(self, key: str) -> None:
        with _translated(key):
            self._client.delete_object(Bucket=self._bucket, Key=self._prefix + key)

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        with _translated(prefix):
            pages = self._client.get_paginator("list_objects_v2").paginate(
                Bucket=self._bucket, Prefix=self._prefix + prefix
            )
            for page in pages:
                for item in page.get("Contents", []):
                    yield ObjectInfo(item["Key"].removeprefix(self._prefix), item["Size"], item["LastModified"])

    def clear_leftovers(self) -> int:
        """Parts of uploads that were never completed: no list shows them, and they are paid for."""
        cleared = 0
        with _translated(""), _unless_refused():
            pages = self._client.get_paginator("list_multipart_uploads").paginate(
                Bucket=self._bucket, Prefix=self._prefix
            )
            for upload in (upload for page in pages for upload in page.get("Uploads", [])):
                is_ours = keys.is_ours(upload["Key"].removeprefix(self._prefix))
                if is_ours and upload["Initiated"] < utc_now() - _UPLOAD_TIME:
                    self._client.abort_multipart_upload(
                        Bucket=self._bucket, Key=upload["Key"], UploadId=upload["UploadId"]
                    )
                    cleared += 1
        return cleared

    def ping(self) -> None:
        with _translated(""):
            self._client.head_bucket(Bucket=self._bucket)

    def create_bucket(self) -> None:
        """For first starts; an existing bucket is left as it is."""
        try:
            self._client.create_bucket(Bucket=self._bucket)
        except ClientError as error:
            if error.response["Error"]["Code"] not in {"BucketAlreadyOwnedByYou", "BucketAlreadyExists"}:
                raise StorageUnavailable(f"cannot create the bucket: {error}") from error

    @staticmethod
    def _chunks(key: str, body: Any, chunk_bytes: int) -> Iterator[bytes]:
        with _translated(key), closing(body):
            yield from body.iter_chunks(chunk_bytes)


@contextmanager
def _unless_refused() -> Iterator[None]:
    """Not every store knows these calls, nor may every key use them: then there is nothing that we could clear."""
    try:
        yield
    except ClientError as error:
        _log.debug("storage.leftovers_unknown", extra={"code": error.response["Error"]["Code"]})


@contextmanager
def _translated(key: str) -> Iterator[None]:
    try:
        yield
    except ClientError as error:
        if error.response["Error"]["Code"] in _MISSING:
            raise ObjectMissing(key=key) from error
        raise StorageUnavailable(f"the object store refused: {error.response['Error']['Code']}") from error
    except (BotoCoreError, Boto3Error) as error:
        raise StorageUnavailable(f"the object store does not answer: {type(error).__name__}") from error
    except OSError as error:  # of the file that an object is read from or written to
        raise StorageUnavailable(f"cannot transfer an object: {error.strerror}") from error
