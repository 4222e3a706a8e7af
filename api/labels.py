"""The filter `metadata[name]=value` of a list, as OpenAI's clients send it; `metadata=null` asks for what has none."""

import re
from typing import Annotated, Any

from fastapi import Depends, Request
from pydantic import TypeAdapter, ValidationError

from api.schemas.jobs import Labels
from core.errors import Invalid

_NAMED = re.compile(r"metadata\[(.*)\]", re.DOTALL)
_LABELS = TypeAdapter(Labels)

LABELS_PARAM: dict[str, Any] = {
    "name": "metadata",
    "in": "query",
    "style": "deepObject",
    "explode": True,
    "description": "`metadata[team]=a`: those that have every one of these labels. `metadata=null`: those without any.",
    "schema": {
        "type": "object",
        "maxProperties": 16,
        "additionalProperties": {"type": "string", "maxLength": 512},
    },
}
"""FastAPI has no word for a query parameter of this form, so the routes that take it say it to OpenAPI themselves."""


async def asked_labels(request: Request) -> dict[str, str] | None:
    """None asks for all, an empty one for what has no labels. Raises Invalid for what cannot be meant."""
    asked: dict[str, str] = {}
    wants_none = False
    for name, value in request.query_params.multi_items():
        if name == "metadata" and value == "null":
            wants_none = True
        elif named := _NAMED.fullmatch(name):
            if named[1] in asked:
                raise Invalid("metadata names a label twice: nothing has two values of one", pointer="/metadata")
            asked[named[1]] = value
        elif name.startswith("metadata"):
            raise Invalid("filter by metadata[name]=value, or by metadata=null", pointer="/metadata")
    if wants_none and asked:
        raise Invalid("metadata=null and metadata[name]=value exclude each other", pointer="/metadata")
    try:
        return _LABELS.validate_python(asked) if asked or wants_none else None
    except ValidationError as error:
        raise Invalid(f"metadata: {error.errors()[0]['msg']} (query parameter)", pointer="/metadata") from None


LabelsParam = Annotated[dict[str, str] | None, Depends(asked_labels)]
