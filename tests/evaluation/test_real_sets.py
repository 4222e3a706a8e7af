"""The distance orders real pictures as a person does: the sets that the repository ships."""

import io
import itertools
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from core.evaluation.distances import kernel_distance
from core.evaluation.features import load_features

EXAMPLES = Path(__file__).parents[2] / "examples"


def pictures(name: str, every: int, start: int) -> np.ndarray:
    with zipfile.ZipFile(EXAMPLES / name) as archive:
        names = [member for member in sorted(archive.namelist()) if member.endswith(".png")][start::every]
        shown = [Image.open(io.BytesIO(archive.read(member))).convert("RGB").resize((64, 64)) for member in names]
    return np.stack([np.asarray(picture) for picture in shown])


@pytest.fixture(scope="module")
def sets() -> dict[str, np.ndarray]:
    network = load_features()
    drawings = pictures("openmoji_lineart_64.zip", 4, 1)
    gray = np.repeat(drawings.mean(-1, keepdims=True), 3, -1).astype(np.uint8)
    noise = np.random.default_rng(0).integers(0, 256, (60, 64, 64, 3), dtype=np.uint8)
    found = {
        "same": drawings,
        "style": 255 - gray,
        "subject": pictures("mnist_digits_32.zip", 6, 0),
        "noise": noise,
    }
    return {
        name: network(pixels) for name, pixels in {**found, "real": pictures("openmoji_lineart_64.zip", 4, 0)}.items()
    }


@pytest.mark.parametrize("furthest", ["subject", "noise"])
def test_same_domain_then_other_style_then_what_is_neither(sets: dict[str, np.ndarray], furthest: str) -> None:
    """Digits against noise is left open: both are as far as can be. `benchmarks.metric` has more sets."""
    estimates = [kernel_distance(sets[name], sets["real"]) for name in ("same", "style", furthest)]
    for nearer, further in itertools.pairwise(estimates):
        assert further.value - nearer.value > 2 * np.hypot(nearer.error, further.error)


def test_one_domain_is_not_told_apart_from_itself(sets: dict[str, np.ndarray]) -> None:
    same, style = (kernel_distance(sets[name], sets["real"]) for name in ("same", "style"))
    assert abs(same.value) < 3 * same.error
    assert style.value > 10 * style.error, "where another style is told apart beyond doubt"
