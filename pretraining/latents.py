"""The images as the DiT sees them: the autoencoder's posteriors, computed once, mirrored ones beside."""

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from pretraining.classes import CLASSES
from pretraining.data import WORK, Images
from pretraining.vae import to_unit

LATENTS = WORK / "latents.pt"


@dataclass(frozen=True)
class Latents:
    """Posteriors of N images, scaled to unit variance, and how likely each is to be drawn."""

    mean: Tensor  # (N, 4, 16, 16)
    std: Tensor  # (N, 4, 16, 16)
    labels: Tensor  # (N,) int64
    weights: Tensor  # (N,)

    def draw(self, rows: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """`rows` latents (B, 4, 16, 16), sampled from their posteriors, and their labels (B,)."""
        index = torch.multinomial(self.weights, rows, replacement=True, generator=generator)
        noise = torch.randn(self.mean[index].shape, generator=generator)
        return self.mean[index] + self.std[index] * noise, self.labels[index]


def may_flip(labels: Tensor) -> Tensor:
    """(N,) bool: whose mirror image is still a right picture of its class."""
    return torch.tensor([kind.may_flip for kind in CLASSES])[labels]


def balance(labels: Tensor, power: float = 0.3) -> Tensor:
    """(N,) weights n_class ** -power: small classes are seen more often than their share, yet not as often as large."""
    counts = torch.bincount(labels, minlength=len(CLASSES)).clamp(min=1).float()
    return counts[labels] ** -power


@torch.no_grad()
def encode(images: Images, vae: AutoencoderKL, held_out: bool) -> Latents:
    """Posteriors of one side of the split; the training side also holds the mirrored images."""
    side = torch.from_numpy(images.held_out) == held_out
    x, labels = to_unit(images.pixels)[side], torch.from_numpy(images.labels)[side]
    weights = balance(labels)
    if not held_out:
        flips = may_flip(labels)
        weights = torch.where(flips, weights / 2, weights)
        x, labels = torch.cat([x, x[flips].flip(3)]), torch.cat([labels, labels[flips]])
        weights = torch.cat([weights, weights[flips]])
    posteriors = [vae.encode(part).latent_dist for part in x.split(128)]
    scale = vae.config.scaling_factor
    mean = torch.cat([posterior.mean for posterior in posteriors]) * scale
    std = torch.cat([posterior.std for posterior in posteriors]) * scale
    return Latents(mean, std, labels, weights)


def load_latents(images: Images, vae: AutoencoderKL, path: Path = LATENTS) -> tuple[Latents, Latents]:
    """Training and held-out latents, from the file if they are there. Delete it when the autoencoder changes."""
    if not path.exists():
        sides = [vars(encode(images, vae, held_out)) for held_out in (False, True)]
        torch.save(sides, path)
    seen, unseen = torch.load(path, weights_only=True)
    return Latents(**seen), Latents(**unseen)
