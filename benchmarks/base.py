"""`python -m benchmarks.base`: how far the shipped base's pictures lie from the emoji that its pretraining held out.

As many pictures of each class as the held-out ones have, by the service's solver and each scale of classifier-free
guidance, against held-out emoji by subject; the floor is what pretraining's own pictures have.
"""

import argparse

import numpy as np
import torch

from benchmarks import measure
from benchmarks.drawing import STEPS, draw
from benchmarks.methods import null_of
from core.diffusion.families import load_base
from core.evaluation.features import load_features
from core.evaluation.report import compare
from core.settings import PACKAGED_BASE
from pretraining import data as emoji

SEED = 0
SCALES = (1.0, 2.0, 3.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="200 pictures instead of 500; keep nothing")
    args = parser.parse_args()
    torch.set_num_threads(1)
    count = 200 if args.quick else 500
    images, chance, features = emoji.load(), np.random.default_rng(SEED), load_features()
    held_out = chance.permutation(np.flatnonzero(images.held_out))[:count]
    trained = chance.permutation(np.flatnonzero(~images.held_out))[:count]
    reference, training = features(images.pixels[held_out]), features(images.pixels[trained])
    base = load_base(PACKAGED_BASE)

    @torch.no_grad()
    def predict(x: torch.Tensor, t: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return base.forward(x, t, None, base.class_starts(labels))[:, : base.channels].float()

    labels = images.labels[held_out].tolist()
    reports: dict[str, object] = {}
    for scale in SCALES:
        guidance = "none" if scale == 1.0 else "cfg"
        pictures = draw(base, predict, null_of(base), labels, base.num_classes, guidance, scale, SEED)
        report = compare(features(pictures), reference, training).to_json()
        reports[f"{scale:g}"] = report
        kernel, floor = report["kernel_distance"], report["kernel_floor"]
        print(
            f"guidance {scale:g}: KID×1000 {kernel['value']:.1f} ± {kernel['error']:.1f} (floor {floor['value']:.1f}), "
            f"Fréchet {report['frechet_distance']:.2f} (floor {report['frechet_floor']:.2f}), "
            f"coverage {report['coverage']:.2f}, copies {report['memorisation']['closer_share']:.2f}",
            flush=True,
        )
    result = {"by_guidance": reports, "base": base.fingerprint, "sampling_steps": STEPS, "features": features.digest}
    measure.record("base", result, SEED, keep=not args.quick)


if __name__ == "__main__":
    main()
