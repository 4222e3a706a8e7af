"""Tiny random DiT pipelines, saved as diffusers saves them, for every test that needs a base."""

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
)
from safetensors.torch import save_file

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


WORDS = ("disc", "a", "red", "fox", "bar", "ring", "cross", "dark", "light", "striped", "class", "0", "1", "2", "-")


def make_text_encoder(width: int = 12, seed: int = 0) -> tuple[Any, Any]:
    """A tokenizer of a few words and a random T5 encoder."""
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    vocabulary = [(piece, -1.0) for piece in ("<pad>", "</s>", "<unk>", "▁", *(f"▁{word}" for word in WORDS))]
    tokenizer = T5Tokenizer(vocab=vocabulary, extra_ids=0)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = T5Config(
            vocab_size=len(tokenizer), d_model=width, d_kv=4, d_ff=16, num_layers=2, num_heads=2, dropout_rate=0.0
        )
        return tokenizer, T5EncoderModel(config).eval()


def make_pixart(
    folder: Path,
    *,
    encoder: bool = True,
    prompts: dict[str, torch.Tensor] | None = None,
    layers: int = 2,
    seed: int = 0,
    sizes: bool = False,
    scheduler: dict[str, Any] | None = None,
) -> Path:
    """Save a whole PixArt pipeline with diffusers and return its folder; latents of 8 x 8, so images of 32.

    `sizes`: the model is told the picture's sides, as those of 1,024 pixels are. `prompts` go beside it as files.
    """
    width = 12
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        transformer = PixArtTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=6,
            in_channels=4,
            out_channels=8,
            num_layers=layers,
            cross_attention_dim=12,
            sample_size=8,
            caption_channels=width,
            use_additional_conditions=sizes,
        )
        for parameter in transformer.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    tokenizer, text_encoder = make_text_encoder(width) if encoder else (None, None)
    steps = DDIMScheduler(**{"clip_sample": False, "timestep_spacing": "trailing", **(scheduler or {})})
    parts: dict[str, Any] = {"tokenizer": tokenizer, "text_encoder": text_encoder, "scheduler": steps}
    PixArtAlphaPipeline(transformer=transformer.eval(), vae=make_vae(), **parts).save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: cc0-1.0\n---\n# A random text-to-image base for tests\n")
    if prompts is not None:
        (folder / "prompts").mkdir()
        save_file(prompts, folder / "prompts" / "prompts.safetensors")
    return folder
