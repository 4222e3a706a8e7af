"""A strict zip reader: every byte belongs to one entry, and nothing is unpacked before the whole directory made sense.

Python's own reader (3.11) takes overlapping entries, prefixes and trailing data, which is what bombs and polyglots are
made of. Layouts after PKWARE's APPNOTE 6.3.10.
"""

import stat
import struct
import zlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import BinaryIO

from core.datasets.limits import Limits
from core.datasets.names import MAX_NAME_BYTES, Parts, entry_parts
from core.datasets.report import Refused, quoted

_END = struct.Struct("<4s4H2LH")  # signature, disks (2), entries here, entries, directory size, offset, comment length
_END64 = struct.Struct("<4sQ2H2L4Q")  # signature, size, versions (2), disks (2), entries (2), directory size, offset
_LOCATOR64 = struct.Struct("<4sLQL")  # signature, disk, offset of the zip64 end record, disks
_ENTRY = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")

MAX_METADATA_BYTES = 1024  # of one comment, one entry's extra fields
MAX_DIRECTORY_BYTES = 32 * 1024**2
_CHUNK = 64 * 1024

_ENCRYPTED, _DESCRIPTOR, _PATCHED, _STRONG, _UTF8, _MASKED = 1 << 0, 1 << 3, 1 << 5, 1 << 6, 1 << 11, 1 << 13
_STORED, _DEFLATED, _AES = 0, 8, 99
_DESCRIPTOR_BYTES = (0, 12, 16, 20, 24)


@dataclass(frozen=True, slots=True)
class ZipEntry:
    parts: Parts
    size: int
    is_folder: bool
    raw_name: bytes
    flags: int
    method: int
    crc: int
    packed: int
    offset: int

    @property
    def name(self) -> str:
        return "/".join(self.parts)


@dataclass(frozen=True, slots=True)
class _Directory:
    entries: int
    size: int
    offset: int


def find_directory(file: BinaryIO, limits: Limits) -> _Directory:
    """Where the entry list stands and how long it claims to be, from the last bytes alone, before any listing."""
    length = file.seek(0, 2)
    tail_start = max(0, length - _END.size - 0xFFFF - _LOCATOR64.size)
    file.seek(tail_start)
    tail = file.read()
    at = tail.rfind(b"PK\x05\x06")
    if at < 0 or len(tail) - at < _END.size:
        raise Refused("truncated", "the zip has no end record: it was cut short, or something was appended to it")
    _, disk, first_disk, here, entries, size, offset, comment = _END.unpack_from(tail, at)
    trailing = len(tail) - at - _END.size
    if trailing != comment:
        code = "truncated" if trailing < comment else "unexpected_data"
        raise Refused(code, f"the zip's end record announces {comment} bytes after it, and {trailing} are there")
    if comment > MAX_METADATA_BYTES:
        raise Refused(
            "oversized_metadata", f"the zip's comment has {comment} bytes; at most {MAX_METADATA_BYTES} are taken"
        )

    end = tail_start + at
    locator_at = at - _LOCATOR64.size
    if locator_at >= 0 and tail[locator_at : locator_at + 4] == b"PK\x06\x07":
        _, _, end64, disks = _LOCATOR64.unpack_from(tail, locator_at)
        if end64 + _END64.size != tail_start + locator_at or disks > 1:
            raise _malformed("its zip64 end record is not where the locator says")
        file.seek(end64)
        signature, _, _, _, disk64, first64, here64, entries64, size64, offset64 = _END64.unpack(file.read(_END64.size))
        pairs = (
            (here, here64, 0xFFFF),
            (entries, entries64, 0xFFFF),
            (size, size64, 2**32 - 1),
            (offset, offset64, 2**32 - 1),
        )
        if signature != b"PK\x06\x06" or any(small not in (big, full) for small, big, full in pairs):
            raise _malformed("its two end records disagree")
        disk, first_disk = disk64, first64
        here, entries, size, offset, end = here64, entries64, size64, offset64, end64
    if disk or first_disk or here != entries:
        raise Refused("unsupported_compression", "the zip is one part of several; send it as one file")
    if entries > limits.max_entries:
        raise Refused("too_many_entries", f"the zip lists {entries} entries; at most {limits.max_entries} are taken")
    if offset + size != end:
        code = "unexpected_data" if offset + size < end else "truncated"
        raise Refused(
            code, "the zip's entry list is not where its end record says: data stands before the archive, or is missing"
        )
    if size > MAX_DIRECTORY_BYTES:
        raise Refused(
            "oversized_metadata", f"the zip's entry list has {size} bytes; at most {MAX_DIRECTORY_BYTES} are taken"
        )
    if size < entries * _ENTRY.size:
        raise _malformed(f"its entry list is too short for {entries} entries")
    return _Directory(entries, size, offset)


class ZipReader:
    """The entries of an open zip, all checked at construction; contents are read one at a time, under their size."""

    def __init__(self, file: BinaryIO, limits: Limits) -> None:
        self._file = file
        directory = find_directory(file, limits)
        self._entries = list(self._parse(directory))
        total = sum(entry.size for entry in self._entries)
        if total > limits.max_uncompressed_bytes:
            raise Refused(
                "too_large_uncompressed",
                f"the archive unpacks to {total} bytes; at most {limits.max_uncompressed_bytes} are taken",
            )
        self._starts = self._locate(directory.offset)

    def entries(self) -> list[ZipEntry]:
        return self._entries

    def contents(self, wanted: Collection[Parts]) -> Iterator[tuple[ZipEntry, bytes]]:
        """The wanted files in the archive's own order, each checked against its size and checksum."""
        for entry, start in zip(self._entries, self._starts, strict=True):
            if entry.parts in wanted and not entry.is_folder:
                yield entry, self._read(entry, start)

    def _parse(self, directory: _Directory) -> Iterator[ZipEntry]:
        self._file.seek(directory.offset)
        block = self._file.read(directory.size)
        at = 0
        for _ in range(directory.entries):
            if block[at : at + 4] != b"PK\x01\x02" or len(block) - at < _ENTRY.size:
                raise _malformed("its entry list breaks off")
            (
                _,
                _,
                _,
                flags,
                method,
                _,
                _,
                crc,
                packed,
                size,
                name_length,
                extra_length,
                comment_length,
                disk,
                _,
                mode,
                offset,
            ) = _ENTRY.unpack_from(block, at)
            at += _ENTRY.size
            raw_name = block[at : at + name_length]
            extra = block[at + name_length : at + name_length + extra_length]
            at += name_length + extra_length + comment_length
            if at > len(block):
                raise _malformed("its entry list breaks off")
            if name_length > MAX_NAME_BYTES:
                raise Refused(
                    "bad_entry_name", f"the entry name {quoted(raw_name)} is longer than {MAX_NAME_BYTES} bytes"
                )
            if extra_length > MAX_METADATA_BYTES or comment_length > MAX_METADATA_BYTES:
                raise Refused(
                    "oversized_metadata", f"{quoted(raw_name)} carries more than {MAX_METADATA_BYTES} bytes of metadata"
                )
            size, packed, offset = _zip64(extra, raw_name, size, packed, offset)
            if disk not in (0, 0xFFFF):
                raise _malformed(f"{quoted(raw_name)} claims to lie on another disk")
            name = _decode(raw_name, utf8=bool(flags & _UTF8))
            parts = entry_parts(name)
            is_folder = _check_type(name, mode >> 16, size, packed)
            if flags & (_ENCRYPTED | _STRONG | _MASKED) or method == _AES:
                raise Refused("encrypted", f"{quoted(name)} is encrypted; send the archive without a password")
            if method not in (_STORED, _DEFLATED) or flags & _PATCHED:
                raise Refused(
                    "unsupported_compression",
                    f"{quoted(name)} is packed by method {method}; only stored and deflate are taken",
                )
            if method == _STORED and size != packed:
                raise Refused("size_mismatch", f"{quoted(name)} is stored plainly, yet its two sizes differ")
            yield ZipEntry(parts, size, is_folder, raw_name, flags, method, crc, packed, offset)
        if at != len(block):
            raise _malformed("its entry list holds more than it counts")

    def _locate(self, directory_offset: int) -> list[int]:
        """Where each entry's bytes start. Entries must tile the file: none overlap, nothing hides between them."""
        starts = [0] * len(self._entries)
        end, previous = 0, None
        for index in sorted(range(len(self._entries)), key=lambda index: self._entries[index].offset):
            entry = self._entries[index]
            shown = quoted(entry.raw_name)
            if entry.offset < end:
                raise Refused(
                    "overlapping_entries",
                    f"{shown} shares bytes with {quoted(previous.raw_name) if previous else 'another'}",
                )
            if entry.offset + _LOCAL.size > directory_offset:
                raise Refused("truncated", f"{shown} lies outside of the archive")
            _check_gap(entry.offset - end, previous, shown)
            self._file.seek(entry.offset)
            signature, _, flags, method, _, _, _, _, _, name_length, extra_length = _LOCAL.unpack(
                self._file.read(_LOCAL.size)
            )
            if (
                signature != b"PK\x03\x04"
                or name_length != len(entry.raw_name)
                or self._file.read(name_length) != entry.raw_name
            ):
                raise Refused("bad_entry_name", f"{shown} goes by another name in the entry list than at its place")
            if method != entry.method or (flags ^ entry.flags) & _ENCRYPTED:
                raise _malformed(f"{shown} is described in two different ways")
            starts[index] = entry.offset + _LOCAL.size + name_length + extra_length
            end, previous = starts[index] + entry.packed, entry
            if end > directory_offset:
                raise Refused("overlapping_entries", f"{shown} runs into the archive's entry list")
        _check_gap(directory_offset - end, previous, "the entry list")
        return starts

    def _read(self, entry: ZipEntry, start: int) -> bytes:
        self._file.seek(start)
        if entry.method == _STORED:
            data = self._file.read(entry.size)
        else:
            data = self._inflate(entry)
        if len(data) != entry.size:
            raise Refused(
                "size_mismatch",
                f"{quoted(entry.name)} unpacks to another size than the {entry.size} bytes it announces",
            )
        if zlib.crc32(data) != entry.crc:
            raise Refused(
                "bad_crc", f"{quoted(entry.name)} fails its checksum: the archive is damaged; zip the images again"
            )
        return data

    def _inflate(self, entry: ZipEntry) -> bytes:
        """At most one byte more than announced, however much more the stream would give."""
        inflater = zlib.decompressobj(-zlib.MAX_WBITS)
        data, left = bytearray(), entry.packed
        try:
            while not inflater.eof and len(data) <= entry.size:
                chunk = inflater.unconsumed_tail
                if not chunk:
                    chunk = self._file.read(min(_CHUNK, left))
                    left -= len(chunk)
                    if not chunk:
                        raise Refused("truncated", f"{quoted(entry.name)} ends in the middle")
                data += inflater.decompress(chunk, entry.size + 1 - len(data))
        except zlib.error:
            raise Refused("bad_crc", f"{quoted(entry.name)} is damaged inside; zip the images again") from None
        if inflater.eof and (left or inflater.unused_data):
            raise Refused("unexpected_data", f"{quoted(entry.name)} has data after its end")
        return bytes(data)


def _zip64(extra: bytes, raw_name: bytes, size: int, packed: int, offset: int) -> tuple[int, int, int]:
    """The three numbers with those that did not fit 32 bits replaced by their zip64 field."""
    values = [size, packed, offset]
    full = [index for index, value in enumerate(values) if value == 2**32 - 1]
    at = 0
    while at + 4 <= len(extra):
        tag, length = struct.unpack_from("<2H", extra, at)
        field = extra[at + 4 : at + 4 + length]
        at += 4 + length
        if tag != 1:
            continue
        if len(field) != length or length < 8 * len(full):
            raise _malformed(f"{quoted(raw_name)} has a broken zip64 field")
        for place, index in enumerate(full):
            (values[index],) = struct.unpack_from("<Q", field, 8 * place)
        full = []
    return values[0], values[1], values[2]


def _decode(raw: bytes, *, utf8: bool) -> str:
    """UTF-8 where it is (macOS writes it without saying so), else code page 437 as the format has it."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        if utf8:
            raise Refused("bad_entry_name", f"the entry name {quoted(raw)} says it is UTF-8 and is not") from None
        return raw.decode("cp437")


def _check_type(name: str, mode: int, size: int, packed: int) -> bool:
    """Whether the entry is a folder; anything but a plain file or a folder is refused."""
    kind = stat.S_IFMT(mode)
    is_folder = name.endswith("/") or kind == stat.S_IFDIR
    if kind not in (0, stat.S_IFDIR if is_folder else stat.S_IFREG):
        raise Refused(
            "bad_entry_type", f"{quoted(name)} is a link or special file; only plain files and folders are taken"
        )
    if not is_folder and mode & (stat.S_ISUID | stat.S_ISGID):
        raise Refused("bad_entry_type", f"{quoted(name)} is marked setuid or setgid; only plain files are taken")
    if is_folder and (size or packed > 2):  # an empty deflate stream takes two bytes
        raise Refused("bad_entry_type", f"{quoted(name)} is a folder that holds data of its own")
    return is_folder


def _check_gap(gap: int, before: ZipEntry | None, what: str) -> None:
    allowed = _DESCRIPTOR_BYTES if before is not None and before.flags & _DESCRIPTOR else (0,)
    if gap not in allowed:
        raise Refused("unexpected_data", f"{gap} bytes before {what} belong to no entry; zip the images again")


def _malformed(fault: str) -> Refused:
    return Refused("malformed_archive", f"the zip contradicts itself: {fault}; zip the images again")
