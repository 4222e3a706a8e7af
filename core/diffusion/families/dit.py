"""Class-conditional DiT (Peebles & Xie, arXiv 2212.09748): diffusers' `DiTTransformer2DModel` in a pipeline folder."""

import math
from collections.abc import Iterator, Set
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
from torch import Tensor, nn

from core.diffusion.base import Base
from core.diffusion.catalog import BaseSummary, base_summary
from core.diffusion.families.adapting import adapt, load_model, load_schedule, load_vae
from core.diffusion.families.dit_block import TrainingBlock
from core.diffusion.families.dit_passes import EAGER, compiled
from core.diffusion.layout import AdapterLayout
from core.diffusion.places import ForwardContext
from core.diffusion.schedule import Schedule
from core.errors import Invalid


class TiedConditioning(nn.Module):
    """Stands where each block had its own embedders: hands out the one conditioning of this forward pass."""

    def __init__(self, context: ForwardContext) -> None:
        super().__init__()
        self._context = context

    def forward(self, timestep: Any, class_labels: Any, hidden_dtype: torch.dtype | None = None) -> Tensor:
        conditioning = self._context.conditioning
        assert conditioning is not None
        return conditioning


class DiTNetwork(nn.Module):
    """diffusers' own transformer and its one time embedder, each place wrapped, in the order of the forward pass."""

    def __init__(self, transformer: DiTTransformer2DModel, context: ForwardContext) -> None:
        super().__init__()
        embedders = tie_embedders(transformer, context)
        self.pos_embed = transformer.pos_embed
        self.timestep_embedder = embedders.timestep_embedder
        self.transformer = transformer
        self._time_proj = embedders.time_proj
        self._context = context
        self._training_blocks: list[TrainingBlock] = []
        adapt(transformer, context)
        adapt(self.timestep_embedder, context, "conditioning.timestep_embedder")

    def join_weights(self) -> None:
        """Make ready for quick training and drawing, once the weights are where and of what type they stay."""
        blocks = self.transformer.transformer_blocks
        if all(TrainingBlock.supports(block) for block in blocks):
            self._training_blocks = [TrainingBlock(block) for block in blocks]

    @property
    def is_quick(self) -> bool:
        """Whether training and drawing run the blocks that are written for them."""
        return bool(self._training_blocks)

    @contextmanager
    def plain(self) -> Iterator[None]:
        """Train and draw by diffusers' own blocks: what the quick ones are measured against."""
        kept, self._training_blocks = self._training_blocks, []
        try:
            yield
        finally:
            self._training_blocks = kept

    def forward(self, x: Tensor, t: Tensor, values: dict[str, Tensor] | None, c_rows: Tensor) -> Tensor:
        """As diffusers' forward, with class rows (B, H) in place of labels."""
        with self._context.hold(values):
            projected = self._time_proj(t).to(x.dtype)  # (B, 256)
            conditioning = self.timestep_embedder(projected) + c_rows  # (B, H)
            if values is not None and torch.is_grad_enabled() and self.is_quick:
                return self._train(x, F.silu(conditioning), values)
            self._context.conditioning = conditioning
            return self.transformer(x, timestep=t, class_labels=None, return_dict=False)[0]  # (B, C_out, h, w)

    def draw(self, x: Tensor, t: Tensor, values: dict[str, Tensor] | None, c_rows: Tensor) -> Tensor:
        """As `forward`, as quickly as it goes where nothing is recorded; equal to it within rounding."""
        if not self.is_quick:
            return self(x, t, values, c_rows)
        transformer: Any = self.transformer
        with torch.no_grad(), self._context.hold(values):
            conditioning = F.silu(self.timestep_embedder(self._time_proj(t).to(x.dtype)) + c_rows)  # (B, H)
            hidden = transformer.pos_embed(x)  # (B, T, H)
            for block in self._training_blocks:
                hidden = block.draw(hidden, conditioning, values or {})
            return self._leave(x, hidden, conditioning)

    def _train(self, x: Tensor, conditioning: Tensor, values: dict[str, Tensor]) -> Tensor:
        """diffusers' forward with blocks whose backward is cheaper; equal to it within rounding."""
        transformer: Any = self.transformer
        hidden = transformer.pos_embed(x).contiguous()  # (B, T, H); what follows keeps its order in memory
        passes = compiled() if self._context.compiled else EAGER
        for block in self._training_blocks:
            hidden = block(hidden, conditioning, values, passes)
        return self._leave(x, hidden, conditioning)

    def _leave(self, x: Tensor, hidden: Tensor, conditioning: Tensor) -> Tensor:
        """What follows the blocks: tokens (B, T, H) to (B, C_out, h, w)."""
        transformer: Any = self.transformer
        shift, scale = transformer.proj_out_1(conditioning).unsqueeze(1).chunk(2, dim=-1)  # (B, 1, H) each
        out = transformer.proj_out_2(transformer.norm_out(hidden) * (1 + scale) + shift)  # (B, T, p p C_out)
        patch, side = transformer.patch_size, math.isqrt(out.shape[1])
        patches = out.view(len(x), side, side, patch, patch, -1)
        return patches.permute(0, 5, 1, 3, 2, 4).reshape(len(x), -1, side * patch, side * patch)


class DiTBase(Base):
    """A DiT base; its only conditioning beside the time is a class row."""

    network: DiTNetwork

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.network.join_weights()

    @property
    def config(self) -> dict[str, Any]:
        return dict(self.network.transformer.config)

    @property
    def can_compile(self) -> bool:
        return self.network.is_quick

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        rows: Tensor | None,
        c_rows: Tensor,
        layout: AdapterLayout | None = None,
        only: Set[str] | None = None,
    ) -> Tensor:
        return self.network(x.to(self.dtype), t, self.values(rows, layout, only), c_rows.to(self.dtype))

    def draw(
        self,
        x: Tensor,
        t: Tensor,
        rows: Tensor | None,
        c_rows: Tensor,
        layout: AdapterLayout | None = None,
        only: Set[str] | None = None,
    ) -> Tensor:
        return self.network.draw(x.to(self.dtype), t, self.values(rows, layout, only), c_rows.to(self.dtype))


def load_dit(folder: Path, device: torch.device, dtype: torch.dtype, name: str | None = None) -> DiTBase:
    """Read a DiTPipeline folder: transformer, scheduler config and, where it has one, the VAE."""
    summary = base_summary(folder, name)
    transformer = load_model(DiTTransformer2DModel, folder / "transformer")
    return make_dit(summary, transformer, load_schedule(folder), load_vae(folder), device, dtype)


def make_dit(
    summary: BaseSummary,
    transformer: DiTTransformer2DModel,
    schedule: Schedule,
    vae: AutoencoderKL | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> DiTBase:
    """A base around a transformer that is in memory already; it is taken over, not copied."""
    context = ForwardContext()
    table = _embedders(transformer, 0).class_embedder.embedding_table.weight
    network = DiTNetwork(transformer, context)
    return DiTBase(summary, network, context, table, schedule, vae, torch.device(device), dtype)


def tie_embedders(transformer: DiTTransformer2DModel, context: ForwardContext) -> Any:
    """Keep the first block's embedders for all; refuse, by name, a block whose copy is another."""
    first = _embedders(transformer, 0)
    wanted = first.state_dict()
    for number in range(len(transformer.transformer_blocks)):
        for key, value in _embedders(transformer, number).state_dict().items():
            if not value.is_meta and not torch.equal(value, wanted[key]):
                raise Invalid(
                    f"transformer_blocks.{number}.norm1.emb.{key} differs from block 0's: the embedders cannot be tied",
                    code="untied_embedders",
                )
        _norm1(transformer, number).emb = TiedConditioning(context)
    return first


def _embedders(transformer: DiTTransformer2DModel, block: int) -> Any:
    return _norm1(transformer, block).emb


def _norm1(transformer: DiTTransformer2DModel, block: int) -> Any:
    return transformer.transformer_blocks[block].norm1
