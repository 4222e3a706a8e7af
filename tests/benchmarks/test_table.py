"""What the table says is what its cells hold: ratios, intervals and verdicts of known distances."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.cells import BASE, Place
from benchmarks.table import COMPARED, DOMAIN, MAIN, SIZES, kept, summarise

ROOT = Path(__file__).parents[2]
DISTANCES = {"difffit": 90.0, "full": 100.0, "bitfit": 120.0, "lora-fair": 90.0}
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
        for seed in SIZES.seeds
    ]


def test_ratios_are_of_means_over_domains_and_seeds(results: list[dict]) -> None:
    summary = summarise(results)
    assert summary["difffit_over_full"] == pytest.approx(0.9)
    assert summary["difffit_over_bitfit"] == pytest.approx(0.75)
    assert summary["difffit_over_fair_lora"] == pytest.approx(1.0)
    assert summary["domain_over_cfg"] == pytest.approx(0.5)
    assert summary["compared"]["full"]["pairs"] == len(DOMAINS) * len(SIZES.seeds)


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
