"""The small autoencoder under the DiT: 64 x 64 x 3 pixels to 16 x 16 x 4 latents and back.

`python -m pretraining.vae --minutes 15` trains it into `.work/vae`. It must also redraw styles that the base never
sees (line art, handwriting), so that an adapter can reach them: hence the hard augmentation. Once a base has shipped,
the autoencoder must not change: latents and adapters would be worth nothing.
"""

import argparse
import time

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor

from pretraining.data import WORK, load

FOLDER = WORK / "vae"


def make_vae() -> AutoencoderKL:
    """Factor 4, four latent channels, about 0.9M parameters: decodes one image in some 10 ms on two cores."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 64, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=16,
        sample_size=64,
        mid_block_add_attention=False,
    )


def to_unit(pixels: np.ndarray) -> Tensor:
    """(N, 64, 64, 3) uint8 to (N, 3, 64, 64) float in [-1, 1]."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


def line_art(x: Tensor, thick: Tensor) -> Tensor:
    """Black outlines on white from any picture; rows of `thick` (B,) get strokes three pixels wider."""
    gray = x.mean(1, keepdim=True)  # (B, 1, H, W)
    padded = F.pad(gray, (1, 1, 1, 1), mode="replicate")
    across = padded[:, :, 1:-1, 2:] - padded[:, :, 1:-1, :-2]
    down = padded[:, :, 2:, 1:-1] - padded[:, :, :-2, 1:-1]
    edges = (across.square() + down.square()).sqrt().mul(2.5).clamp(0, 1)
    edges = torch.where(thick.view(-1, 1, 1, 1), F.max_pool2d(edges, 3, 1, 1), edges)
    return (1 - 2 * edges).expand(-1, 3, -1, -1)  # (B, 3, H, W)


def augment(x: Tensor) -> Tensor:
    """One row in two stays in colour; the others turn into gray, negatives, line art, chalk or other palettes."""
    rows = len(x)

    def some(share: float) -> Tensor:
        return torch.rand(rows) < share

    def pick(mask: Tensor, yes: Tensor, no: Tensor) -> Tensor:
        return torch.where(mask.view(-1, 1, 1, 1), yes, no)

    x = pick(some(0.5), x.flip(3), x)
    # Shift and scale about white paper: 1 - x is zero there, so zero padding is white.
    scale = torch.exp(torch.empty(rows).uniform_(-0.45, 0.45))
    theta = torch.zeros(rows, 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = scale
    theta[:, :, 2] = torch.empty(rows, 2).uniform_(-0.25, 0.25)
    moved = 1 - F.grid_sample(1 - x, F.affine_grid(theta, list(x.shape), align_corners=False), align_corners=False)
    x = pick(some(0.6), moved, x)
    x = pick(some(0.2), line_art(x, some(0.5)), x)
    x = pick(some(0.12), x.mean(1, keepdim=True).expand_as(x), x)
    x = pick(some(0.18), -x, x)
    x = pick(some(0.15), x[:, torch.randperm(3)], x)
    contrast = torch.empty(rows, 3, 1, 1).uniform_(0.5, 1.3)
    offset = torch.empty(rows, 3, 1, 1).uniform_(-0.4, 0.4)
    return pick(some(0.2), x * contrast + offset, x).clamp(-1, 1)


def edge_loss(y: Tensor, x: Tensor) -> Tensor:
    """Mean absolute difference of gradients at three scales: the cheap stand-in for a perceptual loss."""
    total = torch.zeros(())
    for scale in range(3):
        if scale:
            y, x = F.avg_pool2d(y, 2), F.avg_pool2d(x, 2)
        error = y - x
        total = total + error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
    return total


def train(minutes: float, batch: int, seed: int, peak_rate: float, kl_weight: float) -> AutoencoderKL:
    """Train for a fixed time, so that the rate has come down to zero when it ends."""
    torch.manual_seed(seed)
    images = load()
    seen = to_unit(images.pixels[~images.held_out])
    unseen = to_unit(images.pixels[images.held_out])[:256]
    vae = make_vae().train()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=peak_rate, betas=(0.9, 0.98), weight_decay=1e-3)
    start, step, spent = time.monotonic(), 0, 0.0
    while spent < 1:
        spent = min(1.0, (time.monotonic() - start) / (60 * minutes))
        warm = min(1.0, (step + 1) / 100)
        for group in optimizer.param_groups:
            group["lr"] = peak_rate * warm * 0.5 * (1 + np.cos(np.pi * spent)) + 1e-6
        x = augment(seen[torch.randint(len(seen), (batch,))])  # (B, 3, 64, 64)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            posterior = vae.encode(x).latent_dist
            y = vae.decode(posterior.sample()).sample.float()  # (B, 3, 64, 64)
        kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).float().mean()
        pixel = (y - x).abs().mean() + (y - x).square().mean()
        edges = edge_loss(y, x)
        loss = pixel + edges + kl_weight * kl
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % 100 == 0:
            print(
                f"step {step} done {spent:.3f} loss {loss:.4f} pixel {pixel:.4f} edges {edges:.4f} kl {kl:.3f} "
                f"held-out l1 {held_out_error(vae, unseen):.4f}",
                flush=True,
            )
    return whiten(vae.eval(), seen[::4])


@torch.no_grad()
def held_out_error(vae: AutoencoderKL, x: Tensor) -> float:
    """Mean absolute error of a reconstruction through the posterior's mean, in units of [-1, 1] pixels."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = vae.decode(vae.encode(x).latent_dist.mode()).sample
    return float((y.float() - x).abs().mean())


@torch.no_grad()
def whiten(vae: AutoencoderKL, x: Tensor) -> AutoencoderKL:
    """Give every latent channel mean 0 and deviation 1 over `x`, folded into the 1 x 1 convolutions as an affine map.

    Reconstructions stay what they are. diffusers' pipelines scale latents but do not shift them, and white paper would
    otherwise sit far from zero.
    """
    z = torch.cat([vae.encode(part).latent_dist.sample() for part in x.split(128)])  # (N, 4, 16, 16)
    mean, std = z.mean((0, 2, 3)), z.std((0, 2, 3))  # (4,)
    into, out_of = vae.quant_conv, vae.post_quant_conv
    channels = len(mean)
    # The first half of the moments are means, the second log variances.
    into.weight[:channels] /= std.view(-1, 1, 1, 1)
    into.bias[:channels] = (into.bias[:channels] - mean) / std
    into.bias[channels:] -= 2 * std.log()
    out_of.bias += out_of.weight[:, :, 0, 0] @ mean
    out_of.weight *= std.view(1, -1, 1, 1)
    vae.register_to_config(scaling_factor=round(1 / latent_std(vae, x), 4))
    return vae


@torch.no_grad()
def latent_std(vae: AutoencoderKL, x: Tensor) -> float:
    """Standard deviation of the posterior's samples over all channels and places."""
    return float(torch.cat([vae.encode(part).latent_dist.sample() for part in x.split(128)]).std())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--kl", type=float, default=5e-4)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    train(args.minutes, args.batch, args.seed, args.rate, args.kl).save_pretrained(FOLDER)


if __name__ == "__main__":
    main()
