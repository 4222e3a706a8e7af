"""The pack: what intake makes of an archive, and all that training and evaluation ever read.

An uncompressed zip of `00000.png`, `00001.png`, … (RGB) and `manifest.json`; the same archive gives the same bytes.
"""

import io
import json
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import numpy as np
from PIL import Image

from core.datasets.report import ClassCount
from core.errors import Invalid

VERSION = 1
_MANIFEST = "manifest.json"
_EPOCH = (1980, 1, 1, 0, 0, 0)


class PackCorrupt(Invalid):
    """The stored pack cannot be read: not what intake wrote."""

    code = "dataset_corrupt"


@dataclass(frozen=True)
class PackedImage:
    """`source` is the file's name in the uploaded archive; width and height, in pixels, are the stored picture's."""

    file: str
    class_name: str
    source: str
    width: int
    height: int


@dataclass(frozen=True)
class Manifest:
    classes: tuple[ClassCount, ...]
    images: tuple[PackedImage, ...]

    def to_json(self) -> bytes:
        images = [
            {
                "file": image.file,
                "class": image.class_name,
                "source": image.source,
                "width": image.width,
                "height": image.height,
            }
            for image in self.images
        ]
        body = {"version": VERSION, "classes": [count.to_json() for count in self.classes], "images": images}
        return json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode()

    @classmethod
    def from_json(cls, data: bytes) -> "Manifest":
        body = json.loads(data)
        if body["version"] != VERSION:
            raise PackCorrupt(f"pack version {body['version']}: this release reads version {VERSION}")
        images = (
            PackedImage(image["file"], image["class"], image["source"], image["width"], image["height"])
            for image in body["images"]
        )
        return cls(tuple(ClassCount(**count) for count in body["classes"]), tuple(images))


class PackWriter:
    """Writes pictures as they come, and the manifest at the end."""

    def __init__(self, file: BinaryIO) -> None:
        self._zip = zipfile.ZipFile(file, "w", zipfile.ZIP_STORED)
        self._images: list[PackedImage] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._zip.close()

    def add(self, png: bytes, *, class_name: str, source: str, width: int, height: int) -> None:
        name = f"{len(self._images):05}.png"
        self._write(name, png)
        self._images.append(PackedImage(name, class_name, source, width, height))

    def finish(self, classes: Sequence[ClassCount]) -> None:
        self._write(_MANIFEST, Manifest(tuple(classes), tuple(self._images)).to_json())

    def _write(self, name: str, data: bytes) -> None:
        info = zipfile.ZipInfo(name, _EPOCH)
        info.create_system = 3
        info.external_attr = 0o100644 << 16
        self._zip.writestr(info, data)


def read_manifest(pack: Path | bytes) -> Manifest:
    """Classes and images of a pack, without decoding any."""
    try:
        with zipfile.ZipFile(_source(pack)) as archive:
            return Manifest.from_json(archive.read(_MANIFEST))
    except (zipfile.BadZipFile, EOFError, KeyError, TypeError, ValueError) as error:
        raise PackCorrupt(f"the dataset's pack cannot be read: {error}") from error


def read_pack(pack: Path | bytes, size: int) -> tuple[np.ndarray, list[int], list[str]]:
    """Images uint8 (N, size, size, 3), the label of each, and the class names that labels index.

    Each picture is cut to its centre square, then resampled: Lanczos to shrink, bicubic to enlarge.
    """
    manifest = read_manifest(pack)
    classes = [count.name for count in manifest.classes]
    index = {name: label for label, name in enumerate(classes)}
    images = np.empty((len(manifest.images), size, size, 3), np.uint8)
    try:
        labels = [index[image.class_name] for image in manifest.images]
        with zipfile.ZipFile(_source(pack)) as archive:
            for row, packed in enumerate(manifest.images):
                with Image.open(io.BytesIO(archive.read(packed.file)), formats=["PNG"]) as picture:
                    images[row] = np.asarray(_centre_square(picture, size))
    except (zipfile.BadZipFile, EOFError, KeyError, OSError, SyntaxError, ValueError) as error:
        raise PackCorrupt(f"the dataset's pack cannot be read: {error}") from error
    return images, labels, classes


def _centre_square(picture: Image.Image, size: int) -> Image.Image:
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    method = Image.Resampling.LANCZOS if side > size else Image.Resampling.BICUBIC
    # Cut first: a resize by `box` would let in what lies beside it.
    return picture.crop((left, top, left + side, top + side)).resize((size, size), method)


def _source(pack: Path | bytes) -> Path | io.BytesIO:
    return io.BytesIO(pack) if isinstance(pack, bytes) else pack
