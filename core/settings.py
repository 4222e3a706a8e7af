"""Every setting of the service, read from the environment (`DIFFFIT_…`) or `.env`; `.env.example` lists them all."""

import functools
import hashlib
import os
import tempfile
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from core.errors import Invalid

PACKAGED_BASE = Path(__file__).parent.parent / "models" / "emoji-dit-64"

_LONGEST_SOCKET = 100  # the kernel takes 107 bytes


class BadSettings(Invalid):
    """A setting has a value that it cannot have; the message names the setting, never the value."""

    code = "bad_settings"


Role = Literal["both", "train", "sample"]


class Settings(BaseSettings):
    """The embedded default needs none of these set: everything lives under `data_dir`."""

    model_config = SettingsConfigDict(
        env_prefix="DIFFFIT_",
        env_file=".env",
        env_ignore_empty=True,  # `NAME=` in `.env` stands for the default, as `.env.example` shows it
        extra="ignore",
        hide_input_in_errors=True,
    )

    data_dir: Path = Field(
        Path(".difffit"), description="Folder of the embedded default: database, objects, broker socket, caches."
    )
    host: str = Field("127.0.0.1", description="Address that the API listens on.")
    port: int = Field(8321, ge=1, le=65535, description="Port that the API listens on.")
    public_url: str | None = Field(
        None, description="Base URL in links that replies carry; default: the request's own."
    )

    database_url: SecretStr | None = Field(None, description="SQLAlchemy URL; default: SQLite under data_dir.")
    broker_url: SecretStr | None = Field(
        None, description="Redis or Valkey URL; default: the embedded Valkey's socket."
    )
    object_store: str | None = Field(
        None, description="`s3://bucket/prefix` or a folder, this service's alone; default: data_dir/objects."
    )
    s3_endpoint_url: str | None = Field(None, description="Endpoint of an S3-compatible server; default: AWS.")
    s3_region: str = Field("us-east-1", description="Region of the S3 bucket.")
    s3_access_key_id: str | None = Field(None, description="Access key; default: boto3's own search.")
    s3_secret_access_key: SecretStr | None = Field(None, description="Secret key; default: boto3's own search.")

    bases: Annotated[list[str], NoDecode] = Field(
        [str(PACKAGED_BASE)],
        description="DiTPipeline folders or hub names, comma-separated; the first is the default.",
    )
    device: str = Field("auto", description="`auto`, `cpu`, `cuda` or `cuda:N`.")
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="Type that the frozen base is held in, and images are drawn in."
    )
    train_dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="Type that jobs train in: `auto` is bfloat16 where the device is quick at it, else DIFFFIT_DTYPE. "
        "Where the two differ there is a second copy of the base.",
    )
    compile: bool = Field(
        False,
        description="Have torch compile what lies between the matrix products of a training step; on a CPU it needs a "
        "C++ compiler.",
    )
    threads: int = Field(1, ge=1, description="CPU threads of a device worker.")
    max_devices: int = Field(
        1,
        ge=1,
        description="Most devices that a job may ask for, and that a device worker uses for one job: GPUs from its own "
        "on, or processes on a CPU.",
    )
    role: Role = Field("both", description="What a device worker does: `both`, `train` or `sample`.")
    bank_slots: int = Field(32, ge=2, description="Adapters that the bank on the device holds, the base included.")
    max_batch_rows: int | None = Field(
        None, ge=2, description="Rows of one denoising forward pass; default: 16 on a CPU, 32 elsewhere."
    )
    packing: Literal["exact", "always", "off"] = Field(
        "exact",
        description="Jobs in one training pass: `exact` where that changes no bit of any, `always` (a job's bits then "
        "depend on who shared its passes), or `off`.",
    )
    max_train_jobs: int = Field(8, ge=1, description="Jobs of one training pass.")
    max_train_rows: int = Field(64, ge=1, description="Rows of one training pass; a job that has more trains alone.")
    train_memory_share: float = Field(
        0.5, gt=0, le=1, description="Share of the device's free memory that one training pass may take."
    )
    row_buckets: Annotated[list[int], NoDecode] = Field(
        [], description="Numbers of rows that a denoising pass is filled up to, so that compiled code sees few shapes."
    )
    adapter_host_bytes: int = Field(1024**3, ge=0, description="Host memory for adapters that are not on the device.")
    adapter_disk_bytes: int = Field(
        4 * 1024**3, ge=0, description="Disk that a device worker may use to keep adapters of the object store at hand."
    )
    pinned_adapters: Annotated[list[str], NoDecode] = Field(
        [], description="Ids of adapters that a device worker loads at its start and keeps on the device."
    )

    lease_seconds: float = Field(30.0, gt=0, description="A worker that is silent for so long has lost its work.")
    stall_seconds: float = Field(
        300.0,
        gt=0,
        description="A device worker in which nothing moves for so long ends itself, and another starts in its place.",
    )
    slice_seconds: float = Field(
        45.0, gt=0, description="How long a pump claims work before it goes back to the queue."
    )
    poll_seconds: float = Field(0.1, gt=0, description="How often a pump looks for new work between steps.")
    sweep_seconds: float = Field(2.0, gt=0, description="How often upkeep looks for lost work.")
    max_attempts: int = Field(3, ge=1, description="Crashes after which a dataset, job, sample or evaluation ends.")
    retention_hours: float = Field(
        24.0 * 7, gt=0, description="How long generated images and idempotency keys are kept."
    )
    keep_checkpoints: int = Field(3, ge=1, description="Checkpoints kept per job, newest first.")

    max_upload_bytes: int = Field(512 * 1024**2, ge=1, description="Largest archive that an upload may hold.")
    max_body_bytes: int = Field(1024**2, ge=1024, description="Largest body of any other request.")
    max_images: int = Field(10_000, ge=2, description="Images that a dataset may hold.")
    requests_per_minute: int = Field(
        3000, ge=1, description="Requests that a tenant may send, with all of its keys, to each API process."
    )
    max_streams: int = Field(
        32, ge=1, description="Event streams that a tenant may have open at once, of each API process."
    )
    max_queued_jobs: int = Field(100, ge=1, description="Unfinished jobs that a tenant may have.")
    max_queued_samples: int = Field(64, ge=1, description="Unfinished image requests that a tenant may have.")
    max_waiting_samples: int = Field(
        4096, ge=1, description="Image requests that may wait, of all tenants together, before new ones answer 503."
    )
    max_queued_evaluations: int = Field(20, ge=1, description="Unfinished evaluations that a tenant may have.")
    max_steps: int = Field(20_000, ge=1, description="Training steps that a job may ask for.")
    max_images_per_request: int = Field(16, ge=1, description="Largest `n` of an image request.")
    image_wait_seconds: float = Field(
        120.0, gt=0, description="How long a synchronous image request waits before it answers 503."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least level that is logged.")

    @field_validator("bases", "row_buckets", "pinned_adapters", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return [item.strip() for item in value.split(",") if item.strip()] if isinstance(value, str) else value

    @property
    def database(self) -> str:
        if self.database_url is not None:
            return self.database_url.get_secret_value()
        return f"sqlite:///{self.data_dir.absolute() / 'difffit.db'}"

    @property
    def broker_socket(self) -> Path:
        inside = self.data_dir.absolute() / "run" / "valkey.sock"
        if len(str(inside)) < _LONGEST_SOCKET:
            return inside
        digest = hashlib.sha256(str(inside).encode()).hexdigest()[:16]
        return Path(tempfile.gettempdir()) / f"difffit-{os.getuid()}-{digest}" / "valkey.sock"

    @property
    def broker(self) -> str:
        if self.broker_url is not None:
            return self.broker_url.get_secret_value()
        return f"redis+socket://{self.broker_socket}"

    @property
    def objects(self) -> str:
        return self.object_store or str(self.data_dir.absolute() / "objects")


@functools.cache
def get_settings() -> Settings:
    """The process's settings, read once. Only edges call this; `core` is handed what it needs. Raises BadSettings."""
    try:
        return Settings()  # pyright: ignore[reportCallIssue]  # pydantic-settings fills the fields
    except ValidationError as error:
        wrong = [f"DIFFFIT_{str(item['loc'][0]).upper()}: {item['msg']}" for item in error.errors(include_input=False)]
        raise BadSettings("; ".join(wrong)) from None  # the cause would show values, and some are secret
