"""A DiT block for training and for drawing: the same function as diffusers' block, with a backward written by hand.

The weights are frozen, so no linear map needs its input again, and an adapter's offsets and scales are vectors of a
row: all that autograd would keep and pass over once more is left out. γ on attention and MLP multiplies adaLN's gate,
which costs nothing. Where nothing is recorded the same algebra runs in place: mixed rows then cost what one adapter's
cost. Equal to the plain block within float32's rounding (tests/diffusion/test_dit_block.py).
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from core.diffusion.families.dit_passes import Passes, gelu_
from core.diffusion.places import AdaptedAffine
from core.diffusion.products import product

_FEW_TOKENS = 128


class TrainingBlock:
    """One `BasicTransformerBlock` of adaLN-Zero, seen through its adapted places."""

    def __init__(self, block: Any) -> None:
        attention, mlp = block.attn1, block.ff.net
        self._modulation: nn.Module = block.norm1.linear
        self._qkv: tuple[AdaptedAffine, ...] = (attention.to_q, attention.to_k, attention.to_v)
        self._projection: AdaptedAffine = attention.to_out[0]
        self._widen: AdaptedAffine = mlp[0].proj
        self._narrow: AdaptedAffine = mlp[2]
        self._heads: int = attention.heads
        self._eps = block.norm1.norm.eps, block.norm3.eps
        self._qkv_weight = _join([place.inner for place in self._qkv])  # (3 D, D)

    @staticmethod
    def supports(block: Any) -> bool:
        """Whether a block is the one that is written out here."""
        attention = block.attn1
        return (
            block.norm_type == "ada_norm_zero"
            and block.attn2 is None
            and isinstance(block.norm3, nn.LayerNorm)  # with weights of its own it would be an AdaptedNorm
            and type(block.ff.net[0]).__name__ == "GELU"
            and block.ff.net[0].approximate == "tanh"
            and type(attention.processor).__name__ == "AttnProcessor2_0"
            and attention.norm_q is attention.norm_k is attention.spatial_norm is attention.group_norm is None
            and not attention.residual_connection
            and attention.rescale_output_factor == 1.0
        )

    def __call__(self, x: Tensor, conditioning: Tensor, values: Mapping[str, Tensor], passes: Passes) -> Tensor:
        """x (B, T, D) and SiLU of the conditioning (B, D) to (B, T, D)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self._modulation(conditioning).chunk(6, dim=1)  # (B, D) each
        offset = torch.cat([_offset(place, values, x) for place in self._qkv], dim=1)  # (B, 3 D)
        sizes = self._projection.sizes
        # (B, T, 3 D)
        qkv = _Enter.apply(x, 1 + scale1, shift1, offset, self._qkv_weight, self._eps[0], sizes, passes)
        assert isinstance(qkv, Tensor)
        if any(_scale(place, values) is not None for place in self._qkv):
            qkv = qkv * torch.cat([_wide_scale(place, values, x) for place in self._qkv], dim=1).unsqueeze(1)
        mixed = _attend(qkv, self._heads)  # (B, T, D)
        y = _Leave.apply(
            mixed,
            x,
            _gated(gate1, self._projection, values),
            _offset(self._projection, values, x),
            1 + scale2,
            shift2,
            _offset(self._widen, values, x),
            None if _scale(self._widen, values) is None else _wide_scale(self._widen, values, x),
            _offset(self._narrow, values, x),
            _gated(gate2, self._narrow, values),
            self._projection.inner.weight,
            self._widen.inner.weight,
            self._narrow.inner.weight,
            self._eps[1],
            sizes,
            passes,
        )
        assert isinstance(y, Tensor)
        return y

    def draw(self, x: Tensor, conditioning: Tensor, values: Mapping[str, Tensor]) -> Tensor:
        """The same without a record, over x itself. Rows of zeros give the bits that no values give."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self._modulation(conditioning).chunk(6, dim=1)  # (B, D) each
        inner = torch.addcmul(_wide(shift1), F.layer_norm(x, x.shape[-1:], eps=self._eps[0]), _wide(1 + scale1))
        offset = torch.cat([_offset(place, values, x) for place in self._qkv], dim=1)  # (B, 3 D)
        qkv = (inner @ self._qkv_weight.t()).add_(_wide(offset))  # (B, T, 3 D)
        if any(_scale(place, values) is not None for place in self._qkv):
            qkv.mul_(_wide(torch.cat([_wide_scale(place, values, x) for place in self._qkv], dim=1)))
        mixed = _attention(qkv, self._heads)  # (B, T, D)
        projected = (mixed @ self._projection.inner.weight.t()).add_(_wide(_offset(self._projection, values, x)))
        x.addcmul_(projected, _wide(_gated(gate1, self._projection, values)))
        inner = torch.addcmul(_wide(shift2), F.layer_norm(x, x.shape[-1:], eps=self._eps[1]), _wide(1 + scale2))
        widened = (inner @ self._widen.inner.weight.t()).add_(_wide(_offset(self._widen, values, x)))  # (B, T, 4 D)
        if _scale(self._widen, values) is not None:
            widened.mul_(_wide(_wide_scale(self._widen, values, x)))
        narrowed = gelu_(widened) @ self._narrow.inner.weight.t()
        narrowed.add_(_wide(_offset(self._narrow, values, x)))
        return x.addcmul_(narrowed, _wide(_gated(gate2, self._narrow, values)))


def _wide(vectors: Tensor) -> Tensor:
    """Vectors of a row (B, D) against its tokens (B, T, D)."""
    return vectors.unsqueeze(1)


def _join(maps: list[nn.Linear | nn.Conv2d]) -> Tensor:
    """The maps' weights as one, of which each map from now on holds a part: no byte more than before."""
    joined = torch.cat([inner.weight for inner in maps]).detach()
    for inner, weight in zip(maps, joined.chunk(len(maps)), strict=True):
        inner.weight = nn.Parameter(weight, requires_grad=False)
    return joined


def _offset(place: AdaptedAffine, values: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """The map's own bias and the rows' offsets, (B, D)."""
    delta, bias = values.get(f"{place.spec.name}.bias"), place.inner.bias
    if delta is None:
        delta = x.new_zeros(place.inner.weight.shape[0])
    return (delta if bias is None else bias + delta).expand(len(x), -1)


def _scale(place: AdaptedAffine, values: Mapping[str, Tensor]) -> Tensor | None:
    """Π (1 + δγ) of a place, (B, D) or (D,); None where it has none."""
    product: Tensor | None = None
    for gamma in place.spec.gammas:
        if gamma.name in values:
            factor = 1 + values[gamma.name]
            product = factor if product is None else product * factor
    return product


def _wide_scale(place: AdaptedAffine, values: Mapping[str, Tensor], x: Tensor) -> Tensor:
    scale = _scale(place, values)
    return (x.new_ones(place.inner.weight.shape[0]) if scale is None else scale).expand(len(x), -1)


def _gated(gate: Tensor, place: AdaptedAffine, values: Mapping[str, Tensor]) -> Tensor:
    scale = _scale(place, values)
    return gate if scale is None else gate * scale


class _Enter(torch.autograd.Function):
    """W (s ⊙ norm(x) + h) + b: what goes into attention. Vectors of a row are (B, ·), x is (B, T, D)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        s: Tensor,
        h: Tensor,
        b: Tensor,
        weight: Tensor,
        eps: float,
        sizes: tuple[int, ...],
        passes: Passes,
    ) -> Tensor:
        inner, normed, inverse = passes.modulate(x, s, h, eps)
        ctx.save_for_backward(normed, inverse, s, weight)
        ctx.sizes, ctx.passes = sizes, passes
        return product(inner, weight.t(), sizes).add_(b.unsqueeze(1))  # (B, T, 3 D)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]  # torch's own manner
        normed, inverse, s, weight = ctx.saved_tensors
        inner = product(grad, weight, ctx.sizes)  # (B, T, D)
        d_x, d_s, d_h = ctx.passes.modulate_backward(inner, normed, inverse, s)
        return d_x, d_s, d_h, grad.sum(1), None, None, None, None


def _attend(qkv: Tensor, heads: int) -> Tensor:
    """Attention of (B, T, 3 D) to (B, T, D)."""
    is_slow = qkv.device.type == "cpu" and (qkv.dtype == torch.bfloat16 or qkv.shape[1] <= _FEW_TOKENS)
    if not is_slow:
        return _attention(qkv, heads)
    mixed = _Attend.apply(qkv, heads)
    assert isinstance(mixed, Tensor)
    return mixed


def _attention(qkv: Tensor, heads: int) -> Tensor:
    q, k, v = _heads(qkv, heads)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def _heads(qkv: Tensor, heads: int) -> Tensor:
    """(B, T, 3 D) as (3, B, heads, T, D / heads)."""
    return qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)


class _Attend(torch.autograd.Function):
    """torch's attention with a backward of plain matrix products: its own is slow on CPUs (docs/log.md)."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, heads: int) -> Tensor:
        ctx.save_for_backward(qkv)
        ctx.heads = heads
        return _attention(qkv, heads)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]  # torch's own manner
        [qkv] = ctx.saved_tensors
        heads: int = ctx.heads
        q, k, v = _heads(qkv, heads).flatten(1, 2).contiguous()  # (B heads, T, D / heads) each
        grad = grad.unflatten(-1, (heads, -1)).transpose(1, 2).flatten(0, 1)
        scale, nothing = q.shape[-1] ** -0.5, q.new_zeros(())
        shares = torch.baddbmm(nothing, q, k.mT, beta=0, alpha=scale).softmax(-1)  # (B heads, T, T)
        inner = torch.ops.aten._softmax_backward_data(grad @ v.mT, shares, -1, shares.dtype)
        d_qkv = q.new_empty(3, *q.shape)  # (3, B heads, T, D / heads)
        torch.baddbmm(nothing, inner, k, beta=0, alpha=scale, out=d_qkv[0])
        torch.baddbmm(nothing, inner.mT, q, beta=0, alpha=scale, out=d_qkv[1])
        torch.bmm(shares.mT, grad, out=d_qkv[2])
        return d_qkv.unflatten(1, (-1, heads)).permute(1, 3, 0, 2, 4).flatten(2), None


class _Leave(torch.autograd.Function):
    """From attention's output `mixed` and the block's input x to the block's output.

    x₁ = x + g₁ ⊙ (W_o mixed + b_o);  u = W₁ (s ⊙ norm(x₁) + h) + b₁;  y = x₁ + g₂ ⊙ (W₂ gelu(c ⊙ u) + b₂)

    c (B, 4 D) is None where nothing scales the hidden values: what its gradient needs is then not kept.
    """

    @staticmethod
    def forward(
        ctx: Any,
        mixed: Tensor,
        x: Tensor,
        g1: Tensor,
        b_o: Tensor,
        s: Tensor,
        h: Tensor,
        b1: Tensor,
        c: Tensor | None,
        b2: Tensor,
        g2: Tensor,
        w_o: Tensor,
        w1: Tensor,
        w2: Tensor,
        eps: float,
        sizes: tuple[int, ...],
        passes: Passes,
    ) -> Tensor:
        projected = product(mixed, w_o.t(), sizes)
        projected, x1, inner, normed, inverse = passes.between(projected, b_o, x, g1, s, h, eps)
        widened = product(inner, w1.t(), sizes)  # (B, T, 4 D)
        scaled = (widened, b1) if c is None else (widened * c.unsqueeze(1), c * b1)
        activated, slope = passes.activate(*scaled)  # (B, T, 4 D) each
        narrowed, y = passes.leave(product(activated, w2.t(), sizes), b2, x1, g2)
        hidden = () if c is None else (widened, b1, c)
        ctx.save_for_backward(projected, g1, normed, inverse, s, slope, narrowed, g2, w_o, w1, w2, *hidden)
        ctx.sizes, ctx.passes = sizes, passes
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]  # torch's own manner
        projected, g1, normed, inverse, s, slope, narrowed, g2, w_o, w1, w2, *hidden = ctx.saved_tensors
        passes: Passes = ctx.passes
        inner, d_g2, d_b2 = passes.leave_backward(grad, narrowed, g2)
        inner, d_b1 = passes.activate_backward(product(inner, w2, ctx.sizes), slope)  # (B, T, 4 D)
        d_c = None
        if hidden:
            widened, b1, c = hidden
            d_c = (inner * widened).sum(1).addcmul_(d_b1, b1)
            inner, d_b1 = inner.mul_(c.unsqueeze(1)), d_b1 * c
        inner = product(inner, w1, ctx.sizes)  # (B, T, D)
        d_x, inner, d_g1, d_bo, d_s, d_h = passes.between_backward(inner, normed, inverse, s, grad, projected, g1)
        d_mixed = product(inner, w_o, ctx.sizes)
        return d_mixed, d_x, d_g1, d_bo, d_s, d_h, d_b1, d_c, d_b2, d_g2, None, None, None, None, None, None
