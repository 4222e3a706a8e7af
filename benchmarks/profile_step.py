"""`python -m benchmarks.profile_step`: where the time of one denoising step goes, by kinds of work.

`before` is diffusers' own blocks with the adapter's places around their maps, `after` the blocks that are written for
drawing (`core/diffusion/families/dit_block.py`): rows of as many adapters as there are rows. Self time of each operator
on one thread, by torch's profiler. `engine` is what the engine adds: its whole step, with the forward pass taken out.
"""

import argparse
import contextlib
import time
from collections import defaultdict
from collections.abc import Callable
from unittest.mock import patch

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import measure
from benchmarks.bases import SHIPPED, make_base
from benchmarks.mixed_batch import make_engine
from core.diffusion.families.dit import DiTBase

SEED = 0
ROWS = (2, 32)
DTYPES = ("float32", "bfloat16")
KINDS = {
    "matrix products": ("mm", "addmm", "bmm", "convolution", "linear"),
    "attention": ("attention",),
    "norms": ("layer_norm",),
    "copies": ("copy_", "cat", "contiguous", "clone"),
}


def kind_of(operator: str) -> str:
    return next((kind for kind, words in KINDS.items() if any(word in operator for word in words)), "elementwise, rest")


def profiled(run: Callable[[], object], repeats: int) -> dict[str, float]:
    """Milliseconds of a run by kind."""
    run()
    with profile(activities=[ProfilerActivity.CPU]) as found:
        for _ in range(repeats):
            run()
    spent: defaultdict[str, float] = defaultdict(float)
    for row in found.key_averages():
        spent[kind_of(row.key)] += row.self_cpu_time_total / 1000 / repeats
    return dict(spent)


def measured(dtype: str, rows: int, repeats: int) -> dict[str, dict[str, float]]:
    base = make_base(SHIPPED, getattr(torch, dtype))
    assert isinstance(base, DiTBase)
    layout, chance = base.layout(), torch.Generator().manual_seed(SEED)
    x = torch.randn(rows, base.channels, base.sample_size, base.sample_size, generator=chance)
    t, theta = torch.full((rows,), 500.0), 0.02 * torch.randn(rows, layout.size, generator=chance)
    c_rows = torch.randn(rows, layout.hidden, generator=chance)
    found: dict[str, dict[str, float]] = {}
    for name, how in (("before", base.network.plain), ("after", contextlib.nullcontext)):
        with torch.no_grad(), how():
            found[name] = profiled(lambda: base.draw(x, t, theta, c_rows, layout), repeats)
    with torch.no_grad():
        out = base.draw(x, t, theta, c_rows, layout)
    engine = make_engine(base, [str(number) for number in range(rows)])
    with patch.object(base, "draw", lambda *_: out):
        found["after"]["engine"] = 1000 * measure.interleaved({"engine": engine.step}, repeats)["engine"]
    engine.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer repeats; keep nothing")
    args = parser.parse_args()
    torch.set_num_threads(1)
    began = time.perf_counter()
    found: dict[str, dict[str, dict[str, float]]] = {}
    for dtype in DTYPES:
        for rows in ROWS:
            sides = found[f"{dtype}, {rows} rows"] = measured(dtype, rows, 5 if args.quick else 20)
            print(f"{dtype}, {rows} rows: milliseconds of a step", flush=True)
            for kind in [*KINDS, "elementwise, rest", "engine"]:
                cells = [f"{sides[name].get(kind, 0.0):9.2f}" for name in ("before", "after")]
                print(f"  {kind:20}{''.join(cells)}", flush=True)
            totals = [f"{sum(sides[name].values()):9.2f}" for name in ("before", "after")]
            print(f"  {'in all':20}{''.join(totals)}", flush=True)
    rounded = {
        name: {side: {kind: round(ms, 3) for kind, ms in row.items()} for side, row in sides.items()}
        for name, sides in found.items()
    }
    result = {"milliseconds": rounded, "seconds": round(time.perf_counter() - began, 1)}
    measure.record("profile_step", result, SEED, keep=not args.quick)


if __name__ == "__main__":
    main()
