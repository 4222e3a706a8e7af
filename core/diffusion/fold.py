"""An adapter written into the weights of a base of one's own: what it then draws needs no adapter any more."""

import torch

from core.diffusion.adapter import Adapter
from core.diffusion.base import Base
from core.diffusion.places import AdaptedNorm, AdaptedTable
from core.errors import Conflict


@torch.no_grad()
def fold(base: Base, adapter: Adapter) -> None:
    """Make `base` the adapted model: weights (1 + δγ) W and biases (1 + δγ)(b + δb), its classes the adapter's.

    The base is another afterwards: never fold into one that anybody else uses. Raises Conflict for an adapter of
    another base. Equal to the adapter unfolded within rounding (tests/diffusion/test_fold.py).
    """
    if adapter.base_fingerprint != base.fingerprint:
        raise Conflict("the adapter was made for another base", code="wrong_base")
    values = adapter.layout.split(adapter.theta.to(base.device, base.dtype))
    for place in base.places():
        name = place.spec.name
        if isinstance(place, AdaptedTable):
            if (offset := values.get(name)) is not None:
                place.table.add_(offset)
            continue
        inner = place.inner
        if (offset := values.get(f"{name}.bias")) is not None and inner.bias is not None:
            inner.bias.add_(offset)
        if isinstance(place, AdaptedNorm):
            if (offset := values.get(f"{name}.weight")) is not None:
                inner.weight.add_(offset)
            continue
        for gamma in place.spec.gammas:
            if (scale := values.get(gamma.name)) is not None:
                inner.weight.mul_((1 + scale).view(-1, *(1,) * (inner.weight.ndim - 1)))
                if inner.bias is not None:
                    inner.bias.mul_(1 + scale)
    if base.row_width:
        starts = base.class_starts(base.start_indices(adapter.classes, adapter.class_start).to(base.device))
        base.set_classes(starts + adapter.class_delta.to(base.device), adapter.classes)
