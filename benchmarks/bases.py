"""The bases that benchmarks run on: the shipped one, and random DiTs by size (arXiv 2212.09748, table 1)."""

import copy
import dataclasses

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel

from core.diffusion.base import Base
from core.diffusion.families import load_base
from core.diffusion.families.dit import make_dit
from core.diffusion.products import is_quick_at_bfloat16
from core.settings import PACKAGED_BASE

# (layers, hidden, heads)
SHAPES = {"S/2": (12, 384, 6), "B/2": (12, 768, 12), "L/2": (24, 1024, 16), "XL/2": (28, 1152, 16)}
SHIPPED = "shipped"
LATENT, CLASSES = 32, 10  # a random base's: 256 tokens; few classes, as the shipped base has


def make_transformer(name: str, seed: int = 0) -> DiTTransformer2DModel:
    """A float32 transformer of diffusers, with equal embedders in every block as converted checkpoints have."""
    if name == SHIPPED:
        loaded = DiTTransformer2DModel.from_pretrained(
            PACKAGED_BASE / "transformer", torch_dtype=torch.float32, low_cpu_mem_usage=False, use_safetensors=True
        )
        assert isinstance(loaded, DiTTransformer2DModel)
        return loaded
    layers, hidden, heads = SHAPES[name]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        transformer = DiTTransformer2DModel(
            num_attention_heads=heads,
            attention_head_dim=hidden // heads,
            in_channels=4,
            out_channels=4,
            num_layers=layers,
            sample_size=LATENT,
            patch_size=2,
            num_embeds_ada_norm=CLASSES,
        )
    first = transformer.transformer_blocks[0].norm1.emb.state_dict()
    for block in transformer.transformer_blocks:
        block.norm1.emb.load_state_dict(first)
    return transformer


def training_dtype() -> torch.dtype:
    """What the service trains a float32 base in on this CPU (docs/decisions/0014)."""
    return torch.bfloat16 if is_quick_at_bfloat16(torch.device("cpu")) else torch.float32


def make_sd_vae(seed: int = 0) -> AutoencoderKL:
    """Stable Diffusion's autoencoder, which DiTs of these sizes were trained on (arXiv 2212.09748, section 4): f = 8.

    83.7M parameters, here at random: for its time alone.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            latent_channels=4,
            sample_size=8 * LATENT,
        ).eval()


def make_base(name: str, dtype: torch.dtype = torch.float32) -> Base:
    """The service's own view of the same base; a random one borrows the shipped base's schedule and VAE."""
    shipped = load_base(PACKAGED_BASE, dtype=dtype if name == SHIPPED else torch.float32)
    if name == SHIPPED:
        return shipped
    layers, hidden, _ = SHAPES[name]
    transformer = make_transformer(name)
    summary = dataclasses.replace(
        shipped.summary,
        name=f"DiT-{name}",
        fingerprint="0" * 64,
        layers=layers,
        hidden=hidden,
        num_classes=CLASSES,
        sample_size=LATENT,
        image_size=LATENT * shipped.image_size // shipped.sample_size,
        parameters=sum(parameter.numel() for parameter in transformer.parameters()),
    )
    return make_dit(summary, transformer, copy.deepcopy(shipped.schedule), shipped.vae, dtype=dtype)
