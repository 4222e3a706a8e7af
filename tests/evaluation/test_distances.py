import warnings

import numpy as np
import pytest
import torch

from core.errors import Invalid
from core.evaluation.distances import coverage, frechet_distance, kernel_distance, memorisation
from core.evaluation.report import compare

WIDTH = 24


def gaussian(seed: int, count: int = 120, shift: float = 0.0, scale: float = 1.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(shift, scale, (count, WIDTH)).astype(np.float32)


class _Given(torch.nn.Module):
    """torchmetrics asks for a network of pictures: this one hands out the features that the picture carries."""

    num_features = WIDTH

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images[:, 0, 0, :WIDTH].double()


def pictures(features: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(features)[:, None, None, :].expand(-1, 3, 1, -1).contiguous()


def test_the_kernel_distance_is_torchmetrics_own() -> None:
    from torchmetrics.image.kid import KernelInceptionDistance

    real, generated = gaussian(1), gaussian(2, shift=0.3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = KernelInceptionDistance(feature=_Given(), subsets=1, subset_size=len(real))
    theirs.update(pictures(real), real=True)
    theirs.update(pictures(generated), real=False)
    expected = 1000 * float(theirs.compute()[0])
    assert kernel_distance(generated, real).value == pytest.approx(expected, rel=1e-4)


def test_the_frechet_distance_is_torchmetrics_own() -> None:
    from torchmetrics.image.fid import FrechetInceptionDistance

    real, generated = gaussian(1), gaussian(2, shift=0.3, scale=1.4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = FrechetInceptionDistance(feature=_Given(), input_img_size=(3, 1, WIDTH)).set_dtype(torch.float64)
    theirs.update(pictures(real), real=True)
    theirs.update(pictures(generated), real=False)
    assert frechet_distance(generated, real, len(real)) == pytest.approx(float(theirs.compute()), rel=1e-3)


def test_the_kernel_distance_of_one_distribution_is_zero_within_its_error_and_the_error_is_right() -> None:
    estimates = [kernel_distance(gaussian(2 * seed), gaussian(2 * seed + 1)) for seed in range(40)]
    values = np.array([estimate.value for estimate in estimates])
    errors = np.array([estimate.error for estimate in estimates])
    assert abs(values.mean()) < 3 * values.std() / np.sqrt(len(values)), "unbiased"
    apart = [kernel_distance(gaussian(2 * seed), gaussian(2 * seed + 1, shift=0.3)) for seed in range(40)]
    spread = np.std([estimate.value for estimate in apart])
    assert np.mean([estimate.error for estimate in apart]) == pytest.approx(spread, rel=0.3)
    assert (values > -4 * errors).all()


def test_a_larger_shift_is_further() -> None:
    real = gaussian(0)
    distances = [kernel_distance(gaussian(1, shift=shift), real) for shift in (0.0, 0.2, 0.5)]
    assert distances[0].value < distances[1].value < distances[2].value
    assert distances[1].value > 3 * distances[1].error


def test_a_frechet_distance_needs_its_count() -> None:
    with pytest.raises(Invalid, match="at 300 needs as many rows"):
        frechet_distance(gaussian(0), gaussian(1), 300)


def test_coverage_falls_when_a_mode_is_missing() -> None:
    near, far = gaussian(0), gaussian(1, shift=8.0)
    real = np.concatenate([near, far])
    both = np.concatenate([gaussian(2), gaussian(3, shift=8.0)])
    assert coverage(both, real) > 0.9
    assert coverage(gaussian(2, 240), real) == pytest.approx(0.5, abs=0.02)
    assert coverage(gaussian(4, shift=40.0), real) == 0.0


def test_copies_of_training_pictures_are_seen_as_copies() -> None:
    training, held_out = gaussian(0, 200), gaussian(1, 200)
    honest = memorisation(gaussian(2, 200), training, held_out)
    copied = memorisation(training[:100] + 0.01, training, held_out)
    assert honest.closer_share < 0.12
    assert honest.generated == pytest.approx(honest.held_out, rel=0.1)
    assert copied.closer_share == 1.0
    assert copied.generated < 0.05 * copied.held_out


def test_a_report_has_floors_and_counts() -> None:
    real, training, generated = gaussian(0), gaussian(1), gaussian(2, 80, shift=0.5)
    report = compare(generated, real, training).to_json()
    assert report["counts"] == {"generated": 80, "held_out": 120, "training": 120}
    assert report["frechet_count"] == 80
    assert report["frechet_floor"] < report["frechet_distance"]
    assert report["kernel_floor"]["value"] < report["kernel_distance"]["value"]
    alone = compare(generated, real).to_json()
    assert (alone["frechet_count"], alone["kernel_floor"], alone["memorisation"]) == (60, None, None)


def test_too_few_pictures_are_refused() -> None:
    with pytest.raises(Invalid, match="8 of each are the least") as error:
        compare(gaussian(0, 7), gaussian(1))
    assert error.value.code == "too_few_images"
