"""`python -m benchmarks.causes`: why the table's DiffFit ties with BitFit, trails the fair LoRA and gains by cfg.

Each question changes one thing at a time, on the table's domains and steps, all at one rate, from the same noises:

| question | what is changed |
|---|---|
| Why does γ add nothing to BitFit? | the biases of adaLN's gates, which may do γ's work already, are left alone |
| What has the fair LoRA that DiffFit has not? | its rank: 1 instead of 8 |
| Why is domain guidance worse than cfg? | its scale, its unconditional branch, and what of its direction is added |

γ multiplies a gate that depends on class and time; a bias adds to it. `constant_share` is how much of the gates' mean
square depends on neither: of that part the bias can do all that γ can. Cells are kept in `benchmarks/results/causes/`:
a stopped run goes on, `--quick` reads what is there. Beside them a strip of clip art: by cfg, by domain guidance, real.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks import domains, measure
from benchmarks.cells import BASE, DOMAIN, MAIN, RESULTS, Cell, Draw, Place, Result, at, kernel, run_cells
from benchmarks.plan import SIZES
from benchmarks.table import line, paired

KEPT = RESULTS.parent / "causes"
PICTURES = 60
SEED = 1
RATE = 3e-3  # the best of half decades by domain guidance, for all of these methods
METHODS = ("bitfit", "difffit", "bitfit-fixed-gates", "difffit-fixed-gates", "lora-fair-1", "lora-fair")
WAYS: tuple[Draw, ...] = (
    MAIN,
    DOMAIN,
    ("domain", 3.0),
    ("cfg", 2.0),
    ("cfg-across", 3.0),
    ("domain-across", 2.0),
    ("domain-across", 3.0),
)
GATE_ROWS = 512
SHOWN, COLUMNS = "clipart", 12


def cells(names: Sequence[str]) -> list[Cell]:
    first = Cell(
        domain=names[0],
        method=METHODS[0],
        learning_rate=RATE,
        steps=SIZES["paper"].steps,
        batch_size=SIZES["paper"].batch_size,
        seed=SEED,
        train_images=SIZES["paper"].train_images,
        against="test",
        pictures=PICTURES,
        draws=(MAIN,),
    )
    return [
        replace(
            first,
            domain=name,
            method=method,
            draws=WAYS if method == "difffit" else (MAIN,),
        )
        for method in METHODS
        for name in names
    ]


def kept(place: Place) -> list[Result]:
    """All cells of this base that are on disk, without a look at the domains."""
    paths = sorted((place.results / place.base_fingerprint[:12]).glob("*.json"))
    if len(paths) < len(METHODS) * len(domains.MEASURED):
        raise FileNotFoundError(f"{len(paths)} cells are kept in {place.results}: run without --quick first")
    return [json.loads(path.read_text()) for path in paths]


def summarise(results: Sequence[Result]) -> tuple[Result, Result, Result]:
    """Of γ, of the rank and of guidance: ratios over pairs, printed one a line."""
    found: dict[tuple[str, Draw], dict[tuple[str, int], float]] = defaultdict(dict)
    parameters: dict[str, int] = {}  # in the domain with the most classes
    for result in results:
        cell = result["cell"]
        parameters[cell["method"]] = max(parameters.get(cell["method"], 0), result["parameters"])
        for draw in result["draws"]:
            way: Draw = (draw["guidance"], draw["scale"])
            found[cell["method"], way][cell["domain"], cell["seed"]] = kernel(at(result, way))

    def compare(ours: str, theirs: str, way: Draw = MAIN, other: Draw = MAIN) -> Result:
        pairs = found[theirs, other]
        row = paired({key: (found[ours, way][key], value) for key, value in pairs.items()})
        both = f"{ours}, {way[0]} {way[1]:g}", f"{theirs}, {other[0]} {other[1]:g}"
        print(line(" / ".join(both if way != other else (ours, theirs)), row))
        return row

    gamma = {
        "gates_train": compare("difffit", "bitfit"),
        "gates_fixed": compare("difffit-fixed-gates", "bitfit-fixed-gates"),
        "bitfit_without_gates": compare("bitfit-fixed-gates", "bitfit"),
        "difffit_without_gates": compare("difffit-fixed-gates", "difffit"),
    }
    rank = {
        "difffit_over_rank_1": compare("difffit", "lora-fair-1"),
        "difffit_over_rank_8": compare("difffit", "lora-fair"),
        "rank_8_over_rank_1": compare("lora-fair", "lora-fair-1"),
        "parameters": {method: parameters[method] for method in ("difffit", "lora-fair-1", "lora-fair")},
    }
    guidance = {f"{way[0]} {way[1]:g}": compare("difffit", "difffit", way) for way in WAYS if way != MAIN}
    return gamma, rank, guidance


def losses_over_bitfit(results: Sequence[Result]) -> dict[str, dict[str, float]]:
    """By method and domain: by how many thousandths a method's training loss, over the last steps, is above BitFit's.

    From the same noises the losses differ by far less than distances of some drawn pictures do by chance.
    """
    losses: dict[str, dict[str, float]] = defaultdict(dict)
    for result in results:
        losses[result["cell"]["method"]][result["cell"]["domain"]] = result["last_loss"]
    over = {
        method: {name: round(1000 * (loss / losses["bitfit"][name] - 1), 2) for name, loss in by_domain.items()}
        for method, by_domain in losses.items()
        if method != "bitfit"
    }
    print("training loss over BitFit's, in thousandths:")
    for method, by_domain in over.items():
        print(f"  {method:20} {by_domain}")
    return over


def constant_shares(folder: Path) -> list[float]:
    """Of each block: the share of its gates' mean square, over classes and times, that is their mean's square."""
    import torch  # noqa: PLC0415  # for who runs it, not for who reads

    from benchmarks.methods import ADALN_PARTS, GATES  # noqa: PLC0415
    from core.diffusion.families import load_base  # noqa: PLC0415

    base = load_base(folder)
    handed: list[torch.Tensor] = []
    blocks = [module for name, module in base.network.named_modules() if name.endswith(".norm1.linear")]
    hooks = [block.register_forward_hook(lambda _module, _inputs, out: handed.append(out)) for block in blocks]
    chance = torch.Generator().manual_seed(SEED)
    labels = torch.randint(base.num_classes, (GATE_ROWS,), generator=chance)
    times = base.schedule.times[torch.randint(len(base.schedule), (GATE_ROWS,), generator=chance)]
    x = torch.zeros(GATE_ROWS, base.channels, base.sample_size, base.sample_size)  # adaLN does not see it
    with torch.no_grad():
        base.forward(x, times, None, base.class_starts(labels))
    for hook in hooks:
        hook.remove()
    shares: list[float] = []
    for out in handed:
        gates = torch.cat([out.chunk(len(ADALN_PARTS), dim=1)[number] for number in GATES], dim=1)
        shares.append(round(float(gates.mean(0).square().sum() / gates.square().mean(0).sum()), 3))
    return shares


def strip(folder: Path) -> np.ndarray:
    """(3, COLUMNS, s, s, 3) uint8 of `SHOWN`: one DiffFit adapter by cfg, by domain guidance, and the domain's own."""
    from benchmarks.drawing import draw  # noqa: PLC0415
    from benchmarks.methods import Asked, adapt, null_of, training_data  # noqa: PLC0415
    from core.diffusion.families import load_base  # noqa: PLC0415

    sizes = SIZES["paper"]
    base, domain = load_base(folder), domains.load(SHOWN)
    data = training_data(base, domain, domain.train.head(sizes.train_images))
    adapted = adapt(folder, base, data, Asked("difffit", sizes.steps, sizes.batch_size, RATE, SEED))
    labels = np.resize(np.arange(len(domain.classes)), COLUMNS)
    null, classes = null_of(base), len(domain.classes)
    drawn = [draw(base, adapted.predict, null, labels.tolist(), classes, *way, seed=SEED) for way in (MAIN, DOMAIN)]
    own = [domain.train.pixels[np.flatnonzero(domain.train.labels == label)[0]] for label in labels]
    return np.stack([*drawn, np.stack(own)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="read the kept results, run no cell")
    parser.add_argument("--base", type=Path, default=BASE)
    parser.add_argument("--results", type=Path, default=KEPT)
    parser.add_argument("--workers", type=int, default=2, help="processes, of one thread each")
    args = parser.parse_args()
    if args.quick:
        results = kept(Place.open(args.base, (), args.results))
    else:
        place = Place.open(args.base, domains.MEASURED, args.results)
        results = run_cells(place, cells(domains.MEASURED), args.workers)
        measure.save_grid(strip(args.base), args.results / f"{SHOWN}.png")
    shares = constant_shares(args.base)
    print(f"share of the gates that depends on neither class nor time, by block: {shares}")
    gamma, rank, guidance = summarise(results)
    summary = {
        "constant_share": round(float(np.mean(shares)), 3),
        "gamma": gamma,
        "loss_over_bitfit": losses_over_bitfit(results),
        "rank": rank,
        "guidance_over_cfg_3": guidance,
        "pictures": PICTURES,
        "base": results[0]["base_fingerprint"][:12],
    }
    if args.quick:
        print(json.dumps(summary))
    else:
        measure.record("causes", summary, SEED, keep=True)


if __name__ == "__main__":
    main()
