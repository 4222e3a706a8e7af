"""Downstream domains that pretraining never saw, as pictures of 64 x 64 or larger: what an adapter is to learn.

| domain | what | licence |
|---|---|---|
| lineart | emoji as outlines, in `examples/` | CC BY-SA 4.0, OpenMoji |
| digits | handwriting, in `examples/` | CC BY-SA 3.0, MNIST |
| game | white paper, black silhouettes of weapons, armour, beasts: npm `@iconify-json/game-icons` | CC BY 3.0 |
| glyphs | emoji as black glyphs: npm `@iconify-json/fluent-emoji-high-contrast` | MIT |
| clipart | mixed clip art of many hands, in `examples/` | public domain, Open Clip Art |
"""

import hashlib
import io
import json
import re
import shutil
import subprocess
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

ROOT = Path(__file__).parent
WORK = ROOT / ".work"
EXAMPLES = ROOT.parent / "examples"
SIDE = 64
MAX_TEST = 250
TUNE = 100
MIN_POOL = 300  # pictures to train and tune on
_ICONS = ("game-icons", "fluent-emoji-high-contrast")
_PER_CLASS = 75

_GAME = {
    "weapon": "sword swords axe blade blades dagger daggers knife spear spears gun bow hammer pistol rifle mace katana",
    "armour": "shield armor helmet helm gauntlet boots boot",
    "animal": "bird fish dragon snake wolf bear horse cat dog lion tiger eagle raven spider bat frog pig bull deer fox "
    "owl elephant monkey rabbit crab shark whale turtle scorpion ant bee beetle snail",
    "plant": "tree trees leaf leaves flower plant mushroom forest oak pine palm cactus",
    "building": "tower castle house gate door temple village hut church fort bridge windmill",
    "abstract": "abstract",
    "face": "head face mask visage skull",
    "fire": "fire flame flames burning explosion lightning bolt",
}
_GLYPHS = {
    "animal": "Animals & Nature",
    "food": "Food & Drink",
    "object": "Objects",
    "face": "Smileys & Emotion",
    "symbol": "Symbols",
    "travel": "Travel & Places",
    "activity": "Activities",
}


@dataclass(frozen=True)
class Pictures:
    """(N, s, s, 3) uint8 and the label of each."""

    pixels: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def head(self, count: int) -> "Pictures":
        return Pictures(self.pixels[:count], self.labels[:count])

    def __add__(self, other: "Pictures") -> "Pictures":
        return Pictures(np.concatenate([self.pixels, other.pixels]), np.concatenate([self.labels, other.labels]))


@dataclass(frozen=True)
class Domain:
    """Pictures in three parts that share no subject: to train on, to choose a rate by, to be measured against."""

    name: str
    classes: tuple[str, ...]
    train: Pictures
    tune: Pictures
    test: Pictures
    digest: str


def load(name: str, side: int = SIDE) -> Domain:
    """A domain by name; fetched or drawn when first asked for. Icons are drawn at `side`, the others enlarged to it."""
    match name:
        case "lineart":
            entries = _read_zip(EXAMPLES / "openmoji_lineart_64.zip", side)
        case "digits":
            entries = _read_zip(EXAMPLES / "mnist_digits_32.zip", side)
        case "game" | "glyphs":
            entries = _drawn(name, side)
        case "clipart":
            entries = _read_zip(EXAMPLES / "openclipart_64.zip", side)
        case _:
            raise ValueError(f"{name} is no domain; one of {', '.join(NAMES)}")
    return _split(name, entries)


NAMES = ("lineart", "digits", "game", "glyphs", "clipart")
MEASURED = ("lineart", "game", "glyphs", "clipart")
"""Domains that the autoencoder redraws well enough to measure by: redrawn digits alone lie 736 from digits."""


@dataclass(frozen=True)
class _Entry:
    subject: str
    class_name: str
    pixels: np.ndarray


def subject_of(file_name: str) -> str:
    """`00011_dolphin-02.png` and `00010_dolphin.png` show one subject: they fall on one side of the split."""
    stem = re.sub(r"^\d+_", "", PurePosixPath(file_name).stem)
    return re.sub(r"[-_ ]?\d+$", "", stem) or stem


def _read_zip(path: Path, side: int) -> list[_Entry]:
    entries: list[_Entry] = []
    with zipfile.ZipFile(path) as archive:
        for name in sorted(archive.namelist()):
            inside = PurePosixPath(name)
            if inside.suffix != ".png" or len(inside.parts) != 2:
                continue
            with Image.open(io.BytesIO(archive.read(name))) as picture:
                small = picture.convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
            # Digits are numbered and no two are one drawing: each is a subject of its own.
            subject = name if re.fullmatch(r"[\d_-]*", inside.stem) or "digit" in name else subject_of(name)
            entries.append(_Entry(subject, inside.parts[0], np.asarray(small)))
    return entries


def _drawn(name: str, side: int) -> list[_Entry]:
    """Icons of a package as pictures; kept in `.work`, for drawing takes a while."""
    kept = WORK / (f"{name}.npz" if side == SIDE else f"{name}-{side}.npz")
    if not kept.exists():
        modules = _fetch()
        entries = _draw_game(modules, side) if name == "game" else _draw_glyphs(modules, side)
        kept.parent.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(
            kept,
            pixels=np.stack([entry.pixels for entry in entries]),
            subjects=np.array([entry.subject for entry in entries]),
            classes=np.array([entry.class_name for entry in entries]),
        )
    with np.load(kept) as arrays:
        columns = [arrays["subjects"].tolist(), arrays["classes"].tolist(), arrays["pixels"]]
    return [_Entry(subject, kind, pixels) for subject, kind, pixels in zip(*columns, strict=True)]


def _fetch() -> Path:
    """The icon packages, installed with npm (scripts off)."""
    folder = WORK / "npm"
    modules = folder / "node_modules"
    if not all((modules / "@iconify-json" / name).is_dir() for name in _ICONS):
        npm = shutil.which("npm")
        if npm is None:
            raise FileNotFoundError("npm is needed to fetch the icon packages")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "package.json").write_text('{"name": "domains", "private": true}')
        command = [npm, "install", "--ignore-scripts", "--no-audit", "--no-fund"]
        subprocess.run([*command, *(f"@iconify-json/{name}" for name in _ICONS)], cwd=folder, check=True)
    return modules


def _draw_game(modules: Path, side: int) -> list[_Entry]:
    """Icons whose name has a word of exactly one class."""
    words = {kind: set(text.split()) for kind, text in _GAME.items()}

    def class_of(icon: str) -> str | None:
        kinds = [kind for kind, known in words.items() if known & set(icon.split("-"))]
        return kinds[0] if len(kinds) == 1 else None

    return _draw(modules, "game-icons", class_of, side)


def _draw_glyphs(modules: Path, side: int) -> list[_Entry]:
    metadata = json.loads((modules / "@iconify-json" / _ICONS[1] / "metadata.json").read_text())
    kinds = {icon: kind for kind, title in _GLYPHS.items() for icon in metadata["categories"][title]}
    return _draw(modules, _ICONS[1], kinds.get, side)


def _draw(modules: Path, package: str, class_of, side: int) -> list[_Entry]:  # noqa: ANN001
    from pretraining.data import Drawing, draw  # noqa: PLC0415  # needs resvg

    icons = json.loads((modules / "@iconify-json" / package / "icons.json").read_text())
    counts: dict[str, int] = {}
    entries: list[_Entry] = []
    for icon in sorted(icons["icons"], key=lambda name: hashlib.sha256(name.encode()).digest()):
        kind = class_of(icon)
        if kind is None or counts.get(kind, 0) >= _PER_CLASS:
            continue
        body = icons["icons"][icon]
        width = body.get("width", icons.get("width", 16))
        height = body.get("height", icons.get("height", 16))
        svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">{body["body"]}</svg>'
        pixels = draw(Drawing(0, icon, 0, svg.replace("currentColor", "black")), side)
        if pixels is not None:
            counts[kind] = counts.get(kind, 0) + 1
            entries.append(_Entry(re.sub(r"-\d+$", "", icon) if kind != "abstract" else icon, kind, pixels))
    return entries


def _split(name: str, entries: Sequence[_Entry]) -> Domain:
    """By a fixed draw over subjects: all pictures of one subject fall on one side, on every machine."""
    classes = tuple(sorted({entry.class_name for entry in entries}))
    groups: dict[str, list[int]] = {}
    for number, entry in enumerate(entries):
        groups.setdefault(f"{entry.class_name}/{entry.subject}", []).append(number)
    order = sorted(groups, key=lambda subject: hashlib.sha256(f"{name}/{subject}".encode()).digest())
    wanted = {"test": min(MAX_TEST, len(entries) - MIN_POOL), "tune": TUNE, "train": len(entries)}
    parts: dict[str, list[int]] = {part: [] for part in wanted}
    for subject in order:
        part = next(part for part, count in wanted.items() if len(parts[part]) < count)
        parts[part] += groups[subject]
    pixels = np.stack([entry.pixels for entry in entries])
    labels = np.array([classes.index(entry.class_name) for entry in entries])
    digest = hashlib.sha256(pixels.tobytes() + labels.tobytes() + json.dumps(parts).encode()).hexdigest()
    pictures = {part: Pictures(pixels[numbers], labels[numbers]) for part, numbers in parts.items()}
    return Domain(name, classes, pictures["train"], pictures["tune"], pictures["test"], digest)
