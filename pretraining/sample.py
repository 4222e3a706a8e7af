"""Guided DDIM sampling for looking at the base, and contact sheets.

Not the service's sampler: `DiTPipeline` has the null class 1000 written into it, so with 32 classes it can only draw
without guidance; this one knows the model's own null class.
"""

from collections.abc import Sequence

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTTransformer2DModel
from PIL import Image
from torch import Tensor


@torch.no_grad()
def draw_latents(
    dit: DiTTransformer2DModel, scheduler: DDIMScheduler, labels: Tensor, seed: int, steps: int = 25, scale: float = 2.0
) -> Tensor:
    """(B, 4, 16, 16) scaled latents by DDIM (arXiv 2010.02502) with classifier-free guidance; seeded per row."""
    size, channels = dit.config.sample_size, dit.config.in_channels
    rows = [torch.Generator().manual_seed(seed * 1_000_003 + row) for row in range(len(labels))]
    x = torch.stack([torch.randn(channels, size, size, generator=row) for row in rows])  # (B, 4, 16, 16)
    null = torch.full_like(labels, dit.config.num_embeds_ada_norm)
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        if scale == 1:
            v = dit(x, timestep=t.expand(len(x)), class_labels=labels).sample
        else:
            both = dit(
                torch.cat([x, x]), timestep=t.expand(2 * len(x)), class_labels=torch.cat([labels, null])
            ).sample  # (2B, 4, 16, 16)
            with_class, without = both.chunk(2)
            v = without + scale * (with_class - without)
        x = scheduler.step(v, t, x).prev_sample
    return x


@torch.no_grad()
def decode(vae: AutoencoderKL, latents: Tensor) -> np.ndarray:
    """(B, 64, 64, 3) uint8 from scaled latents."""
    x = torch.cat([vae.decode(part / vae.config.scaling_factor).sample for part in latents.split(64)])
    return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


def sheet(pixels: np.ndarray, columns: int) -> Image.Image:
    """One picture of (N, H, W, 3) images, `columns` a row."""
    rows = [np.concatenate(list(pixels[start : start + columns]), axis=1) for start in range(0, len(pixels), columns)]
    return Image.fromarray(np.concatenate(rows, axis=0))


def contact_sheet(
    dit: DiTTransformer2DModel,
    vae: AutoencoderKL,
    scheduler: DDIMScheduler,
    classes: Sequence[int],
    each: int = 8,
    seed: int = 0,
    steps: int = 25,
    scale: float = 2.0,
) -> Image.Image:
    """`each` images of every class: the first half of the classes to the left, the second to the right."""
    labels = torch.tensor(list(classes)).repeat_interleave(each)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # twice as fast, and nobody sees the difference on a sheet
        parts = [draw_latents(dit, scheduler, part, seed + i, steps, scale) for i, part in enumerate(labels.split(64))]
    latents = torch.cat(parts).float()
    pixels = decode(vae, latents)
    half = (len(classes) + 1) // 2 * each
    left, right = sheet(pixels[:half], each), sheet(pixels[half:], each)
    both = Image.new("RGB", (left.width + right.width + 16, left.height), "white")
    both.paste(left, (0, 0))
    both.paste(right, (left.width + 16, 0))
    return both
