"""`python -m benchmarks.train_step`: one training step of ours against what public code does, in one run.

| side | what it is |
|---|---|
| ours | `core.training.loop.advance`, latents encoded once, adapter-only AdamW and EMA, training blocks |
| full | (a) diffusers' training loop: every weight, AdamW, `EMAModel`, clip at 1, the VAE online |
| lora-qkv, lora-all | (b) PEFT's LoRA of rank 8 on q, k, v, or on every linear map of the blocks; the VAE online |
| names | (c) DiffFit by names (`bias`, `norm`, `gamma`, class embedder) on diffusers' model, EMA over all weights |

Every side trains on the same shapes in float32; `model` times are on latents handed to all, `whole` times add the VAE
as each uses it: the others encode each batch, ours each image of a dataset of 200 once in the 880 steps that `auto`
takes for them. The VAE is the shipped base's, of 0.9M parameters, for all; `speedup_sd_vae` has Stable Diffusion's of
84M for S/2 and B/2, on which DiTs of these sizes were trained. Bytes: parameters, gradients, optimizer state, EMA and
saved activations, counted; temporaries are not.

`speedup_default` is the service's own default (bfloat16 on CPUs that are quick at it, docs/decisions/0014);
`speedup_both_bfloat16` has the others' loop under autocast to bfloat16, as `accelerate --mixed_precision bf16` does it.
"""

import argparse
import functools
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.training_utils import EMAModel
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from benchmarks import measure
from benchmarks.bases import SHIPPED, make_base, make_sd_vae, make_transformer, training_dtype
from core.diffusion.base import Base
from core.diffusion.families.dit import DiTBase
from core.training import checkpoint
from core.training.data import TrainingData
from core.training.loop import advance, start
from core.training.machine import numeric_path
from core.training.path import RowPath
from core.training.spec import resolve
from core.training.trainee import Trainee

SEED = 0
IMAGES, STEPS = 200, 880  # a small dataset, and what `auto` takes for it
CLASSES = 4
QUICK = ((SHIPPED, 8), (SHIPPED, 32), ("S/2", 8))
EVERY = (*QUICK, ("S/2", 32), ("B/2", 8), ("B/2", 32))
QKV = ["to_q", "to_k", "to_v"]
EVERY_LINEAR = [*QKV, "to_out.0", "net.0.proj", "net.2"]


@dataclass(frozen=True)
class Side:
    """One way to train: a step on latents, and what it holds."""

    step: Callable[[], object]
    held: Callable[[], int]  # parameters, gradients, states
    state_bytes: int  # what a checkpoint to go on from holds


class _Scaled(nn.Module):
    """A module with γ on its output, as public DiffFit code patches it in."""

    def __init__(self, inner: nn.Module, width: int) -> None:
        super().__init__()
        self.inner = inner
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, *args: object, **kwargs: object) -> Tensor:
        return self.inner(*args, **kwargs) * self.gamma


def ours(base: Base, batch: int, rows: RowPath = "row", compiled: bool = False) -> Side:
    chance = torch.Generator().manual_seed(SEED)
    shape = (IMAGES, 1, base.channels, base.sample_size, base.sample_size)
    every = torch.arange(IMAGES)
    names = tuple(f"class-{number}" for number in range(CLASSES))
    mean = torch.randn(shape, generator=chance)
    data = TrainingData(mean, torch.full(shape, 0.01), every % CLASSES, names, every, every[:0], "latents")
    asked = {"steps": 20_000, "batch_size": batch, "validation_every": 20_000}
    spec = resolve(asked, images=IMAGES, classes=CLASSES, base=base.summary, seed=SEED)
    state = start(base, data, spec)
    trainee = Trainee(base, data, spec, state, numeric_path(base, spec, rows, compiled))
    vectors = [state.vector, state.first, state.second, state.average]
    own = 4 * state.vector.nbytes  # vector, gradient and both moments; the EMA is in `vectors`

    def held() -> int:
        return measure.nbytes(base.network.parameters()) + own + vectors[-1].nbytes

    saved = len(checkpoint.dump(state, spec.digest, data.digest, trainee.path.to_json()))
    return Side(lambda: advance(base, [trainee]), held, saved)


def theirs(kind: str, name: str, base: Base, batch: int) -> Side:
    """A public training loop on diffusers' own model."""
    model = make_transformer(name, SEED).train()
    if kind.startswith("lora"):
        model.requires_grad_(False)
        targets = QKV if kind == "lora-qkv" else EVERY_LINEAR
        inject_adapter_in_model(LoraConfig(r=8, lora_alpha=8, target_modules=targets), model)
    elif kind == "names":
        width = base.hidden
        blocks: Any = model.transformer_blocks
        for number, block in enumerate(blocks):
            if number < len(blocks) // 2:
                block.attn1, block.ff = _Scaled(block.attn1, width), _Scaled(block.ff, width)
        for parameter_name, parameter in model.named_parameters():
            wanted = ("bias", "norm", "gamma", "class_embedder")
            # `norm` by name would also take adaLN's matrices: public code means the norms' own parameters.
            is_matrix = parameter.ndim > 1 and "class_embedder" not in parameter_name
            parameter.requires_grad_(any(word in parameter_name for word in wanted) and not is_matrix)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=1e-2)
    has_average = not kind.startswith("lora")
    average = EMAModel(model.parameters(), decay=0.9999) if has_average else None
    latents = torch.randn(batch, base.channels, base.sample_size, base.sample_size)
    labels = torch.arange(batch) % CLASSES

    def step() -> None:
        noise = torch.randn_like(latents)
        t = torch.randint(0, len(base.schedule), (batch,))
        noisy = base.schedule.add_noise(latents, noise, t)
        predicted = model(noisy, timestep=t, class_labels=labels).sample[:, : base.channels]
        F.mse_loss(predicted, noise).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        if average is not None:
            average.step(model.parameters())
        optimizer.zero_grad()

    def states() -> list[Tensor]:
        held = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
        return held + ([] if average is None else list(average.shadow_params))

    def held() -> int:
        gradients = sum(parameter.nbytes for parameter in trained)
        return measure.nbytes(model.parameters()) + gradients + measure.nbytes(states())

    step()
    checkpointed = measure.nbytes(states()) + sum(parameter.nbytes for parameter in trained)
    return Side(step, held, checkpointed)


def peak_bytes(side: Side, parameters: list[Tensor]) -> int:
    saved = measure.Saved(parameters)
    with saved.watch():
        side.step()
    return side.held() + saved.bytes


@dataclass(frozen=True)
class Encoding:
    """Seconds of an image through a VAE."""

    float32: float
    bfloat16: float

    def once(self) -> float:
        """A step's part of encoding each image once, in float32 as the service does it."""
        return self.float32 * IMAGES / STEPS

    def added(self, seconds: dict[str, float], batch: int) -> dict[str, float]:
        """Whole steps of the sides: ours encodes an image once, the others each batch, by autocast where they do."""
        online = {side: batch * (self.bfloat16 if side == "full, bfloat16" else self.float32) for side in seconds}
        once = self.once()
        return {side: own + (once if side.startswith("ours") else online[side]) for side, own in seconds.items()}


def encoding(vae: AutoencoderKL, latent: int) -> Encoding:
    """Of pictures whose latents have the side `latent`, eight at a time."""
    side = latent * 2 ** (len(vae.config["block_out_channels"]) - 1)
    pixels = torch.rand(8, 3, side, side) * 2 - 1

    @torch.no_grad()
    def encode(dtype: torch.dtype) -> Tensor:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            return vae.encode(pixels).latent_dist.sample()

    sides = {str(dtype): functools.partial(encode, dtype) for dtype in (torch.float32, torch.bfloat16)}
    return Encoding(*(seconds / len(pixels) for seconds in measure.interleaved(sides, 3).values()))


@functools.cache
def sd_encoding(latent: int) -> Encoding:
    return encoding(make_sd_vae(), latent)


def measure_at(name: str, batch: int, repeats: int) -> dict[str, Any]:
    base, half = make_base(name), make_base(name, torch.bfloat16)
    assert isinstance(base, DiTBase)
    own, lean, fused = ours(base, batch), ours(half, batch), ours(base, batch, "fused")

    def plain() -> None:
        with base.network.plain():
            own.step()

    kinds = ("full", "lora-qkv", "lora-all", "names")
    others = {kind: theirs(kind, name, base, batch) for kind in kinds}

    def full_autocast() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            others["full"].step()

    sides = {
        "ours": own.step,
        **{kind: side.step for kind, side in others.items()},
        "ours, plain blocks": plain,
        "ours, fused rows": fused.step,
        "ours, compiled": ours(base, batch, compiled=True).step,
        "ours, bfloat16": lean.step,
        "ours, bfloat16, compiled": ours(half, batch, compiled=True).step,
        "full, bfloat16": full_autocast,
    }
    seconds = measure.interleaved(sides, repeats)
    assert base.vae is not None
    vae = encoding(base.vae, base.sample_size)
    sd_vae = vae if name == SHIPPED else sd_encoding(base.sample_size)
    memory = {"ours": peak_bytes(own, list(base.network.parameters()))}
    memory |= {kind: peak_bytes(side, []) for kind, side in others.items() if kind == "full"}
    whole, whole_sd = vae.added(seconds, batch), sd_vae.added(seconds, batch)
    row: dict[str, Any] = {
        "base": name,
        "batch_size": batch,
        "seconds": {side: round(value, 4) for side, value in seconds.items()},
        "encoding_online": round(batch * vae.float32, 4),
        "encoding_once_per_step": round(vae.once(), 4),
        "encoding_online_sd_vae": round(batch * sd_vae.float32, 4),
        "peak_bytes": memory,
        "checkpoint_bytes": {"ours": own.state_bytes} | {kind: side.state_bytes for kind, side in others.items()},
        "model_speedup": seconds["full"] / seconds["ours"],
        "speedup": whole["full"] / whole["ours"],
        "speedup_vs_lora": min(seconds["lora-qkv"], seconds["lora-all"]) / seconds["ours"],
        "speedup_vs_names": seconds["names"] / seconds["ours"],
        "speedup_bfloat16": whole["full"] / whole["ours, bfloat16"],
        "speedup_both_bfloat16": whole["full, bfloat16"] / whole["ours, bfloat16"],
        "speedup_sd_vae": whole_sd["full"] / whole_sd["ours"],
        "speedup_sd_vae_both_bfloat16": whole_sd["full, bfloat16"] / whole_sd["ours, bfloat16"],
        "memory": memory["ours"] / memory["full"],
        "ablation": {
            "without training blocks": seconds["ours, plain blocks"] / seconds["ours"],
            "without cached latents": (seconds["ours"] + batch * vae.float32) / whole["ours"],
            "with fused rows": seconds["ours, fused rows"] / seconds["ours"],
            "compiled": seconds["ours, compiled"] / seconds["ours"],
            "compiled, bfloat16": seconds["ours, bfloat16, compiled"] / seconds["ours, bfloat16"],
        },
    }
    shown = ", ".join(f"{side} {value:.3f}" for side, value in seconds.items())
    print(f"{name} batch {batch}: {shown} s; encoding {batch * vae.float32:.3f} s")
    print(
        f"   model {row['model_speedup']:.2f}x, whole {row['speedup']:.2f}x, bfloat16 {row['speedup_bfloat16']:.2f}x, "
        f"both in bfloat16 {row['speedup_both_bfloat16']:.2f}x, with SD's VAE {row['speedup_sd_vae']:.2f}x, "
        f"LoRA {row['speedup_vs_lora']:.2f}x, names {row['speedup_vs_names']:.2f}x, memory {row['memory']:.2f}",
        flush=True,
    )
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three of the six shapes; keep nothing")
    parser.add_argument("--keep", action="store_true", help="with --quick: keep the result nevertheless")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(SEED)
    rows: list[dict[str, Any]] = []
    for name, batch in QUICK if args.quick else EVERY:
        rows.append(measure_at(name, batch, repeats=7 if name == SHIPPED else 3))

    def worst(key: str, batch: int | None = None, largest: bool = False) -> float:
        values = [row[key] for row in rows if batch in (None, row["batch_size"])]
        return max(values) if largest else min(values)

    result = {
        "speedup_vs_full": worst("speedup"),
        "model_speedup_batch8": worst("model_speedup", 8),
        "model_speedup_batch32": worst("model_speedup", 32),
        "speedup_default": worst("speedup_bfloat16" if training_dtype() == torch.bfloat16 else "speedup"),
        "speedup_bfloat16": worst("speedup_bfloat16"),
        "speedup_both_bfloat16": worst("speedup_both_bfloat16"),
        "speedup_sd_vae": worst("speedup_sd_vae"),
        "speedup_sd_vae_both_bfloat16": worst("speedup_sd_vae_both_bfloat16"),
        "speedup_vs_lora": worst("speedup_vs_lora"),
        "speedup_vs_names": worst("speedup_vs_names"),
        "memory_vs_full": worst("memory", largest=True),
        "median_speedup": statistics.median(row["speedup"] for row in rows),
        "rows": rows,
    }
    measure.record("train_step", result, SEED, keep=args.keep or not args.quick)


if __name__ == "__main__":
    main()
