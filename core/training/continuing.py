"""A job that begins where an adapter or a checkpoint ended: its vector, and the rows of the classes that both have."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from core.adapters import format as adapter_format
from core.diffusion.base import Base
from core.errors import Invalid
from core.training import checkpoint
from core.training.data import TrainingData
from core.training.loop import start
from core.training.spec import TrainSpec
from core.training.trainee import TrainState, layout_of


@dataclass(frozen=True, eq=False)
class Source:
    """What is gone on from: averaged weights, as one has seen them drawn."""

    theta: Tensor  # (P,)
    table: Tensor  # (C + 1, H), the null row last
    classes: tuple[str, ...]
    class_start: tuple[int | None, ...]


def read_adapter(data: bytes, base: Base, spec: TrainSpec) -> Source:
    """Raises DomainError for bytes that are no adapter of this base and layout."""
    adapter = adapter_format.load(data, base_fingerprint=base.fingerprint)
    if adapter.layout != layout_of(base, spec):
        raise Invalid("the adapter has another layout than the job", code="wrong_layout")
    return Source(adapter.theta, adapter.class_delta, adapter.classes, adapter.class_start)


def read_checkpoint(data: bytes, base: Base, spec: TrainSpec, classes: Sequence[str]) -> Source:
    """Raises DomainError for bytes that are no checkpoint of this layout and so many classes."""
    state = checkpoint.read(data)
    layout = layout_of(base, spec)
    if len(state.average) != layout.parameter_count(len(classes)) or len(state.class_start) != len(classes):
        raise Invalid("the checkpoint has another layout than the job", code="wrong_layout")
    return Source(*layout.pieces(state.average, len(classes)), tuple(classes), state.class_start)


def continued(
    base: Base, data: TrainingData, spec: TrainSpec, source: Source, moved: Callable[[], None] = lambda: None
) -> TrainState:
    """The state before the first step: the source's, but for classes that it has not; moments and step anew."""
    state = start(base, data, spec, moved)
    theta, table = layout_of(base, spec).pieces(state.vector, len(data.classes))
    starts = list(state.class_start)
    theta.copy_(source.theta)
    table[-1] = source.table[-1].to(base.device)
    for number, name in enumerate(data.classes):
        if name in source.classes:
            known = source.classes.index(name)
            table[number] = source.table[known].to(base.device)
            starts[number] = source.class_start[known]
    state.average.copy_(state.vector)
    state.class_start = tuple(starts)
    return state
