"""`python -m benchmarks.cotrain`: eight tenants' jobs in one pass over one base, against one after the other.

Eight jobs of batch 4 with data, class counts and learning rates of their own, on the shipped base. Timed: a step of all
eight, as one pass (`advance` on eight) and as eight passes (`advance` on each), by turns. Then what must hold: on
one thread every adapter is bit-equal to its solo run after 50 steps, in both types; a job fed NaN fails alone, and its
neighbours' vectors are those of a run without it.
"""

import argparse

import torch

from benchmarks import measure
from core.diffusion.base import Base
from core.diffusion.families import load_base
from core.settings import PACKAGED_BASE
from core.training.data import TrainingData
from core.training.loop import advance, start
from core.training.machine import numeric_path
from core.training.spec import resolve
from core.training.trainee import Diverged, Trainee

SEED = 0
JOBS, BATCH = 8, 4
POISONED = 3


def make_data(base: Base, job: int) -> TrainingData:
    """Stand-in latents: what a step costs and whether bits agree does not depend on what they show."""
    chance = torch.Generator().manual_seed(SEED + job)
    count, classes = 24 + job, 2 + job % 4
    shape = (count, 1, base.channels, base.sample_size, base.sample_size)
    names = tuple(f"class-{number}" for number in range(classes))
    every = torch.arange(count)
    mean = torch.randn(shape, generator=chance)
    return TrainingData(mean, torch.full(shape, 0.01), every % classes, names, every, every[:0], f"data-{job}")


def make_trainees(base: Base, steps: int, numbers: range | list[int] = range(JOBS)) -> list[Trainee]:
    trainees: list[Trainee] = []
    for job in numbers:
        data = make_data(base, job)
        asked = {"steps": steps, "batch_size": BATCH, "learning_rate": 1e-3 * (1 + job), "validation_every": steps}
        spec = resolve(asked, images=len(data.labels), classes=len(data.classes), base=base.summary, seed=SEED + job)
        trainees.append(Trainee(base, data, spec, start(base, data, spec), numeric_path(base, spec)))
    return trainees


def speed(base: Base, repeats: int) -> float:
    """How much quicker one pass is."""
    together, alone = make_trainees(base, 10_000), make_trainees(base, 10_000)
    seconds = measure.interleaved(
        {"one": lambda: advance(base, together), "each": lambda: [advance(base, [trainee]) for trainee in alone]},
        repeats,
    )
    ratio = seconds["each"] / seconds["one"]
    print(f"{base.dtype}: one pass {seconds['one']:.3f} s, one after the other {seconds['each']:.3f} s: {ratio:.2f}x")
    return ratio


def solo_difference(base: Base, steps: int) -> float:
    """Largest difference of any job's vector from its solo run's."""
    together, alone = make_trainees(base, steps), make_trainees(base, steps)
    for _ in range(steps):
        advance(base, together)
        for trainee in alone:
            advance(base, [trainee])
    return max(
        float((one.state.vector - other.state.vector).abs().max()) for one, other in zip(together, alone, strict=True)
    )


def poison(base: Base, steps: int) -> bool:
    """Whether a job fed NaN fails, and alone: its neighbours end as in a run without it."""
    others = [job for job in range(JOBS) if job != POISONED]
    clean, mixed = make_trainees(base, steps, others), make_trainees(base, steps)
    bad = mixed.pop(POISONED)
    bad.data.mean.fill_(float("nan"))
    results = advance(base, [*mixed[:POISONED], bad, *mixed[POISONED:]])
    failed = [isinstance(result, Diverged) for result in results]
    advance(base, clean)
    for _ in range(steps - 1):
        advance(base, mixed)
        advance(base, clean)
    is_same = all(torch.equal(a.state.vector, b.state.vector) for a, b in zip(mixed, clean, strict=True))
    return failed == [job == POISONED for job in range(JOBS)] and is_same


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer repeats, 10 steps; keep nothing")
    parser.add_argument("--keep", action="store_true", help="with --quick: keep the result nevertheless")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    repeats, steps = (5, 10) if args.quick else (15, 50)
    torch.set_num_threads(args.threads)
    base = load_base(PACKAGED_BASE)
    half = load_base(PACKAGED_BASE, dtype=torch.bfloat16)
    base_bytes = measure.nbytes(base.network.parameters())
    result = {
        "throughput_ratio": speed(base, repeats),
        "throughput_ratio_bf16": speed(half, repeats),
        "solo_difference": solo_difference(base, steps),
        "solo_difference_bf16": solo_difference(half, steps),
        "poisoned_job_fails_alone": poison(base, 5),
        "jobs": JOBS,
        "batch_size": BATCH,
        "steps": steps,
        "base_bytes": base_bytes,
        "base_bytes_of_eight_processes": JOBS * base_bytes,
    }
    differs = max(result["solo_difference"], result["solo_difference_bf16"])
    print(f"after {steps} steps every adapter differs from its solo run by at most {differs}")
    measure.record("cotrain", result, SEED, keep=args.keep or not args.quick)


if __name__ == "__main__":
    main()
