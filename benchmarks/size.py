"""`python -m benchmarks.size`: parameters and file bytes of adapters by base size and number of classes, exact.

No weights are made: bases are DiTs of diffusers by shape on the meta device (arXiv 2212.09748, table 1; 1,000 classes,
learned sigma). The paper's figure for DiT-XL/2 is 0.83M parameters, 0.12 % (arXiv 2304.06648, table 1); no public code
reproduces it, so ours stands beside it.
"""

import argparse
import json

import torch
from diffusers import DiTTransformer2DModel

from benchmarks.bases import SHAPES
from core.adapters import format as adapter_format
from core.diffusion.adapter import Adapter
from core.diffusion.base import Base
from core.diffusion.catalog import BaseSummary
from core.diffusion.families.dit import make_dit
from core.diffusion.schedule import Schedule

CLASSES = (10, 101, 1000)
PAPER_XL2 = {"parameters": 830_000, "fraction": 0.0012}


def make_base(name: str) -> tuple[Base, int]:
    """The base by shape, and its parameters with the embedders' copies counted once."""
    layers, hidden, heads = SHAPES[name]
    with torch.device("meta"):
        transformer = DiTTransformer2DModel(
            num_attention_heads=heads,
            attention_head_dim=hidden // heads,
            in_channels=4,
            out_channels=8,
            num_layers=layers,
            patch_size=2,
        )
    copies = sum(parameter.numel() for parameter in transformer.transformer_blocks[0].norm1.emb.parameters())
    parameters = sum(parameter.numel() for parameter in transformer.parameters()) - (layers - 1) * copies
    summary = BaseSummary(
        name=f"DiT-{name}",
        fingerprint="0" * 64,
        image_size=256,
        sample_size=32,
        channels=4,
        patch_size=2,
        layers=layers,
        hidden=hidden,
        num_classes=1000,
        id2label={},
        prediction="epsilon",
        learned_sigma=True,
        has_vae=True,
        parameters=parameters,
        learning_rate=None,
        licence=None,
    )
    return make_dit(summary, transformer, Schedule.from_config({}), device="meta"), parameters


def measure(name: str) -> list[dict[str, object]]:
    """A row for each number of classes."""
    base, parameters = make_base(name)
    layout = base.layout()
    rows: list[dict[str, object]] = []
    for classes in CLASSES:
        names = [f"class {number}" for number in range(classes)]
        file_bytes = len(adapter_format.save(Adapter.zero(layout, base, names)))
        count = layout.parameter_count(classes)
        rows.append(
            {
                "base": f"DiT-{name}",
                "classes": classes,
                "base_parameters": parameters,
                "adapter_parameters": count,
                "fraction": count / parameters,
                "file_bytes": file_bytes,
                "header_fraction": file_bytes / (4 * count) - 1,
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="DiT-S/2 and DiT-XL/2 alone")
    quick = parser.parse_args().quick
    rows = [row for name in (["S/2", "XL/2"] if quick else SHAPES) for row in measure(name)]
    for row in rows:
        print(
            f"{row['base']:9} {row['classes']:5} classes: "
            f"{row['adapter_parameters']:9,} of {row['base_parameters']:11,} ({row['fraction']:.4%}), "
            f"file {row['file_bytes']:9,} bytes (header {row['header_fraction']:.2%})"
        )
    [fraction] = [row["fraction"] for row in rows if (row["base"], row["classes"]) == ("DiT-XL/2", 101)]
    print(json.dumps({"xl2_101_fraction": fraction, "paper_xl2": PAPER_XL2, "rows": rows}))


if __name__ == "__main__":
    main()
