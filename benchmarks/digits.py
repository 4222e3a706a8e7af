"""`python -m benchmarks.digits`: how many of the drawn digits are the digit that was asked for.

An adapter is trained on the 600 digits in `examples/` by `auto`, then by half of its steps, then with uniform times;
100 digits a seed are drawn with each scale of classifier-free guidance and read by a small convolutional network, which
says itself how well it reads real digits that it was not trained on. The kernel distance does not see this: a picture
in the right hand may be of the wrong class.
"""

import argparse
from statistics import mean

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import domains, measure
from benchmarks.bases import training_dtype
from benchmarks.cells import BASE
from benchmarks.domains import Pictures
from benchmarks.drawing import draw
from benchmarks.methods import Asked, adapt, null_of, spec_of, training_data
from core.diffusion.families import load_base

SEEDS = (1, 2)
SCALES = (1.0, 3.0, 5.0)
PICTURES = 100
HELD_OUT = 100  # real digits that the reader is tried on
READER_STEPS = 700


def reader(digits: Pictures) -> tuple[nn.Module, float]:
    """A network that reads digits, and its share of right answers on real ones that it has not seen."""
    torch.manual_seed(0)
    chance = torch.Generator().manual_seed(0)
    network = nn.Sequential(
        *(nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(4)),
        *(nn.Flatten(), nn.Dropout(0.3), nn.Linear(1024, 10)),
    )
    optimizer = torch.optim.AdamW(network.parameters(), 1e-3, weight_decay=0.05)
    images, labels = _gray(digits.pixels), torch.from_numpy(digits.labels)
    order = torch.randperm(len(digits), generator=chance)
    seen, unseen = order[HELD_OUT:], order[:HELD_OUT]
    for _ in range(READER_STEPS):
        rows = seen[torch.randint(len(seen), (64,), generator=chance)]
        loss = F.cross_entropy(network(_moved(images[rows], chance)), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    network.eval()
    with torch.no_grad():
        right = float((network(images[unseen]).argmax(1) == labels[unseen]).float().mean())
    return network, right


def _gray(pixels: np.ndarray) -> Tensor:
    """(N, 64, 64, 3) uint8 as (N, 1, 32, 32) in 0 to 1."""
    return F.avg_pool2d(torch.from_numpy(pixels).permute(0, 3, 1, 2).float().mean(1, keepdim=True) / 255, 2)


def _moved(images: Tensor, chance: torch.Generator) -> Tensor:
    """A little turned, scaled and shifted."""
    count = len(images)
    turn = (torch.rand(count, generator=chance) - 0.5) * 0.5
    size = 0.85 + 0.3 * torch.rand(count, generator=chance)
    shift = (torch.rand(count, 2, generator=chance) - 0.5) * 0.3
    cos, sin = turn.cos() * size, turn.sin() * size
    maps = torch.stack([torch.stack([cos, -sin, shift[:, 0]], 1), torch.stack([sin, cos, shift[:, 1]], 1)], 1)
    grid = F.affine_grid(maps, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="`auto` alone and one seed; keep nothing")
    args = parser.parse_args()
    torch.set_num_threads(1)
    domain = domains.load("digits")
    digits = domain.train + domain.tune + domain.test
    network, reads = reader(digits)
    print(f"the reader is right on {reads:.2f} of {HELD_OUT} real digits", flush=True)
    dtype = training_dtype()
    base = load_base(BASE, dtype=dtype)
    data = training_data(base, domain, digits)
    labels = np.arange(PICTURES) % len(domain.classes)
    auto = Asked("difffit", None, 8, None, SEEDS[0])
    steps = spec_of(auto, base.summary, len(digits), len(domain.classes)).steps
    variants: dict[str, dict[str, object]] = {"auto": {}}
    if not args.quick:
        variants |= {"half the steps": {"steps": steps // 2}, "uniform times": {"time_shift": 1.0}}
    right: dict[str, dict[str, float]] = {}
    for name, given in variants.items():
        shares: dict[float, list[float]] = {scale: [] for scale in SCALES}
        for seed in SEEDS[:1] if args.quick else SEEDS:
            asked = Asked("difffit", None, 8, None, seed, given)
            predict = adapt(BASE, base, data, asked).predict
            for scale in SCALES:
                guidance = "none" if scale == 1.0 else "cfg"
                drawn = draw(base, predict, null_of(base), labels.tolist(), len(domain.classes), guidance, scale, 5000)
                with torch.no_grad():
                    read = network(_gray(drawn)).argmax(1).numpy()
                shares[scale].append(float((read == labels).mean()))
        right[name] = {f"{scale:g}": round(mean(values), 3) for scale, values in shares.items()}
        print(f"{name}: right by guidance {right[name]}", flush=True)
    result = {"right": right, "steps": steps, "reader": reads, "pictures": PICTURES, "dtype": str(dtype)}
    measure.record("digits", result, SEEDS[0], keep=not args.quick)


if __name__ == "__main__":
    main()
