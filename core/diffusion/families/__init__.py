"""Kinds of base. `load_base` picks the family from the folder; all of them answer to `Base`."""

from pathlib import Path
from typing import Any

import torch

from core.diffusion.base import Base
from core.diffusion.catalog import locate, read_json
from core.diffusion.families.dit import load_dit
from core.diffusion.families.pixart import TOKENS, load_pixart
from core.errors import Invalid

__all__ = ["Base", "load_base"]


def load_base(
    path_or_hub_name: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    name: str | None = None,
) -> Base:
    """The frozen base of a pipeline folder or hub name, from safetensors alone; `name` is what it goes by here."""
    folder = locate(str(path_or_hub_name))
    pipeline: Any = read_json(folder / "model_index.json").get("_class_name")
    if name is None and folder != Path(path_or_hub_name):
        name = str(path_or_hub_name)
    if pipeline == "DiTPipeline":
        return load_dit(folder, torch.device(device), dtype, name)
    if pipeline in TOKENS:
        return load_pixart(folder, torch.device(device), dtype, name)
    known = ", ".join(["DiTPipeline", *TOKENS])
    raise Invalid(f"model_index.json: _class_name {pipeline!r} is no known family; {known} are supported")
