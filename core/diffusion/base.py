"""A frozen base: what every family answers to. Nothing of it is ever written; one thread at a time runs it."""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence, Set
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from core.diffusion.catalog import BaseSummary, Prediction
from core.diffusion.layout import GAMMA_PLACES, AdapterLayout, Kind, LayoutOptions
from core.diffusion.places import AdaptedAffine, AdaptedNorm, AdaptedTable, ForwardContext
from core.diffusion.schedule import Schedule
from core.errors import Invalid

_CODEC_BATCH = 16


class Base(ABC):
    """One pretrained model with its schedule, its codec and its class rows, on one device."""

    def __init__(
        self,
        summary: BaseSummary,
        network: nn.Module,
        context: ForwardContext,
        class_table: Tensor,
        schedule: Schedule,
        vae: Any | None,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.summary = summary
        self.device = device
        self.dtype = dtype
        self.network = network.to(device, dtype).eval().requires_grad_(False)
        self.context = context
        self._set_table(class_table.detach().float().to(device))
        self.schedule = schedule.to(device)
        self.vae = None if vae is None else vae.to(device).eval().requires_grad_(False)
        self._layouts: dict[tuple[object, ...], AdapterLayout] = {}

    def _set_table(self, table: Tensor) -> None:
        self.class_table = table  # (num_classes + 1, H), the last is the null row
        self._starts = torch.cat([table, table[:-1].mean(0, keepdim=True)])

    def share(self, other: "Base") -> None:
        """Use the codec of `other`, which is of the same folder, so that it is in memory once."""
        self.vae = other.vae

    def set_classes(self, table: Tensor, names: Sequence[str]) -> None:
        """Classes of its own for a base that an adapter was folded into: table (len(names) + 1, H), null row last."""
        self._set_table(table)
        named = dict(enumerate(names))
        self.summary = dataclasses.replace(self.summary, num_classes=len(named), id2label=named)

    @property
    def name(self) -> str:
        return self.summary.name

    @property
    def fingerprint(self) -> str:
        return self.summary.fingerprint

    @property
    def hidden(self) -> int:
        return self.summary.hidden

    @property
    def num_classes(self) -> int:
        return self.summary.num_classes

    @property
    def id2label(self) -> dict[int, str]:
        return self.summary.id2label

    @property
    def sample_size(self) -> int:
        """Side of a latent."""
        return self.summary.sample_size

    @property
    def image_size(self) -> int:
        """Side in pixels."""
        return self.summary.image_size

    @property
    def channels(self) -> int:
        return self.summary.channels

    @property
    def learned_sigma(self) -> bool:
        return self.summary.learned_sigma

    @property
    def prediction(self) -> Prediction:
        return self.summary.prediction

    @property
    def licence(self) -> str | None:
        return self.summary.licence

    @property
    @abstractmethod
    def config(self) -> dict[str, Any]:
        """The transformer's configuration."""

    @property
    def can_compile(self) -> bool:
        """Whether training has passes that torch can compile."""
        return False

    @abstractmethod
    def forward(
        self,
        x: Tensor,
        t: Tensor,
        rows: Tensor | None,
        c_rows: Tensor,
        layout: AdapterLayout | None = None,
        only: Set[str] | None = None,
    ) -> Tensor:
        """Predict (B, C_out, h, w) from x (B, C, h, w) at times t (B,) with class rows c_rows (B, H).

        `rows` is (B, P) of `layout` (default: this base's `difffit`), or (P,) when the whole batch shares one adapter,
        or None for the bare base. `only` names the entries that are not zero in all rows: the others' work is skipped,
        which changes no bit.
        """

    def draw(
        self,
        x: Tensor,
        t: Tensor,
        rows: Tensor | None,
        c_rows: Tensor,
        layout: AdapterLayout | None = None,
        only: Set[str] | None = None,
    ) -> Tensor:
        """As `forward`, within rounding of it, where no gradient is wanted: a family may do it more quickly."""
        return self.forward(x, t, rows, c_rows, layout, only)

    def values(
        self, rows: Tensor | None, layout: AdapterLayout | None, only: Set[str] | None
    ) -> dict[str, Tensor] | None:
        """What the places get to see of the rows."""
        if rows is None:
            return None
        values = (layout or self.layout()).split(rows.to(self.dtype))
        return values if only is None else {name: value for name, value in values.items() if name in only}

    def places(self) -> Iterator[AdaptedAffine | AdaptedNorm | AdaptedTable]:
        """Every adapted module, in the network's order."""
        for module in self.network.modules():
            if isinstance(module, AdaptedAffine | AdaptedNorm | AdaptedTable):
                yield module

    def layout(self, kind: Kind = "difffit", gamma_depth: object = None, gamma_places: object = None) -> AdapterLayout:
        """The layout of a kind on this base; the same object for the same options."""
        options = LayoutOptions.resolve(kind, gamma_depth, gamma_places)
        key = (kind, options)
        if key not in self._layouts:
            shapes = self._shapes(kind, options)
            self._layouts[key] = AdapterLayout.build(kind, shapes, self.row_width, options)
        return self._layouts[key]

    def widest_layout(self) -> AdapterLayout:
        """One that has room for every adapter of this base: γ in all blocks and places."""
        return self.layout(gamma_depth="all", gamma_places=GAMMA_PLACES)

    def _shapes(self, kind: Kind, options: LayoutOptions) -> list[tuple[str, tuple[int, ...]]]:
        blocks = options.blocks(self.summary.layers)
        shapes: list[tuple[str, tuple[int, ...]]] = []
        for place in self.places():
            if isinstance(place, AdaptedTable):
                shapes.append((place.spec.name, tuple(place.table.shape)))
                continue
            inner, spec = place.inner, place.spec
            if isinstance(inner, nn.LayerNorm):
                if kind == "difffit":
                    shapes.append((f"{spec.name}.weight", tuple(inner.weight.shape)))
                if inner.bias is not None:
                    shapes.append((f"{spec.name}.bias", tuple(inner.bias.shape)))
                continue
            if inner.bias is not None:
                shapes.append((f"{spec.name}.bias", tuple(inner.bias.shape)))
            width = inner.weight.shape[0]
            shapes += [
                (gamma.name, (width,))
                for gamma in spec.gammas
                if gamma.block in blocks and gamma.place in options.gamma_places
            ]
        return shapes

    @property
    def row_width(self) -> int:
        """Values of a class row that train; 0 where classes are prompts, of which nothing trains."""
        return self.hidden

    def start_indices(self, classes: Sequence[str], class_start: Sequence[int | None]) -> Tensor:
        """(C + 1,) indices for `class_starts`: where each class of an adapter starts, then the null row."""
        mean_row = self.num_classes + 1
        rows = [mean_row if start is None else start for start in class_start]
        indices = torch.tensor([*rows, self.num_classes])
        if int(indices.max()) > mean_row or int(indices.min()) < 0:
            raise Invalid("class_start names a class that the base does not have")
        return indices

    def class_starts(self, starts: Tensor) -> Tensor:
        """Start rows (B, H) by class of the base; num_classes is the null row, num_classes + 1 the mean row."""
        return self._starts[starts]

    def class_rows(self, starts: Tensor, differences: Tensor) -> Tensor:
        """What `forward` is conditioned on, of start rows (B, H) and what training added to them (B, row_width)."""
        return starts + differences

    @torch.no_grad()
    def encode(self, images: np.ndarray, moved: Callable[[], None] = lambda: None) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (N, C, h, w) of the latents of images (N, s, s, 3) uint8; on the CPU.

        `moved` is called after every few of them.
        """
        means, deviations = [], []
        for start in range(0, len(images), _CODEC_BATCH):
            pixels = torch.from_numpy(np.ascontiguousarray(images[start : start + _CODEC_BATCH]))
            x = pixels.permute(0, 3, 1, 2).to(self.device).float() / 127.5 - 1  # (n, 3, s, s)
            if self.vae is None:
                mean, deviation = x, torch.zeros_like(x)
            else:
                posterior = self.vae.encode(x).latent_dist
                shift, scale = self._vae_scaling
                mean, deviation = (posterior.mean - shift) * scale, posterior.std * scale
            means.append(mean.cpu())
            deviations.append(deviation.cpu())
            moved()
        return torch.cat(means), torch.cat(deviations)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> np.ndarray:
        """Images (N, s, s, 3) uint8 of latents (N, C, h, w)."""
        images = []
        for chunk in latents.to(self.device).float().split(_CODEC_BATCH):
            if self.vae is None:
                x = chunk
            else:
                shift, scale = self._vae_scaling
                x = self.vae.decode(chunk / scale + shift).sample
            pixels = (x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1) * 255  # (n, s, s, 3)
            images.append(pixels.round().to(torch.uint8).cpu())
        return torch.cat(images).numpy()

    @property
    def _vae_scaling(self) -> tuple[float, float]:
        """What is taken from a latent, and what it is then multiplied by."""
        if self.vae is None:
            return 0.0, 1.0
        return float(self.vae.config.get("shift_factor") or 0.0), float(self.vae.config["scaling_factor"])
