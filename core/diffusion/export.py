"""`python -m core.diffusion.export ADAPTER.safetensors --base FOLDER --to FOLDER`: an adapter as a pipeline folder.

The adapter is folded into its base's weights and written as diffusers saves a `DiTPipeline`, the embedders copied into
every block again: unmodified diffusers loads it and draws what the service draws (docs/training.md says how closely).
"""

import argparse
import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
from torch import Tensor

from core.adapters import format as adapter_format
from core.diffusion.adapter import Adapter
from core.diffusion.base import Base
from core.diffusion.catalog import locate, read_json
from core.diffusion.families import load_base
from core.diffusion.families.dit import DiTBase
from core.diffusion.fold import fold
from core.errors import Conflict, DomainError, Invalid

NULL_OF_DIFFUSERS = 1000
"""The null class that `DiTPipeline` has written into it: it guides models of 1,000 classes alone."""


def export(adapter: Adapter, base: str | Path, to: Path, pad: bool = False) -> Path:
    """Write the adapted model into `to`, a new or empty folder; `base` is the folder or hub name of the adapter's base.

    With `pad` the class table has 1,001 rows, the last of them the null row, and those between the adapter's own and it
    the null row too: `DiTPipeline` then guides as it does ImageNet's DiT. Raises Conflict for an adapter of another
    base and for a folder with anything in it, Invalid for a base that is no DiT.
    """
    folder = locate(str(base))
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise Conflict(f"{to} exists and is not an empty folder", code="exists")
    folded = load_base(folder)
    if not isinstance(folded, DiTBase):
        raise Invalid("adapters of class-conditional DiTs can be exported; this base is of another family")
    fold(folded, adapter)
    table = folded.class_table
    if pad and (missing := NULL_OF_DIFFUSERS + 1 - len(table)) > 0:
        table = torch.cat([table, table[-1:].expand(missing, -1)])
    _transformer(folded, table).save_pretrained(to / "transformer", safe_serialization=True)
    for part in ("scheduler", "vae"):
        if (folder / part).is_dir():
            shutil.copytree(folder / part, to / part)
    index = read_json(folder / "model_index.json")
    names = {str(number): name for number, name in enumerate(adapter.classes)}
    (to / "model_index.json").write_text(json.dumps({**index, "id2label": names}, indent=2) + "\n")
    (to / "README.md").write_text(_card(folded, adapter))
    return to


def _transformer(base: DiTBase, table: Tensor) -> DiTTransformer2DModel:
    """diffusers' own model with the base's weights, the one time embedder and `table` in each of its blocks."""
    config = {**base.config, "num_embeds_ada_norm": len(table) - 1}
    model = DiTTransformer2DModel.from_config(config)
    assert isinstance(model, DiTTransformer2DModel)
    weights = _plain(base.network.transformer.state_dict())
    embedders = {
        f"timestep_embedder.{name}": value
        for name, value in _plain(base.network.timestep_embedder.state_dict()).items()
    }
    embedders["class_embedder.embedding_table.weight"] = table
    for number in range(len(model.transformer_blocks)):
        prefix = f"transformer_blocks.{number}.norm1.emb."
        weights |= {f"{prefix}{name}": value for name, value in embedders.items()}
    model.load_state_dict(weights, strict=True)
    return model


def _plain(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Under the names that they had before each place was wrapped."""
    return {name.replace(".inner.", "."): value for name, value in weights.items()}


def _card(base: Base, adapter: Adapter) -> str:
    licence = f"license: {base.licence}\n" if base.licence else ""
    size = adapter.meta.get("image_size", base.image_size)
    latent = size * base.sample_size // base.image_size
    larger = (
        f"Trained at {size} pixels; to draw at that size, after loading: "
        f"`pipe.transformer.register_to_config(sample_size={latent})`.\n\n"
        if size != base.image_size
        else ""
    )
    return (
        f"---\n{licence}---\n# An adapter of {base.name}, folded into its weights\n\n"
        f"Base {adapter.base_fingerprint}; {adapter.layout.kind}, {adapter.parameter_count:,} parameters of its own.\n"
        "\n"
        f"Classes: {', '.join(adapter.classes)}.\n\n{larger}"
        "`DiTPipeline` takes class 1000 for its null class: unless the class table was padded to that, draw with "
        "`guidance_scale=1.0`.\n"
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m core.diffusion.export", description=(__doc__ or "").split("\n")[2])
    parser.add_argument("adapter", type=Path, metavar="ADAPTER.safetensors")
    parser.add_argument("--base", required=True, help="folder or hub name of the adapter's base")
    parser.add_argument("--to", type=Path, required=True, help="a new folder")
    parser.add_argument("--pad", action="store_true", help="class table of 1,001 rows, so that DiTPipeline can guide")
    asked = parser.parse_args(arguments)
    try:
        data = asked.adapter.read_bytes()
        to = export(adapter_format.load(data), asked.base, asked.to, asked.pad)
    except (DomainError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    sys.stdout.write(f"{to}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
