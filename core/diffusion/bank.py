"""The adapters that are on the device: one row a slot, class rows ragged behind them. Slot 0 is the base."""

import torch
from torch import Tensor

from core.diffusion.adapter import Adapter
from core.diffusion.base import Base
from core.diffusion.layout import AdapterLayout
from core.errors import Conflict, Invalid

BASE_SLOT = 0
NULL_LABEL = -1


class AdapterBank:
    """`slots` adapters of one base, the base itself included; an adapter of a smaller layout is zero elsewhere."""

    def __init__(self, layout: AdapterLayout, base: Base, slots: int, device: torch.device | str | None = None) -> None:
        if slots < 1:
            raise Invalid("a bank has at least one slot, the base's")
        self.layout = layout
        self.base = base
        self.slots = slots
        self.device = torch.device(device) if device is not None else base.device
        self.theta = torch.zeros(slots, layout.size, device=self.device)  # (S, P)
        self._delta = torch.zeros(0, layout.hidden, device=self.device)  # (R, H)
        self._start = torch.zeros(0, dtype=torch.long, device=self.device)  # (R,)
        self._table = _RowTable()
        self._known: dict[frozenset[str], frozenset[str]] = {}
        self._names: list[frozenset[str]] = [frozenset()] * slots
        self.in_use: frozenset[str] = frozenset()  # entries that any resident adapter has: all others are zero
        self.version = 0  # changes whenever the content of a slot does
        self._spans: list[tuple[int, int] | None] = [None] * slots  # (offset, rows with the null row) by slot
        rows = base.num_classes + 1
        self._store(BASE_SLOT, torch.zeros(rows, layout.hidden), torch.arange(rows))

    def load(self, slot: int, adapter: Adapter) -> None:
        """Put an adapter into a slot; whatever the slot held before is gone."""
        self._check(slot)
        if adapter.base_fingerprint != self.base.fingerprint:
            raise Conflict("the adapter was made for another base", code="wrong_base")
        theta = self.layout.embed(adapter.layout, adapter.theta.to(self.device))
        starts = self.base.start_indices(adapter.classes, adapter.class_start)
        self._release(slot)
        self._name(slot, frozenset(adapter.layout.by_name))
        self.theta[slot].copy_(theta)  # whole, whatever was there
        self._store(slot, adapter.class_delta, starts)

    def is_loaded(self, slot: int) -> bool:
        return self._spans[slot] is not None

    def classes(self, slot: int) -> int:
        """How many classes a slot has, the null row not counted."""
        span = self._spans[slot]
        return 0 if span is None else span[1] - 1

    def rows(self, slots: Tensor, scale: Tensor | None = None) -> Tensor:
        """(B, P): the vectors of `slots` (B,), each times its strength."""
        assert not self.theta[BASE_SLOT].any(), "slot 0 is the base and must stay zero"
        rows = self.theta[slots.to(self.device)]
        return rows if scale is None else rows * scale.to(self.device)[:, None]

    def class_rows(
        self, slots: Tensor, labels: Tensor, scale: Tensor | None = None, share: Tensor | None = None
    ) -> Tensor:
        """(B, H): start row plus difference, of class `labels` (B,) of each slot; label -1 is its null row.

        `scale` (B,) is the difference's strength, `share` (B,) the start row's, for rows that are added up.
        """
        where: list[int] = []
        for slot, label in zip(slots.tolist(), labels.tolist(), strict=True):
            span = self._spans[slot]
            if span is None or not NULL_LABEL <= label < span[1] - 1:
                raise Invalid(f"slot {slot} has no class {label}", code="unknown_class")
            where.append(span[0] + (span[1] - 1 if label == NULL_LABEL else label))
        index = torch.tensor(where, device=self.device)
        delta = self._delta[index]
        if scale is not None:
            delta = delta * scale.to(self.device)[:, None]
        start = self.base.class_starts(self._start[index])
        return self.base.class_rows(start if share is None else start * share.to(self.device)[:, None], delta)

    def nbytes(self, adapter: Adapter) -> int:
        """Device bytes of an adapter's share."""
        return 4 * self.layout.size + (4 * self.layout.hidden + 8) * (len(adapter.classes) + 1)

    def _check(self, slot: int) -> None:
        if not 0 < slot < self.slots:
            raise Invalid(f"slot {slot}: adapters live in slots 1 to {self.slots - 1}, slot 0 is the base")

    def _release(self, slot: int) -> None:
        """Give a slot's class rows back, emptied."""
        span, self._spans[slot] = self._spans[slot], None
        if span is not None:
            offset, length = span
            self._delta[offset : offset + length] = 0
            self._table.free(offset, length)

    def _name(self, slot: int, names: frozenset[str]) -> None:
        # One object for equal names: sets of them then compare by identity, which is quick.
        self._names[slot] = self._known.setdefault(names, names)
        self.in_use = frozenset().union(*set(self._names))

    def _store(self, slot: int, delta: Tensor, starts: Tensor) -> None:
        self.version += 1
        length = len(delta)
        offset, capacity = self._table.take(length)
        try:
            self._grow(capacity)
        except RuntimeError:  # no memory: the rows are nobody's
            self._table.free(offset, length)
            raise
        self._delta[offset : offset + length] = delta.to(self.device)
        self._start[offset : offset + length] = starts.to(self.device)
        self._spans[slot] = (offset, length)

    def _grow(self, capacity: int) -> None:
        if capacity <= len(self._delta):
            return
        delta = torch.zeros(capacity, self.layout.hidden, device=self.device)
        delta[: len(self._delta)] = self._delta
        start = torch.zeros(capacity, dtype=torch.long, device=self.device)
        start[: len(self._start)] = self._start
        self._delta, self._start = delta, start


class _RowTable:
    """Which rows of the class table are free: first fit, neighbours joined, grown by doubling."""

    def __init__(self) -> None:
        self._capacity = 0
        self._free: list[tuple[int, int]] = []

    def take(self, length: int) -> tuple[int, int]:
        """An offset for `length` rows, and the capacity that the table needs now."""
        for place, (offset, room) in enumerate(self._free):
            if room >= length:
                self._free[place : place + 1] = [(offset + length, room - length)] if room > length else []
                return offset, self._capacity
        grown = max(2 * self._capacity, self._capacity + length, 64)
        self.free(self._capacity, grown - self._capacity)
        self._capacity = grown
        return self.take(length)

    def free(self, offset: int, length: int) -> None:
        joined: list[tuple[int, int]] = []
        for start, room in sorted([*self._free, (offset, length)]):
            if joined and sum(joined[-1]) == start:
                joined[-1] = (joined[-1][0], joined[-1][1] + room)
            else:
                joined.append((start, room))
        self._free = joined
