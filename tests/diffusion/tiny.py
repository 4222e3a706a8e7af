"""Tiny random DiT pipelines, saved as diffusers saves them, for every test that needs a base."""

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel, FlowMatchEulerDiscreteScheduler

from core.diffusion.adapter import Adapter
from core.diffusion.base import Base
from core.diffusion.layout import AdapterLayout

NAMES = ("circle", "square", "star", "heart", "arrow", "letter", "leaf", "cloud")


def make_transformer(
    *,
    channels: int = 4,
    learned_sigma: bool = False,
    classes: int = 4,
    sample_size: int = 8,
    layers: int = 4,
    heads: int = 2,
    head_dim: int = 8,
    seed: int = 0,
    affine_norms: bool = False,
    equal_copies: bool = True,
) -> DiTTransformer2DModel:
    """A random transformer whose blocks hold equal copies of the embedders, as converted checkpoints do."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        transformer = DiTTransformer2DModel(
            num_attention_heads=heads,
            attention_head_dim=head_dim,
            in_channels=channels,
            out_channels=2 * channels if learned_sigma else None,
            num_layers=layers,
            sample_size=sample_size,
            patch_size=2,
            num_embeds_ada_norm=classes,
            norm_elementwise_affine=affine_norms,
        )
        for parameter in transformer.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    if equal_copies:
        first = transformer.transformer_blocks[0].norm1.emb.state_dict()
        for block in transformer.transformer_blocks:
            block.norm1.emb.load_state_dict(first)
    return transformer.eval()


def make_vae(channels: int = 4, seed: int = 0) -> AutoencoderKL:
    """A random autoencoder that halves each side twice."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoencoderKL(
            block_out_channels=(8, 8, 8),
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            latent_channels=channels,
            norm_num_groups=2,
            layers_per_block=1,
        ).eval()


def make_pipeline(
    folder: Path,
    *,
    vae: bool = True,
    learned_sigma: bool = False,
    classes: int = 4,
    flow: bool = False,
    scheduler: dict[str, Any] | None = None,
    licence: str | None = "cc0-1.0",
    half: bool = False,
    **transformer: Any,
) -> Path:
    """Save a whole pipeline with diffusers and return its folder; latents of 8 x 8, so images of 32 with a VAE."""
    channels = 4 if vae else 3
    model = make_transformer(channels=channels, learned_sigma=learned_sigma, classes=classes, **transformer)
    options = scheduler or {}
    steps: Any = (
        FlowMatchEulerDiscreteScheduler(**options) if flow else DDIMScheduler(**{"clip_sample": False, **options})
    )
    parts: dict[str, Any] = {"transformer": model, "scheduler": steps, "vae": make_vae() if vae else None}
    if half:
        parts = {name: part if name == "scheduler" or part is None else part.half() for name, part in parts.items()}
    DiTPipeline(**parts).save_pretrained(folder)
    index = folder / "model_index.json"
    data = json.loads(index.read_text())
    data["id2label"] = {str(number): NAMES[number % len(NAMES)] for number in range(classes)}
    index.write_text(json.dumps(data, indent=2))
    if licence is not None:
        (folder / "README.md").write_text(f"---\nlicense: {licence}\n---\n# A random base for tests\n")
    return folder


def make_adapter(
    base: Base,
    *,
    layout: AdapterLayout | None = None,
    classes: int = 3,
    seed: int = 1,
    strength: float = 0.2,
    class_start: tuple[int | None, ...] | None = None,
) -> Adapter:
    """A random adapter that visibly changes what the base predicts."""
    generator = torch.Generator().manual_seed(seed)
    zero = Adapter.zero(layout or base.layout(), base, [f"class-{number}" for number in range(classes)], class_start)
    zero.theta.normal_(0, strength, generator=generator)
    zero.class_delta.normal_(0, strength, generator=generator)
    return zero
