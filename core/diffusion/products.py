"""Matrix products of several jobs' rows in one pass: a row gets the bits that it gets without the others.

Which kernel a product takes, and with it the order of its sums, may follow the number of rows: in bfloat16 for most
shapes, in float32 for some (docs/decisions/0014). So a product of all rows is taken only where, on this machine and
for these very shapes, it has the bits of products job by job.
"""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor


def product(x: Tensor, weight: Tensor, sizes: Sequence[int]) -> Tensor:
    """x @ weight of (B, T, D) and (D, E), on a CPU where `sizes`, each job's rows of the B, name more than one."""
    if len(sizes) < 2:
        return x @ weight
    tokens = x.shape[1]
    if has_bits_of_its_parts(tuple(weight.shape), weight.stride(), weight.dtype, tuple(tokens * n for n in sizes)):
        return x @ weight
    y = x.new_empty(*x.shape[:-1], weight.shape[1])
    for part, out in zip(x.split(tuple(sizes)), y.split(tuple(sizes)), strict=True):
        torch.mm(part.flatten(0, 1), weight, out=out.view(-1, out.shape[-1]))
    return y


@functools.lru_cache(maxsize=4096)
def has_bits_of_its_parts(
    shape: tuple[int, int], stride: tuple[int, ...], dtype: torch.dtype, rows: tuple[int, ...]
) -> bool:
    """Whether one product of so many rows equals, bit for bit, a product of each part: tried once, on noise."""
    chance = torch.Generator().manual_seed(0)
    weight = torch.empty_strided(shape, stride, dtype=dtype).normal_(generator=chance)
    x = torch.empty(sum(rows), shape[0], dtype=dtype).normal_(generator=chance)
    return torch.equal(x @ weight, torch.cat([part @ weight for part in x.split(rows)]))


def is_quick_at_bfloat16(device: torch.device) -> bool:
    """Whether a step of training is much quicker in bfloat16 (docs/decisions/0014)."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and torch.cpu.get_capabilities().get("avx512_bf16", False)
