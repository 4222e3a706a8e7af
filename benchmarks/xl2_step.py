"""`python -m benchmarks.xl2_step`: one real training step at the size of DiT-XL/2, DiffFit and full, on the CPU.

Batch 1 at 256 tokens, bfloat16 products. DiffFit holds a bfloat16 base and trains its vector in float32; full
fine-tuning holds float32 weights, both of Adam's moments and an EMA of them, as mixed-precision loops do. Each runs in
a process of its own, one after the other; a side for which the machine has too little memory is left out and says so.
Peak memory is the process's resident set over the steps, program and loaded weights included.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.training_utils import EMAModel

from benchmarks import measure
from benchmarks.bases import LATENT, SHIPPED, make_base, make_transformer
from core.training.data import TrainingData
from core.training.loop import advance, start
from core.training.spec import resolve
from core.training.trainee import Trainee

SEED = 0
SIZE, CLASSES = "XL/2", 4
NEEDED = {"difffit": 6 * 10**9, "full": 17 * 10**9}
"""Bytes that a side may reach: weights are made in float32; full holds them four times and casts them once more."""


def difffit(batch: int) -> tuple[Callable[[], object], int]:
    """A step, and how many parameters it trains."""
    base = make_base(SIZE, torch.bfloat16)
    shape, every = (8, 1, base.channels, LATENT, LATENT), torch.arange(8)
    mean = torch.randn(shape, generator=torch.Generator().manual_seed(SEED))
    names = tuple(f"class-{number}" for number in range(CLASSES))
    data = TrainingData(mean, torch.full(shape, 0.01), every % CLASSES, names, every, every[:0], "latents")
    asked = {"steps": 100, "batch_size": batch, "validation_every": 100}
    spec = resolve(asked, images=len(every), classes=CLASSES, base=base.summary, seed=SEED)
    trainee = Trainee(base, data, spec, start(base, data, spec))
    return lambda: advance(base, [trainee]), len(trainee.state.vector)


def full(batch: int) -> tuple[Callable[[], object], int]:
    """diffusers' training loop with mixed precision: every weight, AdamW, `EMAModel`, clip at 1."""
    model = make_transformer(SIZE, SEED).train()
    parameters = list(model.parameters())
    optimizer, average = torch.optim.AdamW(parameters, lr=1e-4), EMAModel(parameters, decay=0.9999)
    schedule = make_base(SHIPPED).schedule
    latents = torch.randn(batch, 4, LATENT, LATENT)
    labels = torch.arange(batch) % CLASSES

    def step() -> None:
        noise, t = torch.randn_like(latents), torch.randint(0, len(schedule), (batch,))
        noisy = schedule.add_noise(latents, noise, t)
        with torch.autocast("cpu", torch.bfloat16):
            predicted = model(noisy, timestep=t, class_labels=labels).sample
        F.mse_loss(predicted.float(), noise).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        average.step(parameters)

    return step, sum(parameter.numel() for parameter in parameters)


def run(side: str, batch: int, steps: int) -> dict[str, Any]:
    """Seconds of the steps after the first, which also allocates, and the peak over all of them."""
    torch.manual_seed(SEED)
    began = time.perf_counter()
    step, parameters = {"difffit": difffit, "full": full}[side](batch)
    made = time.perf_counter() - began
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    seconds: list[float] = []
    for _ in range(1 + steps):
        began = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - began)
    return {
        "trained_parameters": parameters,
        "seconds_a_step": sorted(seconds[1:])[steps // 2],
        "first_step_seconds": seconds[0],
        "seconds_to_make": made,
        "peak_bytes": memory("/proc/self/status", "VmHWM"),
    }


def memory(file: str, field: str) -> int:
    """Bytes of a line of the kernel's accounts."""
    [line] = [line for line in Path(file).read_text().splitlines() if line.startswith(f"{field}:")]
    return 1024 * int(line.split()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one timed step a side; the result is not kept")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--side", choices=list(NEEDED), help="this side alone, in this process")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    steps = 1 if args.quick else 3
    if args.side:
        print(json.dumps(run(args.side, args.batch, steps)))
        return
    result: dict[str, Any] = {"size": SIZE, "batch_size": args.batch, "tokens": (LATENT // 2) ** 2}
    for side, needed in NEEDED.items():
        free = memory("/proc/meminfo", "MemAvailable")
        if free < needed:
            result[side] = {"left_out": f"{free / 1e9:.1f} GB free of {needed / 1e9:.1f} GB needed"}
            print(f"{side:8} {result[side]['left_out']}", flush=True)
            continue
        command = [sys.executable, "-m", "benchmarks.xl2_step", "--side", side, *sys.argv[1:]]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        row = result[side] = json.loads(done.stdout.splitlines()[-1])
        print(
            f"{side:8} {row['trained_parameters']:11,} parameters, {row['seconds_a_step']:.2f} s a step, "
            f"peak {row['peak_bytes'] / 1e9:.2f} GB",
            flush=True,
        )
    if all("peak_bytes" in result[side] for side in NEEDED):
        result["speedup"] = result["full"]["seconds_a_step"] / result["difffit"]["seconds_a_step"]
        result["memory_ratio"] = result["difffit"]["peak_bytes"] / result["full"]["peak_bytes"]
        print(f"DiffFit: {result['speedup']:.2f}x the speed, {result['memory_ratio']:.2f} of the memory")
    measure.record("xl2_step", result, SEED, keep=not args.quick)


if __name__ == "__main__":
    main()
