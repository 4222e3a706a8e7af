"""The places of a frozen network where an adapter acts: y = (1 + δγ) ⊙ (W x + b + δb), the δ of each row its own."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class ForwardContext:
    """The adapter values of the forward pass that runs now, by entry name: (B, D), or (D,) when all rows share them.

    None is the bare base: the places then add nothing at all.
    """

    values: Mapping[str, Tensor] | None = None
    conditioning: Tensor | None = None  # (B, D)
    sizes: tuple[int, ...] = ()
    compiled: bool = False

    @contextmanager
    def hold(self, values: Mapping[str, Tensor] | None, conditioning: Tensor | None = None) -> Iterator[None]:
        """Set the values for one forward pass; whatever happens, nothing of them stays."""
        self.values, self.conditioning = values, conditioning
        try:
            yield
        finally:
            self.values, self.conditioning = None, None

    @contextmanager
    def training(self, sizes: Sequence[int] = (), compiled: bool = False) -> Iterator[None]:
        """How a training pass is computed.

        `sizes` are the rows of each job in the batch, whose bits shall not depend on the other jobs' rows. `compiled`
        has torch compile what lies between the products, where the family can.
        """
        self.sizes, self.compiled = tuple(sizes), compiled
        try:
            yield
        finally:
            self.sizes, self.compiled = (), False


@dataclass(frozen=True)
class Gamma:
    """A scale factor on a place's output: which option asks for it, and its entry's name."""

    place: str
    name: str
    block: int


@dataclass(frozen=True)
class PlaceSpec:
    """What may be adapted at one module."""

    name: str
    gammas: tuple[Gamma, ...] = field(default=())


class AdaptedAffine(nn.Module):
    """A frozen linear map or patch convolution with a bias offset and output scales."""

    def __init__(self, inner: nn.Linear | nn.Conv2d, spec: PlaceSpec, context: ForwardContext) -> None:
        super().__init__()
        self.inner = inner
        self.spec = spec
        self._context = context
        self._bias = f"{spec.name}.bias"

    def forward(self, x: Tensor) -> Tensor:
        values = self._context.values
        if values is None:
            return self._map(x)
        offset = values.get(self._bias)
        if offset is not None and offset.ndim == 1:
            y = self._shared(x, offset)
        else:
            y = self._map(x)
            if offset is not None:
                wide = self._wide(offset, y)
                # In place saves a pass, but costs one where autograd must replay a write into a view.
                y = y + wide if torch.is_grad_enabled() else y.add_(wide)
        for gamma in self.spec.gammas:
            scale = values.get(gamma.name)
            if scale is not None:
                factor = 1 + self._wide(scale, y)
                y = y * factor if torch.is_grad_enabled() else y.mul_(factor)
        return y

    @property
    def sizes(self) -> tuple[int, ...]:
        """Of the jobs of this pass; none where that does not matter."""
        return self._context.sizes

    def _map(self, x: Tensor) -> Tensor:
        if len(self.sizes) < 2:
            return self.inner(x)
        return torch.cat([self.inner(part) for part in x.split(self.sizes)])

    def _shared(self, x: Tensor, offset: Tensor) -> Tensor:
        """All rows have one offset: it goes into the map's own bias, without a pass over memory of its own."""
        bias = offset if self.inner.bias is None else self.inner.bias + offset
        if isinstance(self.inner, nn.Conv2d):
            return F.conv2d(x, self.inner.weight, bias, self.inner.stride, self.inner.padding)
        return F.linear(x, self.inner.weight, bias)

    def _wide(self, values: Tensor, y: Tensor) -> Tensor:
        """(B, D) or (D,) against an output (B, D), (B, T, D) or (B, D, h, w)."""
        if isinstance(self.inner, nn.Conv2d):
            return values[..., :, None, None]
        return values if values.ndim == 1 or y.ndim == 2 else values.unsqueeze(1)


class AdaptedNorm(nn.Module):
    """A frozen affine layer norm with offsets of its weight and bias."""

    def __init__(self, inner: nn.LayerNorm, spec: PlaceSpec, context: ForwardContext) -> None:
        super().__init__()
        self.inner = inner
        self.spec = spec
        self._context = context

    def forward(self, x: Tensor) -> Tensor:
        values = self._context.values
        y = self.inner(x)
        if values is None:
            return y
        weight, bias = values.get(f"{self.spec.name}.weight"), values.get(f"{self.spec.name}.bias")
        if weight is not None:
            y = y + _tokens(weight) * F.layer_norm(x, self.inner.normalized_shape, eps=self.inner.eps)
        return y if bias is None else y + _tokens(bias)


class AdaptedTable(nn.Module):
    """A frozen table (N, H) of modulation: its offset is added to what the network adds the table to."""

    def __init__(self, table: nn.Parameter, spec: PlaceSpec, context: ForwardContext) -> None:
        super().__init__()
        self.table = table
        self.spec = spec
        self._context = context

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, H) or (B, 1, H), and the offset of each row."""
        offset = None if self._context.values is None else self._context.values.get(self.spec.name)
        return x if offset is None else x + offset


def _tokens(values: Tensor) -> Tensor:
    return values if values.ndim == 1 else values.unsqueeze(1)
