"""Small jobs on tiny bases, for the tests of training."""

from typing import Any

import numpy as np

from core.diffusion.base import Base
from core.training.data import TrainingData, prepare
from core.training.spec import TrainSpec, resolve

CLASSES = ("dark", "light", "striped")


def make_images(base: Base, per_class: int = 8, seed: int = 0, side: int | None = None) -> tuple[np.ndarray, list[int]]:
    """Noisy dark, light and striped squares, of the base's size unless another is named."""
    random = np.random.default_rng(seed)
    size = side or base.image_size
    stripes = np.where(np.arange(size) % 4 < 2, 40, 220)[None, :, None]
    kinds = [np.full((size, size, 3), 40), np.full((size, size, 3), 220), np.broadcast_to(stripes, (size, size, 3))]
    labels = [number for number in range(len(kinds)) for _ in range(per_class)]
    images = [np.clip(kinds[label] + random.normal(0, 12, (size, size, 3)), 0, 255) for label in labels]
    return np.stack(images).astype(np.uint8), labels


def make_data(
    base: Base, *, per_class: int = 8, seed: int = 0, flip: bool = False, side: int | None = None
) -> TrainingData:
    images, labels = make_images(base, per_class, seed, side)
    return prepare(base, images, labels, CLASSES, seed, flip)


def make_spec(base: Base, *, seed: int = 0, images: int = 24, **hyperparameters: Any) -> TrainSpec:
    asked = {"steps": 12, "batch_size": 4, "validation_every": 100, **hyperparameters}
    return resolve(asked, images=images, classes=len(CLASSES), base=base.summary, seed=seed)
