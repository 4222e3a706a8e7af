"""One training with its drawings and distances: the unit that benchmarks cache, and run two at a time.

A cell is named by what it depends on: its settings, the base's fingerprint and the domain's digest. Kept cells are
read, not run; a run that was stopped goes on where it was.
"""

import functools
import hashlib
import json
import math
import multiprocessing
import os
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np

from core.diffusion.catalog import fingerprint
from core.sampling.request import Guidance

VERSION = 1  # of what a cell does: raise it and every kept cell is stale
AUTO_VERSION = 3  # of what `auto` chooses: raise it and every kept cell without a rate of its own is
RESULTS = Path(__file__).parent / "results" / "table"
SHEETS = Path(__file__).parent / ".work" / "sheets"
BASE = Path(__file__).parent.parent / "models" / "emoji-dit-64"

Way = Guidance | Literal["cfg-across", "domain-across"]
Draw = tuple[Way, float]
MAIN: Draw = ("cfg", 3.0)  # the service's default
DOMAIN: Draw = ("domain", 2.0)
Recipe = Literal["paper", "service"]
"""`paper`: a constant rate, uniform times, float32. `service`: as its jobs train: the rate falls, times are shifted,
products in bfloat16 (as jobs have them on CPUs that are quick at it, docs/decisions/0014)."""


@dataclass(frozen=True)
class Cell:
    """`against` is the domain's part that the pictures are measured by; `watch` lists steps to measure at besides."""

    domain: str
    method: str
    learning_rate: float | None  # None: the service's auto
    steps: int | None  # None: the service's auto
    batch_size: int
    seed: int
    train_images: int
    against: str
    pictures: int
    draws: tuple[Draw, ...]
    watch: tuple[int, ...] = ()
    recipe: Recipe = "paper"

    def name(self, base_fingerprint: str, domain_digest: str) -> str:
        is_given = self.learning_rate is not None and self.recipe == "paper"
        version = [VERSION] if is_given or self.method == "base" else [VERSION, AUTO_VERSION]
        settings = asdict(self)
        if self.recipe == "paper":
            del settings["recipe"]  # as the cells are named that were kept before there was another
        body = json.dumps([*version, base_fingerprint, domain_digest, settings], sort_keys=True)
        rate = "auto" if self.learning_rate is None else f"{self.learning_rate:g}"
        short = hashlib.sha256(body.encode()).hexdigest()[:10]
        return f"{self.domain}-{self.method}-{rate}-s{self.seed}-n{self.train_images}-{short}"


Result = dict[str, Any]


def at(result: Result, draw: Draw) -> Result:
    """What was measured of pictures that were drawn so."""
    return next(one for one in result["draws"] if (one["guidance"], one["scale"]) == draw)


def kernel(draw: Result) -> float:
    return draw["kernel_distance"]["value"]


def log_distance(distance: float) -> float:
    """Of an unbiased estimate, which may fall below zero."""
    return math.log(max(distance, 1e-3))


@dataclass(frozen=True)
class Place:
    """Where cells are kept, and what they rest on."""

    base: Path
    base_fingerprint: str
    results: Path
    digests: dict[str, str]  # of each domain

    @classmethod
    def open(cls, base: Path, names: Iterable[str], results: Path = RESULTS) -> "Place":
        from benchmarks import domains  # noqa: PLC0415  # numpy and the icons, for who runs cells

        digests = {name: domains.load(name).digest for name in names}
        return cls(base, fingerprint(base), results, digests)

    def path(self, cell: Cell) -> Path:
        name = cell.name(self.base_fingerprint, self.digests[cell.domain])
        return self.results / self.base_fingerprint[:12] / f"{name}.json"

    def find(self, cell: Cell) -> Result | None:
        path = self.path(cell)
        return json.loads(path.read_text()) if path.exists() else None


def run_cells(place: Place, cells: Sequence[Cell], workers: int = 2) -> list[Result]:
    """The cells' results in order; those that are missing run on `workers` processes of one thread each.

    With no worker they are only read: a missing one is a `FileNotFoundError`.
    """
    missing = list(dict.fromkeys(cell for cell in cells if place.find(cell) is None))
    if missing and not workers:
        raise FileNotFoundError(f"{len(missing)} cells are not kept in {place.results}: run without --quick first")
    began = time.monotonic()
    if missing:
        # A process a cell: peak memory is then its own. Two cells of one method in a row would share a heap.
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, mp_context=context, max_tasks_per_child=1) as pool:
            futures = {pool.submit(_run_and_keep, place, cell): cell for cell in missing}
            for done, future in enumerate(as_completed(futures), 1):
                result, cell = future.result(), futures[future]
                spent = time.monotonic() - began
                left = spent / done * (len(missing) - done)
                kernel = result["draws"][-1]["kernel_distance"]
                rate = "auto" if cell.learning_rate is None else f"{cell.learning_rate:g}"
                print(
                    f"[{done}/{len(missing)}] {cell.domain} {cell.method} rate {rate} seed {cell.seed} "
                    f"n {cell.train_images}: KID {kernel['value']:.1f} ± {kernel['error']:.1f}, "
                    f"{result['seconds']:.0f} s; {left / 60:.0f} min left",
                    flush=True,
                )
    results = [place.find(cell) for cell in cells]
    assert all(result is not None for result in results)
    return [result for result in results if result is not None]


def _run_and_keep(place: Place, cell: Cell) -> Result:
    os.environ["OMP_NUM_THREADS"] = "1"
    result = run_cell(place, cell)
    path = place.path(cell)
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_suffix(f".{os.getpid()}")
    staged.write_text(json.dumps(result, indent=1) + "\n")
    staged.replace(path)
    return result


def run_cell(place: Place, cell: Cell) -> Result:
    """Train, draw, measure. Runs in a process of its own: torch is imported here first."""
    import torch  # noqa: PLC0415

    from benchmarks import domains, methods  # noqa: PLC0415
    from core.diffusion.families import load_base  # noqa: PLC0415

    torch.set_num_threads(1)
    began = time.perf_counter()
    domain = domains.load(cell.domain)
    if fingerprint(place.base) != place.base_fingerprint or domain.digest != place.digests[cell.domain]:
        raise RuntimeError("the base or the domain has changed since the run began: start it again")
    base = load_base(place.base)
    pool = domain.train + domain.tune if cell.train_images > len(domain.train) else domain.train
    pictures = pool.head(cell.train_images)
    data = methods.training_data(base, domain, pictures)
    asked = methods.Asked(cell.method, cell.steps, cell.batch_size, cell.learning_rate, cell.seed, recipe=cell.recipe)
    null = methods.null_of(base)
    draws: list[Result] = []

    def measure(step: int, predict: methods.Predict) -> None:
        for guidance, scale in cell.draws:
            draws.append(
                {
                    "step": step,
                    "guidance": guidance,
                    "scale": scale,
                    **_measured(cell, base, domain, predict, null, guidance, scale),
                }
            )

    def watch(step: int, predict: methods.Predict) -> None:
        if step in cell.watch:
            measure(step, predict)

    every = functools.reduce(np.gcd, cell.watch) if cell.watch else 0
    adapted = methods.adapt(place.base, base, data, asked, watch if cell.watch else None, int(every))
    measure(len(adapted.losses), adapted.predict)
    tail = adapted.losses[-50:]
    return {
        "cell": asdict(cell),
        "version": VERSION,
        "base_fingerprint": place.base_fingerprint,
        "domain_digest": domain.digest,
        "steps": len(adapted.losses),
        "learning_rate": methods.spec_of(asked, base.summary, len(pictures), len(domain.classes)).learning_rate,
        "parameters": adapted.parameters,
        "file_bytes": adapted.file_bytes,
        "train_seconds": round(adapted.train_seconds, 2),
        "peak_bytes": adapted.peak_bytes,
        "last_loss": sum(tail) / len(tail) if tail else None,
        "draws": draws,
        "seconds": round(time.perf_counter() - began, 1),
        "torch": torch.__version__,
        "device": "cpu",
        "threads": 1,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _measured(cell: Cell, base, domain, predict, null, guidance: Way, scale: float) -> Result:  # noqa: ANN001
    """Draw as many pictures of each class as the measured part has, and compare."""
    from benchmarks.drawing import STEPS, draw  # noqa: PLC0415
    from core.evaluation.features import load_features  # noqa: PLC0415
    from core.evaluation.report import compare  # noqa: PLC0415

    reference = getattr(domain, cell.against)
    labels = np.resize(np.random.default_rng(0).permutation(reference.labels), cell.pictures)
    began = time.perf_counter()
    seed = 1_000_000 * (cell.seed + 1)
    images = draw(base, predict, null, labels.tolist(), len(domain.classes), guidance, scale, seed)
    drawn = time.perf_counter() - began
    _keep_sheet(cell, images, guidance, scale)
    features = load_features()
    pool = domain.train + domain.tune if cell.train_images > len(domain.train) else domain.train
    training = pool.head(max(cell.train_images, 8))
    report = compare(features(images), features(reference.pixels), features(training.pixels))
    return {
        **report.to_json(),
        "features": features.digest,
        "solver": "dpm++",
        "sampling_steps": STEPS,
        "draw_seconds": round(drawn, 1),
    }


def _keep_sheet(cell: Cell, images: np.ndarray, guidance: Way, scale: float) -> None:
    """The first pictures, to be looked at."""
    from benchmarks.measure import save_grid  # noqa: PLC0415

    SHEETS.mkdir(parents=True, exist_ok=True)
    shown = images[: len(images[:40]) // 10 * 10]
    if len(shown):
        rate = "auto" if cell.learning_rate is None else f"{cell.learning_rate:g}"
        way = f"{guidance}-{scale:g}"
        name = f"{cell.domain}-{cell.method}-{rate}-s{cell.seed}-n{cell.train_images}-{way}.png"
        save_grid(shown.reshape(-1, 10, *shown.shape[1:]), SHEETS / name)
