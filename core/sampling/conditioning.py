"""What each row of a pass is conditioned by: slots of the bank, added up to one vector and one class row a row."""

from collections.abc import Sequence

import torch
from torch import Tensor

from core.diffusion.bank import BASE_SLOT, NULL_LABEL, AdapterBank
from core.sampling.row import Term

_PADDING = [Term(BASE_SLOT, NULL_LABEL, 1.0, 1.0)]


class Conditioning:
    """The last answer is kept: while the same rows go on, and no slot changes, so does what they are conditioned by.

    With `buckets` there are as many rows as the next of these numbers, the last of them for padding.
    """

    def __init__(self, bank: AdapterBank, buckets: Sequence[int] = ()) -> None:
        self._bank = bank
        self._buckets = sorted(buckets)
        self._kept: tuple[object, Tensor | None, Tensor] | None = None

    def of(self, branches: Sequence[Sequence[Term]]) -> tuple[Tensor | None, Tensor]:
        """Vectors (B, P), None where all are the base's, and class rows (B, H); a branch is the terms of one row."""
        size = next((size for size in self._buckets if size >= len(branches)), len(branches))
        padded = [*branches, *[_PADDING] * (size - len(branches))]
        key = (self._bank.version, tuple(map(tuple, padded)))
        if self._kept is None or self._kept[0] != key:
            self._kept = (key, *self._sum(padded))
        return self._kept[1], self._kept[2]

    def _sum(self, branches: Sequence[Sequence[Term]]) -> tuple[Tensor | None, Tensor]:
        terms = [term for branch in branches for term in branch]
        slots, labels, weights, shares = (torch.tensor(column) for column in zip(*terms, strict=True))  # (T,) each
        theta = self._bank.rows(slots, weights) if bool(slots.any()) else None  # (T, P)
        c_rows = self._bank.class_rows(slots, labels, weights, shares)  # (T, H)
        if len(terms) == len(branches):
            return theta, c_rows
        owner = torch.tensor([number for number, branch in enumerate(branches) for _ in branch]).to(c_rows.device)
        return None if theta is None else _added(theta, owner, len(branches)), _added(c_rows, owner, len(branches))


def _added(terms: Tensor, owner: Tensor, count: int) -> Tensor:
    """(B, ·) of terms (T, ·), each added to the row that owns it."""
    return terms.new_zeros(count, terms.shape[1]).index_add_(0, owner, terms)
