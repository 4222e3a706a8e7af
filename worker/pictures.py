"""Arrays to files: pictures with what it takes to draw them again, and strips of previews."""

import io
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from core.samples.spec import Format


def encode_png(pixels: np.ndarray, text: Mapping[str, str] | None = None) -> bytes:
    """PNG of (h, w, 3) uint8, with `text` as its text chunks."""
    info = PngInfo()
    for key, value in (text or {}).items():
        info.add_itxt(key, value)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def encode(pixels: np.ndarray, image_format: Format, compression: int, text: Mapping[str, str]) -> bytes:
    """(h, w, 3) uint8 as a file; `compression` is the quality of JPEG and WebP, which carry no text."""
    if image_format == "png":
        return encode_png(pixels, text)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, image_format.upper(), quality=compression)
    return buffer.getvalue()


def strip(images: Sequence[np.ndarray]) -> np.ndarray:
    """Pictures (h, w, 3) side by side: (h, n·w, 3)."""
    return np.concatenate(list(images), axis=1)
