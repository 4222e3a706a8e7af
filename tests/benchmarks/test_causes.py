"""What `benchmarks.causes` changes is what it says, and what it prints is what its cells hold."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import causes, domains, methods
from benchmarks.cells import BASE, DOMAIN, MAIN, Place
from benchmarks.drawing import across
from core.diffusion.families import load_base

ROOT = Path(__file__).parents[2]


def test_what_goes_across_a_picture_leaves_its_strength_alone() -> None:
    chance = torch.Generator().manual_seed(0)
    change, x0 = torch.randn(2, 3, 4, 8, 8, generator=chance)
    kept = across(change, x0)
    assert torch.allclose((kept * x0).flatten(1).sum(1), torch.zeros(3), atol=1e-4)
    along = (change - kept).flatten(1)
    cosines = torch.cosine_similarity(along, x0.flatten(1)).abs()
    assert torch.allclose(cosines, torch.ones(3), atol=1e-5)


def test_gates_that_are_fixed_do_not_train_and_all_else_does(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    base = load_base(BASE)
    domain = domains.load("lineart")
    data = methods.training_data(base, domain, domain.train.head(8))
    averages: list[torch.Tensor] = []
    real = methods.finish
    monkeypatch.setattr(methods, "finish", lambda state, *rest: averages.append(state.average) or real(state, *rest))
    counts = [
        methods.adapt(BASE, base, data, methods.Asked(method, 2, 4, 3e-3, 1)).parameters
        for method in ("difffit", "difffit-fixed-gates")
    ]
    free, fixed = averages
    gates = methods.gate_biases(base.layout("difffit"))
    assert len(gates) == 2 * base.hidden * base.summary.layers == counts[0] - counts[1]
    assert bool((free[gates] != 0).all())
    assert not bool(fixed[gates].any())
    others = torch.ones(len(fixed), dtype=torch.bool)
    others[gates] = False
    for name, place in base.layout("difffit").by_name.items():
        if name.endswith(".to_k.bias"):  # softmax does not see it: its gradient is rounding, and now and then nothing
            others[place.offset : place.offset + place.size] = False
    assert torch.equal(free[others] != 0, fixed[others] != 0)


def test_the_biases_of_gates_move_gates_alone() -> None:
    base = load_base(BASE)
    theta = torch.zeros(base.layout("difffit").size)
    theta[methods.gate_biases(base.layout("difffit"))] = 1.0
    handed: list[torch.Tensor] = []
    place = next(module for name, module in base.network.named_modules() if name.endswith("blocks.0.norm1.linear"))
    place.register_forward_hook(lambda _module, _inputs, out: handed.append(out))
    x, t, rows = torch.zeros(1, 4, 16, 16), base.schedule.times[:1], base.class_starts(torch.zeros(1, dtype=torch.long))
    with torch.no_grad():
        base.forward(x, t, None, rows)
        base.forward(x, t, theta, rows)
    plain, moved = (out.view(len(methods.ADALN_PARTS), -1) for out in handed)
    changed = [bool((plain[number] != moved[number]).all()) for number in range(len(methods.ADALN_PARTS))]
    assert changed == [part.startswith("gate") for part in methods.ADALN_PARTS]


def test_ratios_are_of_the_same_domains_and_ways() -> None:
    def result(method: str, domain: str, value: float) -> dict:
        ways = causes.WAYS if method == "difffit" else (MAIN,)
        draws = [
            {"guidance": way[0], "scale": way[1], "kernel_distance": {"value": value * (1 + number), "error": 1.0}}
            for number, way in enumerate(ways)
        ]
        return {"cell": {"method": method, "domain": domain, "seed": 1}, "draws": draws, "parameters": 1}

    values = {"difffit": 90.0, "bitfit": 100.0, "lora-fair-1": 80.0}
    results = [result(method, name, values.get(method, 60.0)) for method in causes.METHODS for name in ("one", "two")]
    gamma, rank, guidance = causes.summarise(results)
    assert gamma["gates_train"]["ratio"] == pytest.approx(0.9)
    assert gamma["bitfit_without_gates"]["ratio"] == pytest.approx(0.6)
    assert rank["rank_8_over_rank_1"]["ratio"] == pytest.approx(0.75)
    assert guidance[f"{DOMAIN[0]} {DOMAIN[1]:g}"]["ratio"] == pytest.approx(1 + causes.WAYS.index(DOMAIN))
    assert MAIN[0] not in guidance


def test_losses_are_told_in_thousandths_over_bitfits() -> None:
    results = [
        {"cell": {"method": method, "domain": "one"}, "last_loss": loss}
        for method, loss in (("bitfit", 0.5), ("difffit", 0.5), ("lora-fair", 0.499))
    ]
    assert causes.losses_over_bitfit(results) == {"difffit": {"one": 0.0}, "lora-fair": {"one": -2.0}}


def test_the_kept_cells_are_of_the_shipped_base_and_read_by_quick() -> None:
    command = [sys.executable, "-m", "benchmarks.causes", "--quick"]
    printed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    summary = json.loads(printed.splitlines()[-1])
    kept = json.loads((ROOT / "benchmarks" / "results" / "causes.json").read_text())
    assert summary["base"] == Place.open(BASE, ()).base_fingerprint[:12]
    assert summary == {name: kept[name] for name in summary}
