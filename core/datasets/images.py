"""One image file to one plain RGB picture. Runs in the sandboxed child alone: these are parsers of hostile bytes."""

import io
import warnings
from dataclasses import dataclass

import numpy as np
from PIL import Image

from core.datasets.intake import archive_name
from core.datasets.limits import Limits
from core.datasets.report import Refused, Rejected, quoted

_ORIENTATION = 0x0112
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_FOREIGN = {
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"II+\0": "TIFF",
    b"MM\0+": "TIFF",
    b"BM": "BMP",
    b"%!PS": "PostScript",
    b"\xc5\xd0\xd3\xc6": "PostScript",
    b"8BPS": "Photoshop",
    b"\0\0\0\x0cjP  ": "JPEG 2000",
    b"\xff\x4f\xff\x51": "JPEG 2000",
    b"%PDF": "PDF",
    b"\0\0\1\0": "icon",
    b"\0\0\2\0": "cursor",
    b"\x7fELF": "program",
    b"MZ": "program",
    b"\xff\x0a": "JPEG XL",
    b"\0\0\0\x0cJXL ": "JPEG XL",
    b"SIMPLE  =": "FITS",
    b"v/1\x01": "OpenEXR",
    b"DDS ": "DirectDraw",
    b"gimp xcf": "GIMP",
    b"qoif": "QOI",
}


@dataclass(frozen=True)
class Picture:
    """RGB pixels, ready to store, and the size in pixels that the file itself had, upright."""

    image: Image.Image
    width: int
    height: int

    def to_png(self) -> bytes:
        """Plain PNG: no metadata, the same bytes for the same pixels."""
        buffer = io.BytesIO()
        self.image.save(buffer, "PNG", compress_level=1)
        return buffer.getvalue()


def sniff(data: bytes, name: str) -> str:
    """Pillow's name of the format, by content. What is plainly something else refuses the dataset."""
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    if data.startswith((b"GIF87a", b"GIF89a")):
        return "GIF"
    if archive := archive_name(data[:512]):
        raise Refused(
            "nested_archive", f"{quoted(name)} is a {archive} file under an image's name; put images in directly"
        )
    foreign = next((kind for magic, kind in _FOREIGN.items() if data.startswith(magic)), None)
    if data[4:8] == b"ftyp":
        foreign = "HEIF, AVIF or video"
    if foreign is None and data and _is_text(data[:512]):
        foreign = "text"
    if foreign:
        raise Refused("unsupported_type", f"{quoted(name)} is a {foreign} file; only PNG, JPEG, WebP and GIF are taken")
    raise Rejected("decode_failed", "no PNG, JPEG, WebP or GIF file" if data else "the file is empty")


def read_picture(data: bytes, name: str, limits: Limits) -> Picture:
    """Decode, turn upright, flatten to RGB, shrink to `max_side_stored`. `Refused` for what is hostile."""
    kind = sniff(data, name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of what we check ourselves, or drop
        try:
            with Image.open(io.BytesIO(data), formats=[kind]) as image:
                return _read(image, name, limits)
        except (Refused, Rejected, MemoryError):
            raise
        except Image.DecompressionBombError:
            raise _too_large(name, "far too many", limits) from None
        except Exception as error:  # parsers raise what they like: struct.error, SyntaxError, ValueError, OSError, …
            raise Rejected("decode_failed", f"cannot be decoded as {kind} ({type(error).__name__})") from None


def _read(image: Image.Image, name: str, limits: Limits) -> Picture:
    width, height = image.size
    if width * height > limits.max_pixels:
        raise _too_large(name, f"{width} x {height}", limits)
    orientation = _orientation(image)
    if orientation >= 5:
        width, height = height, width
    if min(width, height) < limits.min_side:
        raise Rejected(
            "image_too_small", f"{width} x {height}: each side needs at least {limits.min_side} pixels", width, height
        )
    if max(width, height) > limits.max_aspect * min(width, height):
        fault = f"{width} x {height}: one side may be at most {limits.max_aspect:g} times the other"
        raise Rejected("bad_aspect_ratio", fault, width, height)
    try:
        side = limits.max_side_stored
        image.draft(None, (2 * side, 2 * side))  # lets JPEG decode at a half, a quarter or an eighth, never below this
        pixels = flatten(image)
        if orientation in _TRANSPOSE:
            pixels = pixels.transpose(_TRANSPOSE[orientation])
        if max(pixels.size) > side:
            scale = side / max(pixels.size)
            small = (max(1, round(pixels.width * scale)), max(1, round(pixels.height * scale)))
            pixels = pixels.resize(small, Image.Resampling.LANCZOS)
    except (Refused, MemoryError):
        raise
    except Exception as error:
        raise Rejected("decode_failed", f"cannot be decoded ({type(error).__name__})", width, height) from None
    pixels.info.clear()
    return Picture(pixels, width, height)


def flatten(image: Image.Image) -> Image.Image:
    """Any mode to RGB: transparency onto white, the upper 8 of 16 bits, CMYK by the plain formula, no profiles."""
    image.load()
    if image.mode.startswith("I"):
        levels = np.asarray(image).astype(np.int64).clip(0, 0xFFFF) >> 8
        return Image.fromarray(levels.astype(np.uint8)).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    layers = image.convert("RGBA")
    flat = Image.new("RGB", image.size, (255, 255, 255))
    flat.paste(layers, mask=layers.getchannel("A"))
    return flat


def _orientation(image: Image.Image) -> int:
    try:
        found = image.getexif().get(_ORIENTATION, 1)
    except MemoryError:
        raise
    except Exception:
        return 1  # a broken EXIF block says nothing about the picture
    return found if isinstance(found, int) and 1 <= found <= 8 else 1


def _too_large(name: str, size: str, limits: Limits) -> Refused:
    return Refused(
        "image_too_large", f"{quoted(name)} has {size} pixels; at most {limits.max_pixels} are taken in one image"
    )


def _is_text(head: bytes) -> bool:
    """SVG, HTML, scripts: printable from the first byte on."""
    return all(byte >= 0x20 or byte in b"\t\n\r\f" for byte in head) and b"\x7f" not in head and _is_utf8(head)


def _is_utf8(head: bytes) -> bool:
    try:
        head.decode("utf-8")
    except UnicodeDecodeError as error:
        return error.start >= len(head) - 3  # cut inside a character
    return True
