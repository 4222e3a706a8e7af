"""What can be said of a base from its folder alone, without torch: for the API, and for the fingerprint of adapters."""

import hashlib
import json
import re
import struct
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any, Literal

from core.errors import Invalid, NotFound

Prediction = Literal["epsilon", "v_prediction", "flow"]
MAX_HEADER_BYTES = 64 * 1024**2
MAX_SIZE_FACTOR = 2
"""Pictures have at most so many times the side of the base's own: attention grows with the fourth power."""
_PARTS = ("prompts", "scheduler", "text_encoder", "tokenizer", "transformer", "vae")
_CLASS_CONDITIONED = ("DiTTransformer2DModel", "Transformer2DModel")
_TEXT_CONDITIONED = ("PixArtTransformer2DModel",)
_COPIES = re.compile(r"transformer_blocks\.[1-9]\d*\.norm1\.emb\.")
_FILES = ["model_index.json", "training.json", "README.md", "*/*.json", "*/*.safetensors", "tokenizer/*"]


@dataclass(frozen=True)
class BaseSummary:
    """A base as a caller sees it. Sizes are sides of squares: `image_size` in pixels, `sample_size` in latents."""

    name: str
    fingerprint: str
    image_size: int
    sample_size: int
    channels: int
    patch_size: int
    layers: int
    hidden: int
    num_classes: int
    id2label: dict[int, str]
    prediction: Prediction
    learned_sigma: bool
    """Whether it says its variance too: twice the channels. What a flow has there means nothing to us."""
    has_vae: bool
    parameters: int
    """Weights of the transformer, the embedders' copies counted once."""
    licence: str | None
    learning_rate: float | None
    """What the base itself was trained with, where its `training.json` says so."""
    conditioning: Literal["class", "text"] = "class"
    """What it draws by: a class of its own, or a prompt; a text base has no classes."""

    @property
    def size_unit(self) -> int:
        """Pixels of a patch: what the side of a picture must be a multiple of."""
        return self.image_size // self.sample_size * self.patch_size


def locate(path_or_hub_name: str) -> Path:
    """The folder of a base: the path itself where it is one, else the hub's snapshot (safetensors and configs only)."""
    folder = Path(path_or_hub_name)
    if folder.is_dir():
        return folder
    if folder.is_absolute() or path_or_hub_name.count("/") != 1:
        raise NotFound(f"base {path_or_hub_name}: no such folder, and no hub name of the form owner/name")
    try:
        from huggingface_hub import snapshot_download  # noqa: PLC0415 - comes with the worker's packages
    except ImportError as error:
        raise NotFound(f"base {path_or_hub_name}: no such folder, and huggingface_hub is not installed") from error
    try:
        return Path(snapshot_download(path_or_hub_name, allow_patterns=_FILES))
    except Exception as error:
        raise NotFound(f"base {path_or_hub_name}: neither a folder nor to be had from the hub ({error})") from error


def base_summary(folder: str | Path, name: str | None = None) -> BaseSummary:
    """Read configs and weight headers of a pipeline folder."""
    folder = Path(folder)
    index = read_json(folder / "model_index.json")
    config = read_json(folder / "transformer" / "config.json")
    kind = config.get("_class_name")
    if kind not in (*_CLASS_CONDITIONED, *_TEXT_CONDITIONED):
        known = ", ".join((*_CLASS_CONDITIONED, *_TEXT_CONDITIONED))
        raise Invalid(f"{folder.name}/transformer/config.json: _class_name is {kind}; {known} are supported")
    is_text = kind in _TEXT_CONDITIONED
    has_vae = index.get("vae", [None])[0] is not None
    vae_factor = 1
    if has_vae:
        vae_factor = 2 ** (len(read_json(folder / "vae" / "config.json")["block_out_channels"]) - 1)
    channels = int(config["in_channels"])
    prediction = prediction_of(read_json(folder / "scheduler" / "scheduler_config.json"))
    classes = 0 if is_text else int(config["num_embeds_ada_norm"])
    return BaseSummary(
        name=name or folder.resolve().name,
        fingerprint=fingerprint(folder),
        image_size=int(config["sample_size"]) * vae_factor,
        sample_size=int(config["sample_size"]),
        channels=channels,
        patch_size=int(config["patch_size"]),
        layers=int(config["num_layers"]),
        hidden=int(config["num_attention_heads"]) * int(config["attention_head_dim"]),
        num_classes=classes,
        id2label=_labels(index.get("id2label"), classes),
        prediction=prediction,
        learned_sigma=prediction != "flow" and (config.get("out_channels") or channels) == 2 * channels,
        has_vae=has_vae,
        parameters=_count_parameters(folder / "transformer"),
        licence=_licence(folder / "README.md"),
        learning_rate=_learning_rate(folder / "training.json"),
        conditioning="text" if is_text else "class",
    )


def fingerprint(folder: str | Path) -> str:
    """sha256 over the sorted (relative name, sha256) of every config and weight file: same bytes, same base."""
    folder = Path(folder)
    digest = hashlib.sha256()
    for path in _frozen_files(folder):
        stat = path.stat()
        content = _file_digest(str(path.resolve()), stat.st_size, stat.st_mtime_ns)
        digest.update(f"{path.relative_to(folder).as_posix()}\0{content}\n".encode())
    return digest.hexdigest()


def prediction_of(scheduler: dict[str, Any]) -> Prediction:
    """How the base predicts, from its scheduler's config."""
    if "FlowMatch" in str(scheduler.get("_class_name")):
        return "flow"
    kind = scheduler.get("prediction_type", "epsilon")
    if kind == "epsilon" or kind == "v_prediction":
        return kind
    raise Invalid(f"scheduler_config.json: prediction_type {kind!r}; epsilon and v_prediction are supported")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, or an error that names the file."""
    name = f"{path.parent.name}/{path.name}"
    try:
        data = json.loads(path.read_text())
    except OSError as error:
        raise NotFound(f"{name} is missing: a base is a DiTPipeline folder as diffusers saves it") from error
    except ValueError as error:
        raise Invalid(f"{name} is not JSON: {error}") from error
    if not isinstance(data, dict):
        raise Invalid(f"{name} is not a JSON object")
    return data


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of one part of a base; pickles are refused by name."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        pickles = sorted(path.name for path in folder.glob("*.bin")) + sorted(path.name for path in folder.glob("*.pt"))
        hint = f"; {pickles[0]} is a pickle and is not opened: convert it to safetensors" if pickles else ""
        raise Invalid(f"{folder.name}/ holds no safetensors weights{hint}", code="no_safetensors")
    return files


def _frozen_files(folder: Path) -> list[Path]:
    found: list[Path] = []
    for part in _PARTS:
        if (folder / part).is_dir():
            found += [path for path in (folder / part).iterdir() if path.suffix in (".json", ".safetensors", ".model")]
    return sorted(found, key=lambda path: path.relative_to(folder).as_posix())


@lru_cache(maxsize=256)
def _file_digest(path: str, size: int, mtime_ns: int) -> str:
    """Keyed by size and time of change too, so that a file that changes is read again."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _labels(id2label: object, classes: int) -> dict[int, str]:
    given = {int(key): str(value) for key, value in id2label.items()} if isinstance(id2label, dict) else {}
    return {number: given.get(number, f"class {number}") for number in range(classes)}


def _count_parameters(folder: Path) -> int:
    total = 0
    for path in weight_files(folder):
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > MAX_HEADER_BYTES:
                raise Invalid(f"{path.name}: a header of {length} bytes is no safetensors header")
            header = json.loads(file.read(length))
        total += sum(
            prod(tensor["shape"]) for key, tensor in header.items() if key != "__metadata__" and not _COPIES.match(key)
        )
    return total


def _learning_rate(record: Path) -> float | None:
    if not record.is_file():
        return None
    rate = read_json(record).get("learning_rate")
    return float(rate) if isinstance(rate, int | float) and 0 < rate < 1 else None


def _licence(card: Path) -> str | None:
    """The `license:` of the model card's front matter."""
    if not card.is_file():
        return None
    front = card.read_text().split("\n---", 1)[0]
    match = re.search(r"^licen[sc]e:\s*[\"']?([^\"'\n]+)", front, re.MULTILINE) if front.startswith("---") else None
    return match[1].strip() if match else None
