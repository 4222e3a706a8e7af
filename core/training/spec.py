"""What a job trains, fully resolved: every `auto` is a number before the first step. No torch here."""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from core.diffusion.catalog import MAX_SIZE_FACTOR, BaseSummary
from core.diffusion.layout import GammaDepth, Kind, LayoutOptions
from core.errors import Invalid
from core.training.hyperparameters import MAX_DEVICES, Asker

ClassStart = Literal["mean", "best"]
XL_LEARNING_RATE, XL_HIDDEN = 1e-4, 1152
"""What DiT-XL/2 is pretrained with (arXiv 2212.09748, section 4); a job takes ten times that (arXiv 2304.06648)."""
POINTER = "/method/difffit/hyperparameters"
MAX_STEPS = 20_000
MAX_AUTO_RATE = 1e-3
"""Of a base's own rate: a job's auto rate stays within ten times this, however narrow the base."""
MAX_SEED = 2**63 - 1


@dataclass(frozen=True)
class TrainSpec:
    """A job's hyperparameters. Two jobs of equal spec, data and numeric path end in the same bytes."""

    seed: int
    steps: int
    batch_size: int
    learning_rate: float
    warmup_steps: int
    rate_decay: float
    image_size: int
    """Side in pixels; above the base's own, its positions are spread over the larger grid."""
    layout: Kind
    gamma_depth: GammaDepth
    gamma_places: tuple[str, ...]
    class_start: ClassStart
    ema_decay: float
    clip_norm: float
    label_dropout: float
    flip: bool
    min_snr_gamma: float | None
    metrics_every: int
    validation_every: int
    checkpoint_every: int
    preview_every: int | None
    preview_images: int
    preview_steps: int
    devices: int = 1
    time_shift: float = 1.0
    """Above 1, more of the times that a step draws are noisy ones; 1 is uniform."""

    @property
    def digest(self) -> str:
        """sha256 of the spec's canonical JSON."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        depth = list(self.gamma_depth) if isinstance(self.gamma_depth, tuple) else self.gamma_depth
        return {**asdict(self), "gamma_depth": depth, "gamma_places": list(self.gamma_places)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "TrainSpec":
        """Read back what `to_json` wrote."""
        depth = data["gamma_depth"]
        changed = {"gamma_depth": tuple(depth) if isinstance(depth, list) else depth}
        return cls(**{**data, **changed, "gamma_places": tuple(data["gamma_places"])})


def resolve(
    hyperparameters: Mapping[str, Any],
    *,
    images: int,
    classes: int,
    base: BaseSummary,
    seed: int,
    max_steps: int = MAX_STEPS,
    max_devices: int = MAX_DEVICES,
    pointer: str = POINTER,
) -> TrainSpec:
    """The spec of a request on a dataset of so many images and classes; a field that is out of bounds is named.

    The autos, and why:
    * `batch_size` 8: at equal compute, 200 steps of 8 ended lower than 100 of 16 (held-out loss 0.240 against 0.249,
      digits on the shipped base).
    * `steps`: 800 and two more per five images, up to 2,000. A style is there after some hundred (kernel distance to
      line art 474 after 220, 433 after 440 with the rate below), what a class looks like takes longer: of 200 digits
      drawn 0.69 are the one asked for after 520 steps, 0.88 after 1,040 (benchmarks.digits).
    * `learning_rate` ten times the base's own, the paper's best; where the base does not say, 1e-4 at the width of
      DiT-XL and more in proportion for a narrower one (on the shipped base 1e-2 ended at 0.236, 3e-3 at 0.249, 1e-3
      at 0.272). A short warm-up lets Adam's second moment fill.
    * `rate_decay` 0.7: 440 steps whose rate falls to zero over the last 70 % end where 1,320 at a constant rate do
      (kernel distance 501 against 504; 660 constant ones 559; line art, shipped base, docs/log.md).
    * `time_shift` 3: what a class looks like as a whole is decided where noise prevails, and a job is short (of 200
      digits drawn 0.88 are the one that was asked for, 0.63 with uniform times; benchmarks.digits). Uniform, as in
      the paper, for bases that predict ε: not measured there.
    * `ema_decay` 0.999 with warm-up min(d, (1+k)/(10+k)), so that a short job's average forgets its first steps.
    * `image_size` the base's own: twice that costs about five times as much a step.
    * `flip` off: mirroring is wrong for digits, letters and signs, and the caller alone knows.
    * `devices` 1: more of them only make a step of a large base shorter.
    * `class_start` mean: see `core.training.class_start` for what was measured.
    """
    ask = Asker(hyperparameters, pointer, max_steps)
    ask.refuse_unknown()
    batch_size = ask.whole("batch_size", 8)
    steps = _steps(ask, images, batch_size, max_steps)
    kind: Kind = ask.choice("layout", "difffit")
    options = _layout_options(ask, kind, base)
    preview_every = ask.optional_whole("preview_every", max(1, math.ceil(steps / 4)))
    return TrainSpec(
        seed=_seed(seed),
        steps=steps,
        batch_size=batch_size,
        learning_rate=_learning_rate(ask, base),
        warmup_steps=ask.whole("warmup_steps", min(20, steps // 5)),
        rate_decay=ask.real("rate_decay", 0.7),
        image_size=_image_size(ask, base),
        layout=kind,
        gamma_depth=options.gamma_depth,
        gamma_places=options.gamma_places,
        class_start=_class_start(ask, base),
        ema_decay=ask.real("ema_decay", 0.999),
        clip_norm=ask.real("clip_norm", 1.0),
        label_dropout=ask.real("label_dropout", 0.1),
        flip=ask.flag("flip", False),
        min_snr_gamma=ask.optional_real("min_snr_gamma", None),
        metrics_every=ask.whole("metrics_every", max(1, steps // 100)),
        validation_every=ask.whole("validation_every", max(1, math.ceil(steps / 10))),
        checkpoint_every=ask.whole("checkpoint_every", max(1, math.ceil(steps / 10))),
        preview_every=preview_every,
        preview_images=ask.whole("preview_images", max(1, min(classes, 4))),
        preview_steps=ask.whole("preview_steps", 15),
        devices=_devices(ask, batch_size, max_devices),
        time_shift=ask.real("time_shift", 1.0 if base.prediction == "epsilon" else 3.0),
    )


def _steps(ask: Asker, images: int, batch_size: int, max_steps: int) -> int:
    if ask.is_given("n_epochs"):
        if ask.is_given("steps"):
            raise Invalid("steps and n_epochs exclude each other", pointer=ask.pointer("n_epochs"))
        epochs = ask.real("n_epochs", 1.0)
        steps = max(1, math.ceil(epochs * images / batch_size))
        if steps > max_steps:
            raise Invalid(
                f"n_epochs of {images} images at batch {batch_size} come to {steps} steps; at most {max_steps}",
                pointer=ask.pointer("n_epochs"),
            )
        return steps
    return ask.whole("steps", min(800 + 2 * images // 5, 2000, max_steps))


def _class_start(ask: Asker, base: BaseSummary) -> ClassStart:
    if base.conditioning == "text" and ask.is_given("class_start"):
        raise Invalid(
            f"{base.name} draws by prompts: its classes have no rows to start from", pointer=ask.pointer("class_start")
        )
    return ask.choice("class_start", "mean")


def _image_size(ask: Asker, base: BaseSummary) -> int:
    own, unit = base.image_size, base.size_unit
    size = ask.whole_within("image_size", own, own, MAX_SIZE_FACTOR * own)
    if size % unit and size != own:
        raise Invalid(f"image_size must be a multiple of {unit}", pointer=ask.pointer("image_size"))
    return size


def _devices(ask: Asker, batch_size: int, max_devices: int) -> int:
    devices = ask.whole("devices", 1)
    if devices > max_devices:
        raise Invalid(
            f"devices is {devices}; this service trains a job on at most {max_devices}", pointer=ask.pointer("devices")
        )
    if devices > batch_size:
        raise Invalid(
            f"devices is {devices}, but a batch of {batch_size} has no row for each", pointer=ask.pointer("devices")
        )
    return devices


def _learning_rate(ask: Asker, base: BaseSummary) -> float:
    if ask.is_given("learning_rate"):
        if ask.is_given("learning_rate_multiplier"):
            raise Invalid(
                "learning_rate and learning_rate_multiplier exclude each other", pointer=ask.pointer("learning_rate")
            )
        return ask.real("learning_rate", 0.0)
    own = base.learning_rate or XL_LEARNING_RATE * max(1.0, XL_HIDDEN / base.hidden)
    return min(own, MAX_AUTO_RATE) * ask.real("learning_rate_multiplier", 10.0)


def _layout_options(ask: Asker, kind: Kind, base: BaseSummary) -> LayoutOptions:
    try:
        options = LayoutOptions.resolve(kind, ask.given("gamma_depth"), ask.given("gamma_places"))
        options.blocks(base.layers)
    except Invalid as error:
        raise Invalid(str(error), code=error.code, pointer=ask.pointer((error.pointer or "").strip("/"))) from error
    return options


def _seed(seed: object) -> int:
    if type(seed) is not int or not 0 <= seed <= MAX_SEED:
        raise Invalid(f"seed must be a whole number from 0 to {MAX_SEED}", pointer="/seed")
    return seed
