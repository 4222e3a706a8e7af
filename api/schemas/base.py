"""What all shapes share: strict bodies, strings that every database can hold, lists as OpenAI has them."""

from typing import Annotated, Any, Generic, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

Item = TypeVar("Item")


def storable(text: str) -> str:
    """Raises ValueError for what PostgreSQL or UTF-8 has no place for."""
    if "\x00" in text:
        raise ValueError("must not hold the character NUL")
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise ValueError("must be Unicode text without lone surrogates")
    return text


Text = Annotated[str, AfterValidator(storable)]
ModelName = Annotated[Text, Field(min_length=1, max_length=300)]
"""A base's, or a tuned model's `ft:…`; wherever one may be named, any of ours may."""


class Body(BaseModel):
    """What a caller sends: no field that we do not know, no text for a number, no NaN."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, hide_input_in_errors=True)


class ListRead(BaseModel, Generic[Item]):
    object: str = "list"
    data: list[Item]
    first_id: str | None
    last_id: str | None
    has_more: bool

    @classmethod
    def of(cls, data: list[Item], has_more: bool = False) -> "ListRead[Item]":
        ids = [str(getattr(item, "id", "")) or None for item in data]
        return cls(data=data, first_id=ids[0] if ids else None, last_id=ids[-1] if ids else None, has_more=has_more)


class Deleted(BaseModel):
    id: str
    object: str
    deleted: bool = True


class FieldProblem(BaseModel):
    pointer: str = Field(description="JSON pointer (RFC 6901) of the field at fault.")
    detail: str


class OpenAIError(BaseModel):
    code: str
    message: str
    param: str | None
    type: str


class Problem(BaseModel):
    """RFC 9457, with an `error` member for OpenAI's clients."""

    type: str
    title: str
    status: int
    detail: str
    instance: str
    errors: list[FieldProblem]
    error: OpenAIError


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The error replies of a route, for OpenAPI; those that every route has are added."""
    content = {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}}
    said = {status: {"description": _MEANING[status], "content": content} for status in (*statuses, 401, 403, 429, 503)}
    return {**said, "default": {"description": "Any other trouble, in the same shape.", "content": content}}


UNCHANGED: dict[int | str, dict[str, Any]] = {304: {"description": "If-None-Match names it as it is: nothing is sent."}}

_MEANING = {
    400: "The request cannot be parsed.",
    401: "No API key, or a dead one.",
    403: "The tenant is suspended.",
    404: "Not there, or not yours.",
    408: "The body came too slowly.",
    409: "The state does not allow it, or the same request is under way.",
    410: "The bytes are gone.",
    412: "If-Match names another state.",
    413: "The body is too large.",
    415: "The body's type or encoding is not taken.",
    422: "Parsed, but not acceptable: `errors` names the fields.",
    429: "A limit of the tenant is reached: see Retry-After.",
    503: "Something that we depend on does not answer: see Retry-After.",
    504: "The request's own timeout has passed.",
}
