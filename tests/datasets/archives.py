"""Archives made in code, the hostile ones byte by byte where libraries refuse to write them."""

import gzip
import io
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from PIL import Image


def picture(shade: int = 0, size: tuple[int, int] = (32, 32), mode: str = "RGB") -> Image.Image:
    """A picture that differs by shade."""
    return Image.linear_gradient("L").resize(size).point(lambda level: (level + shade) % 256).convert(mode)


def encode(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png(shade: int = 0, size: tuple[int, int] = (32, 32)) -> bytes:
    return encode(picture(shade, size))


def some(folder: str = "cats", count: int = 3) -> dict[str, bytes]:
    """Distinct, acceptable images of one class."""
    return {f"{folder}/{index}.png": png(7 * index + len(folder)) for index in range(count)}


def zip_of(files: Mapping[str, bytes] | Iterable[tuple[str | zipfile.ZipInfo, bytes]], method: int = 8) -> bytes:
    buffer = io.BytesIO()
    pairs = files.items() if isinstance(files, Mapping) else files
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, data in pairs:
            archive.writestr(name, data)
    return buffer.getvalue()


def zip_info(name: str, mode: int, system: int = 3) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.external_attr = mode << 16
    info.create_system = system
    return info


@dataclass
class Raw:
    """One zip entry with every field ours to falsify; `None` means the honest value."""

    name: bytes
    data: bytes = b""
    method: int = 0
    flags: int = 0
    size: int | None = None
    packed_size: int | None = None
    crc: int | None = None
    offset: int | None = None
    local_name: bytes | None = None
    extra: bytes = b""
    comment: bytes = b""
    mode: int = 0o100644
    disk: int = 0
    trailing: bytes = b""  # after the content, as a data descriptor is
    has_local: bool = True


def raw_zip(
    entries: list[Raw],
    *,
    comment: bytes = b"",
    count: int | None = None,
    prefix: bytes = b"",
    suffix: bytes = b"",
    shift: int = 0,
) -> bytes:
    """A zip written by hand; `shift` moves the directory's announced offset."""
    body, directory = bytearray(prefix), bytearray()
    for entry in entries:
        if entry.method == 8:
            deflater = zlib.compressobj(9, zlib.DEFLATED, -15)
            content = deflater.compress(entry.data) + deflater.flush()
        else:
            content = entry.data
        crc = zlib.crc32(entry.data) if entry.crc is None else entry.crc
        size = len(entry.data) if entry.size is None else entry.size
        packed = len(content) if entry.packed_size is None else entry.packed_size
        offset = len(body) if entry.offset is None else entry.offset
        local_name = entry.name if entry.local_name is None else entry.local_name
        if entry.has_local:
            local = (20, entry.flags, entry.method, 0, 0x21, crc, packed, size, len(local_name), 0)
            body += struct.pack("<4s5H3L2H", b"PK\3\4", *local) + local_name + content + entry.trailing
        fields = (0x0314, 20, entry.flags, entry.method, 0, 0x21, crc, packed, size)
        lengths = (len(entry.name), len(entry.extra), len(entry.comment), entry.disk, 0)
        directory += struct.pack("<4s6H3L5H2L", b"PK\1\2", *fields, *lengths, entry.mode << 16, offset)
        directory += entry.name + entry.extra + entry.comment
    total = len(entries) if count is None else count
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, total, total, len(directory), len(body) + shift, len(comment))
    return bytes(body + directory) + end + comment + suffix


def zip64_end(archive: bytes, *, entries: int, size: int, offset: int) -> bytes:
    """The same zip with a zip64 end record that claims these numbers, and a saturated plain one."""
    body = archive[:-22]
    end64 = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, entries, entries, size, offset)
    locator = struct.pack("<4sLQL", b"PK\6\7", 0, len(body), 1)
    return body + end64 + locator + struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, 2**32 - 1, 2**32 - 1, 0)


def quoted_overlap(count: int = 200, kernel_bytes: int = 1_000_000) -> bytes:
    """Fifield's bomb: each entry's stored-block quotes the next local header, and all end in one shared kernel."""
    deflater = zlib.compressobj(9, zlib.DEFLATED, -15)
    kernel = deflater.compress(bytes(kernel_bytes)) + deflater.flush()
    names = [f"{index}.png".encode() for index in range(count)]
    crc_of, size = zlib.crc32(bytes(kernel_bytes)), kernel_bytes
    chunks: list[bytes] = []
    plain = bytes(kernel_bytes)
    tail = kernel
    sizes: list[tuple[int, int, int]] = []
    for index in reversed(range(count)):
        header = (
            struct.pack("<4s5H3L2H", b"PK\3\4", 20, 0, 8, 0, 0x21, crc_of, len(tail), size, len(names[index]), 0)
            + names[index]
        )
        chunks.append(header)
        sizes.append((len(tail), size, crc_of))
        if index:
            quote = struct.pack("<BHH", 0, len(header), len(header) ^ 0xFFFF)
            plain = header + plain
            chunks.append(quote)
            tail = quote + header + tail
            size, crc_of = len(plain), zlib.crc32(plain)
    body, offsets = bytearray(), []
    for chunk in reversed(chunks):
        if chunk.startswith(b"PK\3\4"):
            offsets.append(len(body))
        body += chunk
    body += kernel
    directory = bytearray()
    for name, offset, (packed, full, crc) in zip(names, offsets, reversed(sizes), strict=True):
        directory += struct.pack(
            "<4s6H3L5H2L", b"PK\1\2", 20, 20, 0, 8, 0, 0x21, crc, packed, full, len(name), 0, 0, 0, 0, 0, offset
        )
        directory += name
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, count, count, len(directory), len(body), 0)
    return bytes(body + directory) + end


def tar_member(name: str, data: bytes = b"", **attributes: object) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for key, value in attributes.items():
        setattr(info, key, value)
    return info, data


def tar_of(
    members: Mapping[str, bytes] | list[tuple[tarfile.TarInfo, bytes]], format: int = tarfile.PAX_FORMAT
) -> bytes:
    buffer = io.BytesIO()
    pairs = [tar_member(name, data) for name, data in members.items()] if isinstance(members, Mapping) else members
    with tarfile.open(fileobj=buffer, mode="w", format=format) as archive:
        for info, data in pairs:
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def tar_header(name: bytes, size: int | bytes = 0, kind: bytes = b"0", mode: int = 0o644) -> bytes:
    """One ustar header with a true checksum and whatever else is asked for."""
    number = size if isinstance(size, bytes) else f"{size:011o}\0".encode()
    fields = name.ljust(100, b"\0") + f"{mode:07o}\0".encode() + b"0000000\0" * 2 + number + b"00000000000\0"
    rest = kind + bytes(100) + b"ustar\x0000" + bytes(64) + b"0000000\0" * 2 + bytes(155 + 12)
    checksum = sum(fields) + 8 * 32 + sum(rest)
    return fields + f"{checksum:06o}\0 ".encode() + rest


def tar_entry(name: bytes, data: bytes = b"", kind: bytes = b"0", **header: object) -> bytes:
    return tar_header(name, len(data), kind, **header) + data + bytes(-len(data) % 512)


def pax(records: Mapping[str, str], kind: bytes = b"x") -> bytes:
    """An extended header for the next entry, or (`g`) for all that follow."""
    lines = b""
    for key, value in records.items():
        text = f" {key}={value}\n".encode()
        length = len(text) + 1
        while len(str(length)) + len(text) != length:
            length = len(str(length)) + len(text)
        lines += str(length).encode() + text
    return tar_entry(b"pax", lines, kind)


TAR_END = bytes(1024)


def tar_gz(tar: bytes) -> bytes:
    return gzip.compress(tar, mtime=0)
