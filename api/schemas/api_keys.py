from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, Field

from api.schemas.base import Body, Text
from core.clock import to_unix
from core.models import ApiKey


class KeyCreate(Body):
    name: Annotated[Text, Field(min_length=1, max_length=100)]


class KeyRead(BaseModel):
    id: str
    object: Literal["api_key"] = "api_key"
    name: str
    prefix: str
    created_at: int
    revoked_at: int | None

    @classmethod
    def of(cls, row: ApiKey) -> Self:
        return cls(**_facts(row))


class KeyCreated(KeyRead):
    secret: str = Field(description="Shown this once; only its digest is kept.")

    @classmethod
    def with_secret(cls, row: ApiKey, secret: str) -> Self:
        return cls(**_facts(row), secret=secret)


def _facts(row: ApiKey) -> dict[str, Any]:
    created, revoked = to_unix(row.created_at), to_unix(row.revoked_at)
    return {"id": row.id, "name": row.name, "prefix": row.prefix, "created_at": created, "revoked_at": revoked}
