"""The hyperparameters in OpenAPI's words: their names and bounds are core's, and `resolve` is what checks them."""

from typing import Any

from core.diffusion.layout import GAMMA_DEPTHS, GAMMA_PLACES
from core.training.hyperparameters import AUTO, CHOICE, FLAG, REAL, WHOLE


def schema() -> dict[str, Any]:
    """One object for all bases: what depends on one, as `image_size` does, is wider here than `resolve` takes it."""
    fields = (
        {name: _whole(*bounds) for name, bounds in WHOLE.items()}
        | {name: {"type": "number", "minimum": low, "maximum": high} for name, (low, high) in REAL.items()}
        | {name: {"enum": list(among)} for name, among in CHOICE.items()}
        | {name: {"type": "boolean"} for name in FLAG}
        | {"gamma_depth": _DEPTH, "gamma_places": {"type": "array", "items": {"enum": list(GAMMA_PLACES)}}}
    )
    return {
        "type": "object",
        "additionalProperties": False,
        "properties": {name: {"anyOf": [field, *_CHOSEN]} for name, field in fields.items()},
    }


_CHOSEN: list[dict[str, Any]] = [{"const": AUTO}, {"type": "null"}]
_DEPTH: dict[str, Any] = {
    "anyOf": [
        {"enum": list(GAMMA_DEPTHS)},
        {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 2, "maxItems": 2},
    ]
}


def _whole(low: int, high: int | None) -> dict[str, Any]:
    return {"type": "integer", "minimum": low} | ({} if high is None else {"maximum": high})
