"""An adapter: one flat vector of differences and the differences of its class rows, on one base."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from core.diffusion.base import Base
from core.diffusion.layout import AdapterLayout
from core.errors import Invalid


@dataclass(frozen=True, eq=False)
class Adapter:
    """Zero everywhere is the base with each class at its start row."""

    layout: AdapterLayout
    base_fingerprint: str
    theta: Tensor  # (P,) float32
    class_delta: Tensor  # (C + 1, H) float32; the last row is the null row's
    classes: tuple[str, ...]
    class_start: tuple[int | None, ...]  # the base's class that a row starts from; None is the mean of all
    meta: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        wanted = (len(self.classes) + 1, self.layout.hidden)
        if tuple(self.theta.shape) != (self.layout.size,) or tuple(self.class_delta.shape) != wanted:
            raise Invalid(f"the adapter needs {self.layout.size} values and class rows of shape {list(wanted)}")
        if len(self.class_start) != len(self.classes):
            raise Invalid(f"class_start names {len(self.class_start)} rows for {len(self.classes)} classes")

    @classmethod
    def zero(
        cls,
        layout: AdapterLayout,
        base: Base,
        classes: Sequence[str],
        class_start: Sequence[int | None] | None = None,
    ) -> "Adapter":
        """The adapter that changes nothing."""
        return cls(
            layout,
            base.fingerprint,
            torch.zeros(layout.size),
            torch.zeros(len(classes) + 1, layout.hidden),
            tuple(classes),
            tuple(class_start) if class_start is not None else (None,) * len(classes),
        )

    @property
    def parameter_count(self) -> int:
        return self.layout.parameter_count(len(self.classes))
