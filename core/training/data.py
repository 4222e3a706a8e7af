"""A dataset as the trainer wants it: latents encoded once, kept as posterior mean and deviation, some held out."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from core.diffusion.base import Base
from core.errors import Invalid
from core.training.held_out import held_out_counts
from core.training.randomness import generator


@dataclass(frozen=True, eq=False)
class TrainingData:
    """Latents of N images, of their mirror images too where F is 2, on the CPU."""

    mean: Tensor  # (N, F, C, h, w)
    deviation: Tensor  # (N, F, C, h, w)
    labels: Tensor  # (N,)
    classes: tuple[str, ...]
    train: Tensor  # indices
    held_out: Tensor  # indices
    digest: str


Latents = tuple[Tensor, Tensor]
"""Mean and deviation, each (N, F, C, h, w)."""


def prepare(
    base: Base,
    images: np.ndarray,
    labels: Sequence[int],
    classes: Sequence[str],
    seed: int,
    flip: bool,
    moved: Callable[[], None] = lambda: None,
    latents: Latents | None = None,
) -> TrainingData:
    """Images (N, s, s, 3) uint8 of the job's size, encoded once for each flip, and split by `seed`.

    `moved` is called after every few images: some thousand take minutes. `latents` are those of these very images,
    where they were encoded before.
    """
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3 or images.shape[1] != images.shape[2]:
        raise Invalid(f"images must be (N, s, s, 3) uint8, not {images.shape} {images.dtype}")
    if images.shape[1] % base.summary.size_unit:
        raise Invalid(f"a side of {images.shape[1]} pixels does not divide into patches of this base")
    if not len(images) or len(labels) != len(images):
        raise Invalid(f"{len(images)} images and {len(labels)} labels")
    numbers = torch.tensor(list(labels), dtype=torch.long)
    if int(numbers.min()) < 0 or int(numbers.max()) >= len(classes):
        raise Invalid(f"a label lies outside of the {len(classes)} classes")
    mean, deviation = _encode(base, images, flip, moved) if latents is None else latents
    train, held_out = split(numbers, len(classes), seed)
    return TrainingData(
        mean=mean,
        deviation=deviation,
        labels=numbers,
        classes=tuple(classes),
        train=train,
        held_out=held_out,
        digest=_digest(base, images, numbers, classes, seed, flip),
    )


def _encode(base: Base, images: np.ndarray, flip: bool, moved: Callable[[], None]) -> Latents:
    views = [images, images[:, :, ::-1]] if flip else [images]
    encoded = [base.encode(view, moved) for view in views]
    return torch.stack([mean for mean, _ in encoded], dim=1), torch.stack([spread for _, spread in encoded], dim=1)


@lru_cache(maxsize=8)
def batch_order(seed: int, epoch: int, n: int) -> Tensor:
    """A permutation of n that depends on seed and epoch alone."""
    return torch.randperm(n, generator=generator(seed, "epoch", epoch))


def batch_indices(data: TrainingData, seed: int, step: int, batch_size: int) -> Tensor:
    """The images of a step: epochs follow each other without a gap, so a batch may end one and begin the next."""
    count = len(data.train)
    places = range(step * batch_size, (step + 1) * batch_size)
    return torch.stack([data.train[batch_order(seed, place // count, count)[place % count]] for place in places])


def split(labels: Tensor, classes: int, seed: int) -> tuple[Tensor, Tensor]:
    """Indices to train on and indices held out of each class, by the seed alone."""
    counts = held_out_counts(torch.bincount(labels, minlength=classes).tolist())
    held: list[Tensor] = []
    for number, count in enumerate(counts):
        members = (labels == number).nonzero().flatten()
        if count:
            order = torch.randperm(len(members), generator=generator(seed, "held-out", number))
            held.append(members[order[:count]])
    held_out = torch.cat(held).sort().values if held else torch.zeros(0, dtype=torch.long)
    kept = torch.ones(len(labels), dtype=torch.bool)
    kept[held_out] = False
    return kept.nonzero().flatten(), held_out


def _digest(base: Base, images: np.ndarray, labels: Tensor, classes: Sequence[str], seed: int, flip: bool) -> str:
    digest = hashlib.sha256()
    digest.update(f"{base.fingerprint} {images.shape} {list(classes)!r} {seed} {flip}".encode())
    digest.update(np.ascontiguousarray(images).tobytes())
    digest.update(labels.numpy().tobytes())
    return digest.hexdigest()
