"""A strict, streaming tar reader (ustar, pax, GNU long names), plain or in one gzip stream.

The standard library's reader holds pax headers of any size in memory and follows sparse maps; here metadata is capped,
only plain files and folders pass, and every byte read counts against one cap.
"""

import stat
import zlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

from core.datasets.limits import Limits
from core.datasets.names import MAX_NAME_BYTES, Parts, entry_parts
from core.datasets.report import Refused, quoted

BLOCK = 512
MAX_PAX_BYTES = 64 * 1024
_CHUNK = 64 * 1024
_ZEROS = bytes(BLOCK)


@dataclass(frozen=True, slots=True)
class TarEntry:
    parts: Parts
    size: int
    is_folder: bool

    @property
    def name(self) -> str:
        return "/".join(self.parts)


class _Source(Protocol):
    def read(self, size: int, /) -> bytes: ...


class _Gunzip:
    """One gzip stream, decompressed a chunk at a time. Reads give fewer bytes than asked for only at its end."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._inflater = zlib.decompressobj(16 + zlib.MAX_WBITS)

    def read(self, size: int, /) -> bytes:
        data = bytearray()
        try:
            while len(data) < size and not self._inflater.eof:
                chunk = self._inflater.unconsumed_tail or self._file.read(_CHUNK)
                if not chunk:
                    raise Refused(
                        "truncated", "the gzip stream ends in the middle: the upload or the file was cut short"
                    )
                data += self._inflater.decompress(chunk, size - len(data))
        except zlib.error:
            raise Refused("bad_crc", "the gzip stream is damaged; pack the images again") from None
        if self._inflater.eof:
            rest = self._inflater.unused_data
            while rest:
                if rest.strip(b"\0"):
                    raise Refused(
                        "unexpected_data", "something follows the gzip stream; send one .tar.gz, nothing after it"
                    )
                rest = self._file.read(_CHUNK)
        return bytes(data)


class _Capped:
    """A source whose bytes count against one cap, whoever reads them."""

    def __init__(self, source: _Source, limit: int) -> None:
        self._source = source
        self._limit = limit
        self._left = limit

    def read(self, size: int) -> bytes:
        """Up to `size` bytes, fewer only at the end."""
        self._allow(size)
        data = self._source.read(size)
        self._left -= len(data)
        return data

    def exactly(self, size: int) -> bytes:
        data = self.read(size)
        if len(data) != size:
            raise Refused("truncated", "the tar ends in the middle: the upload or the file was cut short")
        return data

    def skip(self, size: int) -> None:
        self._allow(size)
        while size:
            size -= len(self.exactly(min(size, _CHUNK)))

    def _allow(self, size: int) -> None:
        if size > self._left:
            raise Refused(
                "too_large_uncompressed", f"the archive unpacks to more than the {self._limit} bytes that are taken"
            )


class TarReader:
    """The entries of a tar, all checked at construction by one pass; contents come from another pass."""

    def __init__(self, path: Path, limits: Limits, *, gzipped: bool) -> None:
        self._path = path
        self._limits = limits
        self._gzipped = gzipped
        self._entries = [entry for entry, _ in self._walk(wanted=())]

    def entries(self) -> list[TarEntry]:
        return self._entries

    def contents(self, wanted: Collection[Parts]) -> Iterator[tuple[TarEntry, bytes]]:
        """The wanted files in the archive's own order."""
        for entry, data in self._walk(wanted):
            if data is not None:
                yield entry, data

    def _walk(self, wanted: Collection[Parts]) -> Iterator[tuple[TarEntry, bytes | None]]:
        with self._path.open("rb") as file:
            stream = _Capped(_Gunzip(file) if self._gzipped else file, self._limits.max_uncompressed_bytes)
            for entry in _headers(stream, self._limits.max_entries):
                padding = -entry.size % BLOCK
                if entry.parts in wanted and not entry.is_folder:
                    yield entry, stream.exactly(entry.size)
                    stream.skip(padding)
                else:
                    stream.skip(entry.size + padding)
                    yield entry, None
            _check_rest(stream)


def looks_like_tar(block: bytes) -> bool:
    """Whether a first block is a tar header, or the end mark of an empty tar."""
    return len(block) == BLOCK and (block == _ZEROS or _checksum(block) == _octal(block[148:156]))


def _headers(stream: _Capped, max_entries: int) -> Iterator[TarEntry]:
    """One entry per file or folder. The consumer must move the stream past the entry's content before the next."""
    long_name: bytes | None = None
    pax: dict[bytes, bytes] = {}
    entries = headers = 0
    while (block := stream.exactly(BLOCK)) != _ZEROS:
        headers += 1
        if entries == max_entries or headers > 2 * max_entries + 1:
            raise Refused("too_many_entries", f"the tar holds more than the {max_entries} entries that are taken")
        if _checksum(block) != _octal(block[148:156]):
            raise Refused(
                "malformed_archive", "a tar header fails its checksum: the file is damaged; pack the images again"
            )
        kind = block[156:157]
        size = _number(block[124:136])
        if kind in (b"x", b"g", b"L"):
            if size > MAX_PAX_BYTES:
                raise Refused(
                    "oversized_metadata",
                    f"a tar header carries {size} bytes of metadata; at most {MAX_PAX_BYTES} are taken",
                )
            payload = stream.exactly(size)
            stream.skip(-size % BLOCK)
            if (kind == b"x" and pax) or (kind == b"L" and long_name is not None):
                raise Refused("malformed_archive", "two tar headers describe one entry; pack the images again")
            if kind == b"L":
                long_name = payload.removesuffix(b"\0")
            elif kind == b"x":
                pax = _pax_records(payload)
            else:
                _check_global(_pax_records(payload))
            continue

        raw_name = _name(block, long_name, pax)
        if len(raw_name) > MAX_NAME_BYTES:
            raise Refused("bad_entry_name", f"the entry name {quoted(raw_name)} is longer than {MAX_NAME_BYTES} bytes")
        try:
            name = raw_name.decode("utf-8")
        except UnicodeDecodeError:
            raise Refused("bad_entry_name", f"the entry name {quoted(raw_name)} is not UTF-8") from None
        parts = entry_parts(name)
        is_folder = _check_type(name, kind, _number(block[100:108]), size)
        _check_pax(name, pax, size)
        long_name, pax = None, {}
        entries += 1
        yield TarEntry(parts, size, is_folder)
    if pax or long_name is not None:
        raise Refused("truncated", "the tar ends after a header that announces another entry")


def _check_type(name: str, kind: bytes, mode: int, size: int) -> bool:
    if kind not in (b"0", b"\0", b"5"):
        raise Refused(
            "bad_entry_type",
            f"{quoted(name)} is a link, device or other special entry; only plain files and folders are taken",
        )
    is_folder = kind == b"5" or name.endswith("/")
    if is_folder and size:
        raise Refused("bad_entry_type", f"{quoted(name)} is a folder that holds data of its own")
    if not is_folder and mode & (stat.S_ISUID | stat.S_ISGID):
        raise Refused("bad_entry_type", f"{quoted(name)} is marked setuid or setgid; only plain files are taken")
    return is_folder


def _check_pax(name: str, pax: dict[bytes, bytes], size: int) -> None:
    """An extended header may say a long name and dates. It may not turn the entry into something else."""
    if b"linkpath" in pax or any(key.startswith(b"GNU.sparse.") for key in pax):
        raise Refused(
            "bad_entry_type", f"{quoted(name)} is a link or sparse file; only plain files and folders are taken"
        )
    if b"size" in pax and pax[b"size"] != str(size).encode():
        raise Refused("size_mismatch", f"{quoted(name)} has two different sizes in its headers")


def _check_global(pax: dict[bytes, bytes]) -> None:
    """git archive writes its commit into a global header; one that renames or resizes entries is refused."""
    if any(key in (b"path", b"linkpath", b"size") or key.startswith(b"GNU.sparse.") for key in pax):
        raise Refused(
            "malformed_archive", "a global tar header overrides the entries' names or sizes; pack the images again"
        )


def _pax_records(payload: bytes) -> dict[bytes, bytes]:
    """`length key=value\\n`, over and over (POSIX.1-2001, pax)."""
    records: dict[bytes, bytes] = {}
    broken = Refused("malformed_archive", "an extended tar header cannot be read; pack the images again")
    payload = payload.rstrip(b"\0")
    while payload:
        digits, found, _ = payload[:8].partition(b" ")
        if not found or not digits.isdigit():
            raise broken
        length = int(digits)
        record, payload = payload[:length], payload[length:]
        key, equals, value = record[len(digits) + 1 : -1].partition(b"=")
        if len(record) != length or record[-1:] != b"\n" or not equals or not key or key in records:
            raise broken
        records[key] = value
    return records


def _name(block: bytes, long_name: bytes | None, pax: dict[bytes, bytes]) -> bytes:
    if b"path" in pax:
        return pax[b"path"]
    if long_name is not None:
        return long_name
    name = block[:100].split(b"\0", 1)[0]
    prefix = block[345:500].split(b"\0", 1)[0] if block[257:263] == b"ustar\0" else b""
    return prefix + b"/" + name if prefix else name


def _number(field: bytes) -> int:
    """Octal text, or GNU's base 256 for what is too large for it; those are too large for us too, but said as such."""
    if field[0] & 0x80:
        return int.from_bytes(field[1:], "big") if field[0] == 0x80 else 2**63
    value = _octal(field)
    if value is None:
        raise Refused("malformed_archive", "a tar header holds something else than a number; pack the images again")
    return value


def _octal(field: bytes) -> int | None:
    digits = field.split(b"\0", 1)[0].strip(b" ")
    if digits.strip(b"01234567"):
        return None
    return int(digits or b"0", 8)


def _checksum(block: bytes) -> int:
    return sum(block[:148]) + 8 * ord(" ") + sum(block[156:])


def _check_rest(stream: _Capped) -> None:
    """Nothing but padding may follow the end mark. Reading on also checks a gzip stream's checksum."""
    if stream.exactly(BLOCK) != _ZEROS:
        raise Refused("unexpected_data", "something follows the tar's end mark; pack the images again")
    while rest := stream.read(BLOCK):
        if rest.strip(b"\0"):
            raise Refused("unexpected_data", "something follows the tar's end mark; pack the images again")
