"""What the families share: which modules of diffusers' transformers carry the adapter, and how a folder is read."""

import re
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from core.diffusion.catalog import read_json, weight_files
from core.diffusion.places import AdaptedAffine, AdaptedNorm, ForwardContext, Gamma, PlaceSpec
from core.diffusion.schedule import Schedule
from core.errors import Invalid

Model = TypeVar("Model", bound=ModelMixin)
_IN_BLOCK = re.compile(r"(transformer_blocks\.(\d+))\.(.+)")


def adapt(root: nn.Module, context: ForwardContext, prefix: str = "") -> None:
    """Wrap every linear map, patch convolution and affine norm below `root`; `prefix` leads their entries' names."""
    targets = {name: module for name, module in root.named_modules() if _is_affine(module)}
    for name, module in targets.items():
        spec = PlaceSpec(f"{prefix}.{name}" if prefix else name, _gammas(name))
        parent, _, leaf = name.rpartition(".")
        setattr(root.get_submodule(parent), leaf, _adapted(module, spec, context))


def _is_affine(module: nn.Module) -> bool:
    if isinstance(module, nn.LayerNorm):
        return module.elementwise_affine
    return isinstance(module, nn.Linear | nn.Conv2d)


def _adapted(module: nn.Module, spec: PlaceSpec, context: ForwardContext) -> nn.Module:
    if isinstance(module, nn.LayerNorm):
        return AdaptedNorm(module, spec, context)
    assert isinstance(module, nn.Linear | nn.Conv2d)
    return AdaptedAffine(module, spec, context)


def _gammas(name: str) -> tuple[Gamma, ...]:
    """The scale factors that may sit on a module's output: γ on attention and MLP is γ on their last projection.

    `hidden` is what the MLP's first map hands to its activation.
    `attn2` is a text base's attention to its prompt: its output has a γ as that of `attn1` has.
    """
    found = _IN_BLOCK.fullmatch(name)
    if found is None:
        return ()
    prefix, block, role = found[1], int(found[2]), found[3]
    match role.split("."):
        case [("attn1" | "attn2"), ("to_q" | "to_k" | "to_v")]:
            return (Gamma("qkv", f"{prefix}.{role}.gamma", block),)
        case [("attn1" | "attn2") as attention, "to_out", "0"]:
            projection = Gamma("projection", f"{prefix}.{role}.gamma", block)
            return projection, Gamma("attention", f"{prefix}.{attention}.gamma", block)
        case ["ff", "net", "0", "proj"]:
            return (Gamma("hidden", f"{prefix}.{role}.gamma", block),)
        case ["ff", "net", "2"]:
            return (Gamma("mlp", f"{prefix}.ff.gamma", block),)
    return ()


def load_vae(folder: Path) -> AutoencoderKL | None:
    """The autoencoder of a pipeline folder; None where it works on pixels."""
    kind = read_json(folder / "model_index.json").get("vae", [None, None])[1]
    if kind is None:
        return None
    if kind != "AutoencoderKL":
        raise Invalid(f"model_index.json: vae {kind}; AutoencoderKL or none is supported")
    # Its convolutions take an eighth less time so, on a CPU too.
    return load_model(AutoencoderKL, folder / "vae").to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


def load_schedule(folder: Path) -> Schedule:
    """The noise schedule of a pipeline folder's scheduler."""
    return Schedule.from_config(read_json(folder / "scheduler" / "scheduler_config.json"))


def load_model(kind: type[Model], folder: Path) -> Model:
    """A model of diffusers in float32, from the safetensors of a folder on this machine alone."""
    weight_files(folder)
    model: Any = kind.from_pretrained(
        folder, torch_dtype=torch.float32, low_cpu_mem_usage=False, use_safetensors=True, local_files_only=True
    )
    assert isinstance(model, kind)
    return model
