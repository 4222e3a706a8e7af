"""What the table says is what its cells hold: ratios, intervals and verdicts of known distances."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.cells import BASE, DOMAIN, MAIN, Cell, Place, Recipe
from benchmarks.methods import Asked, spec_of
from benchmarks.plan import COMPARED, SIZES
from benchmarks.table import kept, summarise
from core.diffusion.catalog import base_summary

ROOT = Path(__file__).parents[2]
DISTANCES = {"difffit": 90.0, "difffit-everywhere": 95.0, "full": 100.0, "bitfit": 120.0, "lora-fair": 90.0}
DOMAINS = ("one", "two")


def result(method: str, domain: str, seed: int, value: float) -> dict:
    draws = [
        {"guidance": MAIN[0], "scale": MAIN[1], "kernel_distance": {"value": value, "error": 1.0}},
        {"guidance": DOMAIN[0], "scale": DOMAIN[1], "kernel_distance": {"value": value / 2, "error": 1.0}},
    ]
    return {"cell": {"method": method, "domain": domain, "seed": seed}, "draws": draws}


@pytest.fixture
def results() -> list[dict]:
    noise = {1: 0.99, 2: 1.0, 3: 1.01}
    return [
        result(method, domain, seed, DISTANCES[method] * noise[seed])
        for method in COMPARED
        for domain in DOMAINS
        for seed in SIZES["paper"].seeds
    ]


def test_ratios_are_of_means_over_domains_and_seeds(results: list[dict]) -> None:
    summary = summarise(results)
    assert summary["difffit_over_full"] == pytest.approx(0.9)
    assert summary["difffit_over_bitfit"] == pytest.approx(0.75)
    assert summary["difffit_over_fair_lora"] == pytest.approx(1.0)
    assert summary["domain_over_cfg"] == pytest.approx(0.5)
    assert summary["compared"]["full"]["pairs"] == len(DOMAINS) * len(SIZES["paper"].seeds)


def test_a_domain_is_won_lost_or_tied_by_its_own_interval(results: list[dict]) -> None:
    for one in results:
        cell = one["cell"]
        if (cell["method"], cell["domain"]) == ("full", "two"):
            one["draws"][0]["kernel_distance"]["value"] = 45.0
    verdicts = summarise(results)["compared"]
    assert verdicts["full"]["domains"] == {"one": "win", "two": "loss"}
    assert verdicts["lora-fair"]["domains"] == {"one": "tie", "two": "tie"}


def test_seeds_that_disagree_are_a_tie(results: list[dict]) -> None:
    for one in results:
        cell = one["cell"]
        if cell["method"] == "full":
            one["draws"][0]["kernel_distance"]["value"] *= {1: 0.5, 2: 1.0, 3: 2.0}[cell["seed"]]
    assert summarise(results)["compared"]["full"]["domains"] == {"one": "tie", "two": "tie"}


def test_kept_cells_are_found_by_the_names_they_have_on_disk() -> None:
    """Or a run would begin anew what it has."""
    place = Place.open(BASE, ())
    paths = sorted((place.results / place.base_fingerprint[:12]).glob("*.json"))
    assert paths
    for path in paths:
        kept_cell = json.loads(path.read_text())
        fields = kept_cell["cell"]
        draws = tuple((guidance, scale) for guidance, scale in fields["draws"])
        cell = Cell(**{**fields, "draws": draws, "watch": tuple(fields["watch"])})
        assert path.stem == cell.name(place.base_fingerprint, kept_cell["domain_digest"]), path.name


@pytest.mark.parametrize(("recipe", "decay", "shift"), [("paper", 0.0, 1.0), ("service", 0.7, 3.0)])
def test_a_given_rate_has_the_course_of_its_recipe(recipe: Recipe, decay: float, shift: float) -> None:
    asked = Asked("difffit", None, 8, 3e-3, 1, recipe=recipe)
    spec = spec_of(asked, base_summary(BASE), 200, 4)
    assert (spec.learning_rate, spec.rate_decay, spec.time_shift) == (3e-3, decay, shift)


def test_the_kept_cells_are_of_the_shipped_base_and_read_by_quick() -> None:
    place = Place.open(BASE, ())
    base, cells = kept(place.results, place.base_fingerprint)
    assert base == place.base_fingerprint[:12]
    assert {cell["base_fingerprint"] for cell in cells} == {place.base_fingerprint}
    command = [sys.executable, "-m", "benchmarks.table", "--quick"]
    printed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    last = json.loads(printed.splitlines()[-1])
    summary = summarise(cells)
    keys = ("difffit_over_full", "difffit_over_bitfit", "difffit_over_fair_lora", "domain_over_cfg")
    assert {key: last[key] for key in keys} == {key: summary[key] for key in keys}
