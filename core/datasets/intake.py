"""What an upload route may ask before it answers: looks at the first and the last bytes, no listing, no unpacking."""

import zlib
from pathlib import Path
from typing import Literal

from core.datasets.limits import Limits
from core.datasets.report import Refused
from core.datasets.tar_reader import BLOCK, looks_like_tar
from core.datasets.zip_reader import find_directory

Format = Literal["zip", "tar", "tar.gz"]

_TAKEN = "send a .zip, .tar or .tar.gz of image files"
_ZIP = (b"PK\x03\x04", b"PK\x05\x06")
_GZIP = b"\x1f\x8b"
_UNSUPPORTED = {
    b"BZh": "bzip2",
    b"\xfd7zXZ\x00": "xz",
    b"]\x00\x00": "lzma",
    b"\x28\xb5\x2f\xfd": "zstandard",
    b"\x04\x22\x4d\x18": "lz4",
    b"\x1f\x9d": "compress",
    b"7z\xbc\xaf\x27\x1c": "7z",
    b"Rar!": "rar",
    b"PK\x07\x08": "split zip",
}


def quick_check(archive: Path | bytes, limits: Limits | None = None) -> Format:
    """The archive's format, by its bytes; `Refused` for what is plainly wrong. Given bytes are the first 4096."""
    limits = limits or Limits()
    if isinstance(archive, bytes):
        return _format_of(archive)
    with archive.open("rb") as file:
        kind = _format_of(file.read(4096))
        if (size := file.seek(0, 2)) > limits.max_archive_bytes:
            raise Refused(
                "archive_too_large", f"the archive has {size} bytes; at most {limits.max_archive_bytes} are taken"
            )
        if kind == "zip" and not find_directory(file, limits).entries:
            raise Refused("no_images", "the zip is empty; put images into it")
    return kind


def archive_name(first: bytes) -> str | None:
    """What kind of archive or compressed file these first bytes begin, if any."""
    if first.startswith(_ZIP):
        return "zip"
    if first.startswith(_GZIP):
        return "gzip"
    if len(first) >= BLOCK and first[257:262] == b"ustar":
        return "tar"
    return next((name for magic, name in _UNSUPPORTED.items() if first.startswith(magic)), None)


def _format_of(first: bytes) -> Format:
    if first.startswith(_ZIP):
        return "zip"
    if first.startswith(_GZIP):
        return _look_into_gzip(first)
    if looks_like_tar(first[:BLOCK]):
        return "tar"
    if name := archive_name(first):
        raise Refused("unsupported_compression", f"{name} archives are not taken; {_TAKEN}")
    raise Refused("not_an_archive", f"the file is {'empty' if not first else 'no archive'}; {_TAKEN}")


def _look_into_gzip(first: bytes) -> Format:
    try:
        inside = zlib.decompressobj(16 + zlib.MAX_WBITS).decompress(first, BLOCK)
    except zlib.error:
        raise Refused("bad_crc", f"the gzip stream is damaged; {_TAKEN}") from None
    if looks_like_tar(inside):
        return "tar.gz"
    if name := archive_name(inside):
        raise Refused("nested_archive", f"the gzip stream holds a {name} file instead of a tar; {_TAKEN}")
    if len(inside) < BLOCK:
        raise Refused("truncated", f"the gzip stream ends before its first file; {_TAKEN}")
    raise Refused("not_an_archive", f"the gzip stream holds no tar; {_TAKEN}")
