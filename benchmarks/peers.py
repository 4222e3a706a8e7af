"""What serves adapters without this engine: diffusers' own DiT with one PEFT LoRA in it, swapped in place.

A LoRA of rank 4 on the attention's four maps, diffusers' default; its swap is what `load_lora_adapter(hotswap=True)`
does, the state dict being parsed and in memory already.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
from peft import LoraConfig, inject_adapter_in_model
from peft.utils.hotswap import check_hotswap_configs_compatible, hotswap_adapter_from_state_dict
from torch import Tensor

from core.diffusion.base import Base

RANK = 4
_NAME = "default"
_CONFIG = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["to_q", "to_k", "to_v", "to_out.0"])


class LoraPipeline:
    """diffusers' DiT pipeline with the base's own null class: its class has ImageNet's 1000 written into it.

    `base` gives shapes and the decoder; the network and the solver are diffusers' own. The adapters are random.
    """

    def __init__(
        self,
        base: Base,
        transformer: DiTTransformer2DModel,
        scheduler: Mapping[str, Any],
        adapters: int,
        strength: float = 0.02,
    ) -> None:
        self._base = base
        self._scheduler = scheduler
        self._strength = strength
        network = inject_adapter_in_model(_CONFIG, copy.deepcopy(transformer), _NAME)
        self._network = network.eval().requires_grad_(False).to(base.dtype)
        self._adapters = [self._random(seed) for seed in range(adapters)]
        self._loaded: int | None = None

    @torch.no_grad()
    def draw(
        self, adapter: int, labels: Sequence[int], seeds: Sequence[int], steps: int, guidance_scale: float
    ) -> np.ndarray:
        """Images (N, s, s, 3) uint8 of one adapter and one step count: a pipeline has one schedule for all its rows."""
        self._swap(adapter)
        base, count = self._base, len(labels)
        shape = (base.channels, base.sample_size, base.sample_size)
        x = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
        classes = torch.tensor([*labels, *[base.num_classes] * count])
        scheduler = DPMSolverMultistepScheduler.from_config(self._scheduler)
        scheduler.set_timesteps(steps)
        for t in scheduler.timesteps:
            both = torch.cat([x, x]).to(base.dtype)
            out = self._network(both, timestep=t.expand(2 * count), class_labels=classes, return_dict=False)[0]
            conditional, unconditional = out[:, : base.channels].float().chunk(2)
            guided = unconditional + guidance_scale * (conditional - unconditional)
            x = scheduler.step(guided, t, x, return_dict=False)[0]
        return base.decode(x)

    def _swap(self, adapter: int) -> None:
        if adapter == self._loaded:
            return
        check_hotswap_configs_compatible(_CONFIG, _CONFIG)
        hotswap_adapter_from_state_dict(self._network, self._adapters[adapter], _NAME, _CONFIG)
        self._loaded = adapter

    def _random(self, seed: int) -> dict[str, Tensor]:
        chance = torch.Generator().manual_seed(seed)
        return {
            name: self._strength * torch.randn(value.shape, generator=chance).to(value.dtype)
            for name, value in self._network.state_dict().items()
            if "lora_" in name
        }
