"""The pretraining set: freely licensed emoji, drawn at 64 x 64 on white from the packages of a registry.

`python -m pretraining.data` fetches the packages with npm, draws every picture and writes `.work/emoji_64.npz`.
"""

import hashlib
import io
import json
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from pretraining.classes import CLASSES, class_of

WORK = Path(__file__).parent / ".work"
IMAGES = WORK / "emoji_64.npz"
SIZE = 64  # pixels a side
HELD_OUT_PERCENT = 5
STYLES = ("noto", "noto-v1", "fxemoji", "fluent-emoji", "fluent-emoji-flat", "twemoji", "emojione")
MISNAMED = {"cricket"}  # the insect in one package, the game in another
SKIN_TONES = {"1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff"}


@dataclass(frozen=True)
class Drawing:
    """One SVG to draw: who drew it (an index into STYLES), what it shows, and its markup."""

    style: int
    subject: str  # code points joined by "-", without the variation selector
    label: int
    svg: str


@dataclass(frozen=True)
class Images:
    """The set as arrays of one length N."""

    pixels: np.ndarray  # (N, 64, 64, 3) uint8
    labels: np.ndarray  # (N,) int64, ids of CLASSES
    styles: np.ndarray  # (N,) int64, ids of STYLES
    subjects: np.ndarray  # (N,) str
    held_out: np.ndarray  # (N,) bool


def subject_of(unified: str) -> str:
    """One spelling of a code point sequence, whatever the case and with or without U+FE0F."""
    return "-".join(point for point in unified.lower().split("-") if point != "fe0f")


def is_held_out(subject: str) -> bool:
    """A fixed draw by subject: all styles of one emoji fall on the same side, on every machine, for ever."""
    return int.from_bytes(hashlib.sha256(subject.encode()).digest()[:4], "big") % 100 < HELD_OUT_PERCENT


def fetch_packages(folder: Path = WORK / "npm") -> Path:
    """Install the packages with npm (scripts off) unless they are there; returns their `node_modules`."""
    modules = folder / "node_modules"
    wanted = [f"@iconify-json/{style}" for style in STYLES] + ["emoji-datasource"]
    if not all((modules / name).is_dir() for name in wanted):
        npm = shutil.which("npm")
        if npm is None:
            raise FileNotFoundError("npm is needed to fetch the emoji packages")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "package.json").write_text('{"name": "emoji", "private": true}')
        command = [npm, "install", "--ignore-scripts", "--no-audit", "--no-fund", *wanted]
        subprocess.run(command, cwd=folder, check=True)
    # The proprietary sheets come with the package; they are never read and not kept.
    shutil.rmtree(modules / "emoji-datasource" / "img", ignore_errors=True)
    return modules


def read_labels(modules: Path) -> dict[str, int]:
    """Subject -> class id, for every emoji that emoji-datasource lists."""
    labels: dict[str, int] = {}
    for emoji in json.loads((modules / "emoji-datasource" / "emoji.json").read_text()):
        label = class_of(emoji["name"] or "", emoji["subcategory"])
        if label is not None:
            labels[subject_of(emoji["unified"])] = label
    return labels


def plain(name: str) -> str:
    """A name as letters and digits alone: packages spell "love-letter", "LOVE LETTER" and "loveletter"."""
    return "".join(letter for letter in name.lower() if letter.isalnum())


def read_names(modules: Path) -> dict[str, str]:
    """Plain name -> subject, from emoji-datasource and from the packages that list their code points."""
    names: dict[str, str] = {}
    for style in STYLES:
        for code, name in read_codes(modules, style).items():
            names.setdefault(plain(name), subject_of(code))
    for emoji in json.loads((modules / "emoji-datasource" / "emoji.json").read_text()):
        for name in [emoji["name"] or "", *emoji["short_names"]]:
            names.setdefault(plain(name), subject_of(emoji["unified"]))
    return names


def read_codes(modules: Path, style: str) -> dict[str, str]:
    """Code points -> icon name as the package lists them; empty for some packages."""
    codes: dict[str, str] = json.loads((modules / "@iconify-json" / style / "chars.json").read_text())
    return codes


def read_drawings(modules: Path) -> Iterator[Drawing]:
    """Every emoji of every style that has a class, without skin tone variants, each subject once a style."""
    labels, names = read_labels(modules), read_names(modules)
    for number, style in enumerate(STYLES):
        icons = json.loads((modules / "@iconify-json" / style / "icons.json").read_text())
        aliases = {name: alias["parent"] for name, alias in icons.get("aliases", {}).items()}
        listed = [(subject_of(code), name) for code, name in read_codes(modules, style).items()]
        # Packages without code points are matched by their icons' names.
        by_name = [(names.get(plain(name), ""), name) for name in (*icons["icons"], *aliases) if name not in MISNAMED]
        seen: set[str] = set()
        for subject, name in listed + by_name:
            icon = icons["icons"].get(aliases.get(name, name))
            if subject in seen or icon is None or subject not in labels or SKIN_TONES & set(subject.split("-")):
                continue
            seen.add(subject)
            width = icon.get("width", icons.get("width", 16))
            height = icon.get("height", icons.get("height", 16))
            svg = (
                '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
                f'viewBox="{icon.get("left", 0)} {icon.get("top", 0)} {width} {height}">{icon["body"]}</svg>'
            )
            yield Drawing(number, subject, labels[subject], svg)


def draw(drawing: Drawing, size: int = SIZE) -> np.ndarray | None:
    """(size, size, 3) uint8 on white; None where the SVG cannot be drawn or is empty."""
    import resvg_py

    try:
        png = resvg_py.svg_to_bytes(svg_string=drawing.svg, width=2 * size, height=2 * size, skip_system_fonts=True)
    except ValueError:
        return None
    drawn = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
    # Drawn twice as large and box-averaged: softer edges than the renderer's own, and easier for a small VAE.
    canvas = Image.new("RGBA", drawn.size, "white")
    canvas.alpha_composite(drawn)
    small = canvas.convert("RGB").resize((size, size), Image.Resampling.BOX)
    pixels = np.asarray(small)
    return pixels if pixels.std() > 1 else None


def build(path: Path = IMAGES) -> Images:
    """Draw the whole set with two processes and keep it at `path`."""
    drawings = list(read_drawings(fetch_packages()))
    with ProcessPoolExecutor(2) as pool:
        drawn = list(pool.map(draw, drawings, chunksize=64))
    kept = [(drawing, pixels) for drawing, pixels in zip(drawings, drawn, strict=True) if pixels is not None]
    images = Images(
        pixels=np.stack([pixels for _, pixels in kept]),
        labels=np.array([drawing.label for drawing, _ in kept], dtype=np.int64),
        styles=np.array([drawing.style for drawing, _ in kept], dtype=np.int64),
        subjects=np.array([drawing.subject for drawing, _ in kept]),
        held_out=np.array([is_held_out(drawing.subject) for drawing, _ in kept]),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, **vars(images))
    return images


def load(path: Path = IMAGES) -> Images:
    """The set as it was built; builds it the first time."""
    if not path.exists():
        return build(path)
    with np.load(path) as arrays:
        return Images(**{name: arrays[name] for name in arrays.files})


def main() -> None:
    images = build()
    counts = Counter(images.labels.tolist())
    for number, kind in enumerate(CLASSES):
        print(f"{number:3d} {kind.name:14s} {counts[number]:5d}")
    print(f"{len(images.labels)} images, {int(images.held_out.sum())} held out")


if __name__ == "__main__":
    main()
