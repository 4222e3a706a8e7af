"""Text-to-image PixArt (Chen et al., arXiv 2310.00426): diffusers' `PixArtTransformer2DModel` in a pipeline folder.

An adapter's classes are prompts, and a class row is its prompt: embeddings (L, D) and a mask (L,), flat. Nothing of it
trains, so an adapter's class table has no columns (docs/decisions/0012).
"""

from collections.abc import Callable, Sequence, Set
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.transformers.pixart_transformer_2d import PixArtTransformer2DModel
from torch import Tensor, nn

from core.diffusion.base import Base
from core.diffusion.catalog import BaseSummary, base_summary, read_json
from core.diffusion.families.adapting import adapt, load_model, load_schedule, load_vae
from core.diffusion.families.prompts import Prompts
from core.diffusion.layout import AdapterLayout
from core.diffusion.places import AdaptedTable, ForwardContext, PlaceSpec
from core.diffusion.schedule import Schedule
from core.errors import Invalid

TOKENS = {"PixArtAlphaPipeline": 120, "PixArtSigmaPipeline": 300}
_NULL = 0


class PixArtNetwork(nn.Module):
    """diffusers' own transformer, each place wrapped; `forward` is its forward with the tables' offsets in it."""

    def __init__(self, transformer: PixArtTransformer2DModel, context: ForwardContext, pixels: int) -> None:
        super().__init__()
        self.transformer = transformer
        self._context = context
        self._pixels = pixels  # of an image, for each of a latent
        adapt(transformer, context)
        blocks: Any = transformer.transformer_blocks
        self.tables = nn.ModuleList(
            AdaptedTable(block.scale_shift_table, PlaceSpec(f"transformer_blocks.{number}.scale_shift_table"), context)
            for number, block in enumerate(blocks)
        )
        self.table_out = AdaptedTable(transformer.scale_shift_table, PlaceSpec("scale_shift_table"), context)

    def forward(self, x: Tensor, t: Tensor, values: dict[str, Tensor] | None, prompts: Tensor, mask: Tensor) -> Tensor:
        """x (B, C, h, w), prompts (B, L, D), mask (B, L) of 0 and 1."""
        model: Any = self.transformer
        patch, channels = model.config.patch_size, model.out_channels
        height, width = x.shape[-2] // patch, x.shape[-1] // patch
        with self._context.hold(values):
            hidden = model.pos_embed(x)  # (B, T, H)
            embedded = self._embed_time(x, t)  # (B, H)
            modulation = model.adaln_single.linear(F.silu(embedded)).view(len(x), 6, -1)  # (B, 6, H)
            text = prompts if model.caption_projection is None else model.caption_projection(prompts)  # (B, L, H)
            bias = ((1 - mask) * -10_000.0).unsqueeze(1)  # (B, 1, L)
            for block, table in zip(model.transformer_blocks, self.tables, strict=True):
                hidden = block(
                    hidden, encoder_hidden_states=text, encoder_attention_mask=bias, timestep=table(modulation)
                )
            shift, scale = (model.scale_shift_table[None] + self.table_out(embedded[:, None])).chunk(2, dim=1)
            out = model.proj_out(model.norm_out(hidden) * (1 + scale) + shift)  # (B, T, p p C_out)
        patches = out.view(-1, height, width, patch, patch, channels)
        return patches.permute(0, 5, 1, 3, 2, 4).reshape(-1, channels, height * patch, width * patch)

    def _embed_time(self, x: Tensor, t: Tensor) -> Tensor:
        """(B, H): the time, and in larger models the picture's sides in pixels and their ratio."""
        embedder = self.transformer.adaln_single.emb
        embedded = embedder.timestep_embedder(embedder.time_proj(t).to(x.dtype))
        if not embedder.use_additional_conditions:
            return embedded
        height, width = (float(self._pixels * side) for side in x.shape[-2:])
        told = torch.tensor([height, width, height / width], device=x.device)
        told = embedder.additional_condition_proj(told).to(x.dtype)  # (3, 256)
        sides = embedder.resolution_embedder(told[:2].repeat(len(x), 1, 1))  # (B, 2, H / 3)
        ratio = embedder.aspect_ratio_embedder(told[2:].repeat(len(x), 1, 1))  # (B, 1, H / 3)
        return embedded + torch.cat([sides.flatten(1), ratio.flatten(1)], dim=1)


class PixArtBase(Base):
    """A PixArt base. Prompts are numbered as they come, 0 is the null one, and stay for the life of the process."""

    network: PixArtNetwork

    def __init__(
        self,
        summary: BaseSummary,
        network: PixArtNetwork,
        context: ForwardContext,
        encode: Callable[[str], Tensor],
        tokens: int,
        schedule: Schedule,
        vae: AutoencoderKL | None,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self._encode = encode
        self._tokens = tokens
        self._numbers: dict[str, int] = {}
        self._prompts: list[Tensor] = []  # (n, D) each
        assert self._number("") == _NULL
        super().__init__(
            summary, network, context, _row(self._prompts[_NULL], tokens)[None], schedule, vae, device, dtype
        )

    def _set_table(self, table: Tensor) -> None:
        self.class_table = table  # (1, W): the null prompt

    def share(self, other: Base) -> None:
        """Its codec, and its prompts with their encoder."""
        super().share(other)
        assert isinstance(other, PixArtBase)
        self._encode, self._numbers, self._prompts = other._encode, other._numbers, other._prompts

    @property
    def config(self) -> dict[str, Any]:
        return dict(self.network.transformer.config)

    @property
    def row_width(self) -> int:
        return 0

    def start_indices(self, classes: Sequence[str], class_start: Sequence[int | None]) -> Tensor:
        """The prompts' numbers, then the null prompt's. Raises Invalid for one that cannot be encoded."""
        if any(start is not None for start in class_start):
            raise Invalid("class_start names a class of the base: this base has prompts, and no classes")
        return torch.tensor([*map(self._number, classes), _NULL])

    def class_starts(self, starts: Tensor) -> Tensor:
        """Prompts (B, W) by number, W = L (D + 1)."""
        return torch.stack([_row(self._prompts[number], self._tokens) for number in starts.tolist()]).to(self.device)

    def class_rows(self, starts: Tensor, differences: Tensor) -> Tensor:
        return starts

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        rows: Tensor | None,
        c_rows: Tensor,
        layout: AdapterLayout | None = None,
        only: Set[str] | None = None,
    ) -> Tensor:
        prompts = c_rows.to(self.dtype).view(len(x), self._tokens, -1)
        # Prompts of a mix are added up by shares that come to one within rounding.
        mask = (prompts[..., -1] > 0.5).to(self.dtype)
        return self.network(x.to(self.dtype), t, self.values(rows, layout, only), prompts[..., :-1], mask)

    def _number(self, prompt: str) -> int:
        if prompt not in self._numbers:
            self._prompts.append(self._encode(prompt))
            self._numbers[prompt] = len(self._prompts) - 1
        return self._numbers[prompt]


def _row(prompt: Tensor, tokens: int) -> Tensor:
    """(L (D + 1),): embeddings (n, D), each with a 1 behind it, and zeros up to the L-th."""
    return F.pad(F.pad(prompt, (0, 1), value=1.0), (0, 0, 0, tokens - len(prompt))).flatten()


def load_pixart(folder: Path, device: torch.device, dtype: torch.dtype, name: str | None = None) -> PixArtBase:
    """Read a PixArt pipeline folder: transformer, scheduler config, VAE, and prompts or a text encoder."""
    summary = base_summary(folder, name)
    transformer = load_model(PixArtTransformer2DModel, folder / "transformer")
    tokens = TOKENS[read_json(folder / "model_index.json")["_class_name"]]
    encode = Prompts(folder, tokens, device)
    return make_pixart(summary, transformer, load_schedule(folder), encode, tokens, load_vae(folder), device, dtype)


def make_pixart(
    summary: BaseSummary,
    transformer: PixArtTransformer2DModel,
    schedule: Schedule,
    encode: Callable[[str], Tensor],
    tokens: int,
    vae: AutoencoderKL | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> PixArtBase:
    """A base around a transformer that is in memory already; `encode` gives the embeddings (n, D) of a prompt."""
    context = ForwardContext()
    network = PixArtNetwork(transformer, context, summary.image_size // summary.sample_size)
    return PixArtBase(summary, network, context, encode, tokens, schedule, vae, torch.device(device), dtype)
