from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field

from core.clock import to_unix
from core.models import Dataset


class ClassCount(BaseModel):
    name: str
    count: int


class DatasetRead(BaseModel):
    """What validation made of the archive."""

    images: int
    rejected: int
    classes: list[ClassCount]


class FileRead(BaseModel):
    """OpenAI's file object. `dataset` and `sha256` are ours."""

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    expires_at: int | None = None
    filename: str
    purpose: str
    status: Literal["uploaded", "processed", "error"]
    status_details: str | None
    error_code: str | None
    sha256: str
    dataset: DatasetRead | None

    @classmethod
    def of(cls, row: Dataset) -> Self:
        return cls.model_validate(
            {
                "id": row.id,
                "bytes": row.bytes,
                "created_at": to_unix(row.created_at),
                "filename": row.filename,
                "purpose": row.purpose,
                "status": row.status,
                "status_details": row.status_details,
                "error_code": row.error_code,
                "sha256": row.sha256,
                "dataset": None if row.status == "uploaded" else _dataset(row),
            }
        )


class VerdictRead(BaseModel):
    """One image of the archive."""

    model_config = ConfigDict(populate_by_name=True, serialize_by_alias=True)

    name: str
    class_name: str = Field(alias="class")
    verdict: Literal["accepted", "rejected"]
    code: str | None
    detail: str | None
    width: int | None
    height: int | None


class ReportRead(BaseModel):
    id: str
    object: Literal["file.report"] = "file.report"
    status: str
    code: str | None
    detail: str | None
    images: int
    rejected: int
    classes: list[ClassCount]
    verdicts: list[VerdictRead]


def _dataset(row: Dataset) -> dict[str, Any]:
    return {"images": row.images or 0, "rejected": row.rejected or 0, "classes": row.classes or []}
