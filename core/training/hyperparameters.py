"""The hyperparameters of a job, each with its bounds: `spec.resolve` reads them by it, OpenAPI shows it."""

import math
from collections.abc import Mapping
from typing import Any, Final

from core.diffusion.layout import KINDS
from core.errors import Invalid

AUTO = "auto"
MAX_DEVICES = 64

WHOLE: Final[Mapping[str, tuple[int, int | None]]] = {
    "steps": (1, None),
    "batch_size": (1, 256),
    "warmup_steps": (0, None),
    "image_size": (1, None),
    "metrics_every": (1, None),
    "validation_every": (1, None),
    "checkpoint_every": (1, None),
    "preview_every": (1, None),
    "preview_images": (1, 16),
    "preview_steps": (1, 100),
    "devices": (1, MAX_DEVICES),
}
"""None is whatever the service allows, in steps; `image_size` has its bounds from the base."""

REAL: Final[Mapping[str, tuple[float, float]]] = {
    "n_epochs": (1e-3, 1e6),
    "learning_rate": (1e-8, 1.0),
    "learning_rate_multiplier": (1e-3, 1e4),
    "rate_decay": (0.0, 1.0),
    "ema_decay": (0.0, 0.999999),
    "clip_norm": (1e-6, 1e6),
    "label_dropout": (0.0, 0.9),
    "min_snr_gamma": (0.1, 100.0),
    "time_shift": (0.1, 10.0),
}
CHOICE: Final[Mapping[str, tuple[str, ...]]] = {"layout": KINDS, "class_start": ("mean", "best")}
FLAG: Final = ("flip",)
PLACES: Final = ("gamma_depth", "gamma_places")
"""Where scale factors sit: `core.diffusion.layout` knows what they may be."""

NAMES: Final = frozenset((*WHOLE, *REAL, *CHOICE, *FLAG, *PLACES))


def are_known(given: Mapping[str, Any]) -> bool:
    """Whether this release has all of the fields and choices; a newer one may have accepted more."""
    chosen = {field: value for field, value in given.items() if field in CHOICE and value not in (None, AUTO)}
    return NAMES.issuperset(given) and all(value in CHOICE[field] for field, value in chosen.items())


class Asker:
    """Reads one request field by field: absent, null where null means nothing, and "auto" take the default."""

    def __init__(self, given: Mapping[str, Any], pointer: str, max_steps: int) -> None:
        self._given = given
        self._pointer = pointer
        self._max_steps = max_steps

    def pointer(self, field: str) -> str:
        return f"{self._pointer}/{field}"

    def refuse_unknown(self) -> None:
        for field in self._given:
            if field not in NAMES:
                raise Invalid(f"{field} is no hyperparameter", pointer=self.pointer(field))

    def is_given(self, field: str) -> bool:
        return self.given(field) is not None

    def given(self, field: str) -> Any:
        value = self._given.get(field)
        return None if value == AUTO else value

    def whole(self, field: str, auto: int) -> int:
        low, high = WHOLE[field]
        return self.whole_within(field, auto, low, self._max_steps if high is None else high)

    def whole_within(self, field: str, auto: int, low: int, high: int) -> int:
        value = self.given(field)
        if value is None:
            return auto
        if type(value) is not int or not low <= value <= high:
            raise Invalid(f"{field} must be a whole number from {low} to {high}, or auto", pointer=self.pointer(field))
        return value

    def optional_whole(self, field: str, auto: int) -> int | None:
        """As `whole`; an explicit null switches the thing off."""
        if field in self._given and self._given[field] is None:
            return None
        return self.whole(field, auto)

    def real(self, field: str, auto: float) -> float:
        low, high = REAL[field]
        value = self.given(field)
        if value is None:
            return auto
        if type(value) not in (int, float) or not math.isfinite(value) or not low <= value <= high:
            raise Invalid(f"{field} must be a number from {low:g} to {high:g}, or auto", pointer=self.pointer(field))
        return float(value)

    def optional_real(self, field: str, auto: float | None) -> float | None:
        if self.given(field) is None:
            return auto
        return self.real(field, 0.0)

    def flag(self, field: str, auto: bool) -> bool:
        value = self.given(field)
        if value is None:
            return auto
        if type(value) is not bool:
            raise Invalid(f"{field} must be true, false or auto", pointer=self.pointer(field))
        return value

    def choice(self, field: str, auto: Any) -> Any:
        among = CHOICE[field]
        value = self.given(field)
        if value is None:
            return auto
        if value not in among:
            raise Invalid(f"{field} must be one of {', '.join(among)}, or auto", pointer=self.pointer(field))
        return value
