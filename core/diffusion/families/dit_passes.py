"""What a DiT block does to its tokens between matrix products, forward and backward: functions of tensors alone.

`EAGER` runs them as they stand, in place where that saves memory. `compiled()` has torch make one pass over memory of
each (`DIFFFIT_COMPILE`, docs/decisions/0015): the same algebra, other last bits.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from core.errors import Unavailable

_CHUNK = 1 << 16
"""Values that go through GELU at a time on a CPU: its temporaries then stay in the second-level cache."""
_COMPILED_FORMS = 64
"""Of one function: by type, and by the sizes of each base."""
_GELU = 2 * math.sqrt(2 / math.pi)
_CUBE = 0.044715


class Passes(NamedTuple):
    """One set of the functions below; x and its like are (B, T, D), vectors of a row (B, D), inverses (B, T, 1)."""

    modulate: Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor, Tensor]]
    modulate_backward: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
    between: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]
    between_backward: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]]
    activate: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    activate_backward: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    leave: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    leave_backward: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


def modulate(x: Tensor, s: Tensor, h: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """s ⊙ norm(x) + h; the norm; its inverse deviations."""
    normed, _, inverse = torch.native_layer_norm(x, (x.shape[-1],), None, None, eps)
    return torch.addcmul(h.unsqueeze(1), normed, s.unsqueeze(1)), normed, inverse


def modulate_backward(grad: Tensor, normed: Tensor, inverse: Tensor, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients at x, s and h, from that at the output, which is used up."""
    d_s, d_h = _over_tokens(grad, normed), grad.sum(1)
    return _norm_backward(grad.mul_(s.unsqueeze(1)), normed, inverse), d_s, d_h


def between(
    projected: Tensor, b_o: Tensor, x: Tensor, g1: Tensor, s: Tensor, h: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """p = projected + b_o; x₁ = x + g₁ ⊙ p; then as `modulate` of x₁."""
    projected.add_(b_o.unsqueeze(1))
    x1 = torch.addcmul(x, projected, g1.unsqueeze(1))
    return projected, x1, *modulate(x1, s, h, eps)


def between_backward(
    grad: Tensor, normed: Tensor, inverse: Tensor, s: Tensor, through: Tensor, projected: Tensor, g1: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients at x, projected, g₁, b_o, s and h, from those at the modulated x₁, used up, and past it (`through`)."""
    d_x, d_s, d_h = modulate_backward(grad, normed, inverse, s)
    d_x.add_(through)
    return d_x, d_x * g1.unsqueeze(1), _over_tokens(d_x, projected), d_x.sum(1) * g1, d_s, d_h


def activate(u: Tensor, b1: Tensor) -> tuple[Tensor, Tensor]:
    """GELU and its slope at u + b₁; u is used up."""
    return gelu_and_slope(u.add_(b1.unsqueeze(1)))


def activate_backward(grad: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients at u and b₁, from that at the output, which is used up."""
    d_u = grad.mul_(slope)
    return d_u, d_u.sum(1)


def leave(narrowed: Tensor, b2: Tensor, x1: Tensor, g2: Tensor) -> tuple[Tensor, Tensor]:
    """n = narrowed + b₂, and x₁ + g₂ ⊙ n; both inputs are used up."""
    narrowed.add_(b2.unsqueeze(1))
    return narrowed, x1.addcmul_(narrowed, g2.unsqueeze(1))


def leave_backward(grad: Tensor, narrowed: Tensor, g2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients at narrowed, g₂ and b₂."""
    return grad * g2.unsqueeze(1), _over_tokens(grad, narrowed), grad.sum(1) * g2


EAGER = Passes(
    modulate, modulate_backward, between, between_backward, activate, activate_backward, leave, leave_backward
)


@functools.cache
def compiled() -> Passes:
    """The same by torch.compile, for any number of rows; each is compiled at its first call, some seconds."""
    from torch._dynamo import config as dynamo_config  # noqa: PLC0415  # a second, for who compiles
    from torch._functorch import config as functorch_config  # noqa: PLC0415
    from torch._inductor import config as inductor_config  # noqa: PLC0415
    from torch.fx.experimental import _config as fx_config  # noqa: PLC0415

    # What other processes left on disk was made with other numbers of rows in mind, and may sum in another order.
    # Kernels are still found there, by their source: that is what takes the time.
    functorch_config.enable_autograd_cache = False
    inductor_config.fx_graph_cache = False
    fx_config.use_duck_shape = False  # or 16 rows of 16 tokens would be another function than 8 rows of 16
    dynamo_config.recompile_limit = _COMPILED_FORMS  # of which each type and each base's sizes need their own
    plain = EAGER._replace(activate=_activate_at_once)
    return Passes(*(_for_any_rows(torch.compile(function, dynamic=False, fullgraph=True)) for function in plain))


def check_compiler(device: torch.device) -> None:
    """Try what `compiled` needs.

    Raises:
        Unavailable: There is no compiler for the device.
    """
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(2, device=device))
    except Exception as error:  # whichever of torch's compilers it is
        raise Unavailable(
            f"DIFFFIT_COMPILE=true: torch cannot compile for {device}; on a CPU it needs g++ ({error})",
            code="no_compiler",
        ) from error


def _for_any_rows(function: Callable[..., tuple[Tensor, ...]]) -> Callable[..., Any]:
    """torch compiles another function, which may have other last bits, for each kind of argument: here is but one kind.

    A size of one is a kind of its own, so a lone row goes through twice; vectors that lie apart in memory, as those of
    several rows do, are another than those that do not; and so are those that want a gradient, which nobody records.
    All sizes but the number of rows are fixed: what is compiled for any size is compiled with the first one in mind.
    """

    @functools.wraps(function)
    def run(first: Tensor, *others: Tensor | float) -> tuple[Tensor, ...]:
        alone = len(first) == 1
        results = function(*(_bare(arg, alone) if isinstance(arg, Tensor) else arg for arg in (first, *others)))
        return tuple(result[:1] for result in results) if alone else results

    return run


def _bare(arg: Tensor, alone: bool) -> Tensor:
    bare = arg.detach()
    bare = torch.cat([bare, bare]) if alone else bare.contiguous()
    torch._dynamo.mark_dynamic(bare, 0)
    return bare


def _activate_at_once(u: Tensor, b1: Tensor) -> tuple[Tensor, Tensor]:
    """`activate` without its pieces, which a compiler makes better."""
    x = u.float() + b1.unsqueeze(1)
    square = x * x
    share = torch.sigmoid((_GELU + _GELU * _CUBE * square) * x)
    value = x * share
    slope = share + value * (1 - share) * (_GELU + 3 * _GELU * _CUBE * square)
    return value.to(u.dtype), slope.to(u.dtype)


def _norm_backward(grad: Tensor, normed: Tensor, inverse: Tensor) -> Tensor:
    """Gradient at the norm's input, from its output: that of a norm at mean 0 and deviation 1, by the deviation."""
    inner = torch.ops.aten.native_layer_norm_backward(
        grad,
        normed,
        (normed.shape[-1],),
        torch.zeros_like(inverse),
        torch.ones_like(inverse),
        None,
        None,
        (True, False, False),
    )[0]
    return inner.mul_(inverse)


def _over_tokens(a: Tensor, b: Tensor) -> Tensor:
    """Σ_t a b: (B, T, D) twice to (B, D)."""
    return (a * b).sum(1)


def gelu_and_slope(u: Tensor) -> tuple[Tensor, Tensor]:
    """GELU (tanh) and its derivative, of the shape and type of u.

    With σ = sigmoid(k (u + c u³)), k = 2 √(2/π), c = 0.044715: gelu = u σ, gelu' = σ + gelu (1 - σ) k (1 + 3 c u²).
    Torch's two kernels take twice the time of this on a CPU (docs/log.md).
    """
    activated, slope = torch.empty_like(u), torch.empty_like(u)
    k = torch.tensor(_GELU, device=u.device)
    scratch = torch.empty(3, min(u.numel(), _CHUNK) if u.device.type == "cpu" else u.numel(), device=u.device)
    for piece, y, d in zip(*(x.view(-1).split(scratch.shape[1]) for x in (u, activated, slope)), strict=True):
        share, value, square = scratch[:, : len(piece)]
        if u.dtype == torch.float32:
            value, square = y, d  # no copies at the end
        x = piece.float()
        torch.mul(x, x, out=square)
        torch.add(k, square, alpha=_GELU * _CUBE, out=share).mul_(x).sigmoid_()
        torch.mul(x, share, out=value)
        torch.add(k, square, alpha=3 * _GELU * _CUBE, out=square).mul_(value)
        square.addcmul_(square, share, value=-1).add_(share)
        if u.dtype != torch.float32:
            y.copy_(value)
            d.copy_(square)
    return activated, slope


def gelu_(u: Tensor) -> Tensor:
    """GELU (tanh) over u itself, as in `gelu_and_slope`."""
    if u.device.type != "cpu":
        return u.copy_(F.gelu(u, approximate="tanh"))
    for piece in u.view(-1).split(_CHUNK):
        x = piece.float()
        share = (x * x).mul_(_GELU * _CUBE).add_(_GELU).mul_(x).sigmoid_()
        piece.copy_(share.mul_(x)) if piece.dtype != torch.float32 else torch.mul(share, x, out=piece)
    return u
