import io
import struct
import tracemalloc
import zipfile

import pytest

from tests.datasets.archives import (
    Raw,
    encode,
    picture,
    png,
    quoted_overlap,
    raw_zip,
    some,
    zip64_end,
    zip_info,
    zip_of,
)
from tests.datasets.conftest import Judge

HONEST = [Raw(b"cats/1.png", png(1)), Raw(b"cats/2.png", png(2))]


def test_a_plain_zip_is_accepted(judge: Judge) -> None:
    """The control of every refusal below: the same hand, nothing wrong."""
    report = judge(raw_zip(HONEST))
    assert (report.status, report.code, report.images) == ("processed", None, 2)


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_stored_and_deflated_entries_are_read(judge: Judge, method: int) -> None:
    assert judge(zip_of(some(), method)).images == 3


@pytest.mark.parametrize(
    ("archive", "code"),
    [
        (b"", "not_an_archive"),
        (bytes(range(256)) * 8, "not_an_archive"),
        (b"hello, this is no archive", "not_an_archive"),
        (png(), "not_an_archive"),
        (zip_of({}), "no_images"),
        (zip_of({"README.md": b"hi", "__MACOSX/._a.png": b"x"}), "no_images"),
        (zip_of(some())[:-30], "truncated"),
        (zip_of(some())[: len(zip_of(some())) // 2], "truncated"),
        (zip_of(some())[:-1], "truncated"),
        (zip_of(some()) + b"x", "unexpected_data"),
        (encode(picture(), "JPEG") + zip_of(some()), "not_an_archive"),
        (b"\1" * 10 * 1024**2 + zip_of(some()), "not_an_archive"),
        (bytes(10 * 1024**2) + zip_of(some()), "unexpected_data"),  # zeros are the end mark of a tar
        (raw_zip(HONEST, prefix=b"PK\3\4" + bytes(1000)), "unexpected_data"),
        (raw_zip(HONEST, shift=-1), "unexpected_data"),
        (raw_zip(HONEST, shift=1), "truncated"),
        (raw_zip(HONEST, comment=bytes(60_000)), "oversized_metadata"),
        (raw_zip(HONEST, suffix=bytes(10 * 1024**2)), "truncated"),
        (raw_zip([Raw(b"a.png", png(), extra=struct.pack("<2H", 1, 60_000) + bytes(60_000))]), "oversized_metadata"),
        (raw_zip([Raw(b"a.png", png(), comment=bytes(60_000))]), "oversized_metadata"),
        (raw_zip([Raw(b"a.png", png(), trailing=bytes(5_000)), Raw(b"b.png", png(1))]), "unexpected_data"),
        (raw_zip(HONEST, count=1), "malformed_archive"),
        (raw_zip(HONEST, count=3), "malformed_archive"),
        (raw_zip([Raw(b"a.png", png(), disk=7)]), "malformed_archive"),
        (raw_zip([Raw(b"a.png", png(), crc=1), Raw(b"b.png", png())]), "bad_crc"),
        (raw_zip([Raw(b"a.png", png(), method=8, size=10)]), "size_mismatch"),
        (raw_zip([Raw(b"a.png", png(), method=8, size=10_000)]), "size_mismatch"),
        (raw_zip([Raw(b"a.png", png(), size=10)]), "size_mismatch"),
        (raw_zip([Raw(b"a.png", png(), flags=1)]), "encrypted"),
        (raw_zip([Raw(b"a.png", png(), flags=1 << 6)]), "encrypted"),
        (raw_zip([Raw(b"a.png", png(), flags=1 << 13)]), "encrypted"),
        (raw_zip([Raw(b"a.png", png(), method=99)]), "encrypted"),
        (zip_of(some(), zipfile.ZIP_LZMA), "unsupported_compression"),
        (zip_of(some(), zipfile.ZIP_BZIP2), "unsupported_compression"),
        (raw_zip([Raw(b"a.png", png(), flags=1 << 5)]), "unsupported_compression"),
        (zip_of({**some(), "cats/more.zip": zip_of(some())}), "nested_archive"),
        (zip_of({**some(), "cats/more.tar.gz": b"x"}), "nested_archive"),
        (zip_of({**some(), "cats/more.png": zip_of(some())}), "nested_archive"),
        (raw_zip([Raw(b"a.png", png(), local_name=b"b.png")]), "bad_entry_name"),
        (zip_of([*some().items(), ("cats//0.png", png(9))]), "bad_entry_name"),
        (zip_of([*some().items(), ("./cats/0.png", png(9))]), "bad_entry_name"),
    ],
)  # fmt: skip
def test_a_broken_or_hostile_zip_is_refused(judge: Judge, archive: bytes, code: str) -> None:
    report = judge(archive)
    assert (report.status, report.code, report.images, report.sha256) == ("error", code, 0, None)
    assert report.detail


@pytest.mark.parametrize(
    "name",
    [
        b"../../x.png", b"/abs/x.png", b"..\\..\\w.png", b"C:\\x.png", b"C:x.png", b"cats/../../x.png", b"a//b.png",
        b"cats/./b.png", b"nul\0.png", b"esc\x1b[31m.png", b"line\r\n.png", "rtl\u202egnp.exe.png".encode(),
        b"n" * 300 + b".png", b"n" * 60_000, b"d/" * 10_000 + b"x.png", b"d/" * 40 + b"x.png", b"",
    ],
)  # fmt: skip
def test_a_bad_name_is_refused_and_shown_safely(judge: Judge, name: bytes) -> None:
    report = judge(raw_zip([*HONEST, Raw(name, png(3), mode=0)]))
    assert (report.status, report.code) == ("error", "bad_entry_name")
    assert report.detail
    assert report.detail.isprintable()
    assert len(report.detail) < 400


def test_names_without_the_utf8_flag_are_read_all_the_same(judge: Judge) -> None:
    entries = [Raw("gatos/niño.png".encode(), png(1)), Raw(b"gatos/ni\xa4o2.png", png(2))]
    assert [verdict.name for verdict in judge(raw_zip(entries)).verdicts] == ["gatos/niño.png", "gatos/niño2.png"]
    assert judge(raw_zip([Raw(b"gatos/ni\xa4o.png", png(), flags=1 << 11)])).code == "bad_entry_name"


@pytest.mark.parametrize("mode", [0o120777, 0o020644, 0o060644, 0o010644, 0o140755, 0o104755, 0o102755])
@pytest.mark.parametrize("system", [0, 3])
def test_links_devices_and_setuid_files_are_refused(judge: Judge, mode: int, system: int) -> None:
    report = judge(zip_of([*some().items(), (zip_info("cats/link.png", mode, system), b"/etc/passwd")]))
    assert (report.code, "cats/link.png" in str(report.detail)) == ("bad_entry_type", True)


def test_folder_entries_are_accepted_unless_they_hold_data(judge: Judge) -> None:
    folder = zip_info("cats/", 0o042775)
    assert judge(zip_of([(folder, b""), *some().items()])).images == 3
    assert judge(raw_zip([Raw(b"cats/", b"data", mode=0o040755), *HONEST])).code == "bad_entry_type"


def test_a_data_descriptor_between_entries_is_no_hidden_data(judge: Judge) -> None:
    data = png(5)
    descriptor = struct.pack("<4sLLL", b"PK\7\x08", 0, len(data), len(data))
    entries = [Raw(f"{shade}.png".encode(), png(shade), flags=1 << 3, trailing=descriptor) for shade in range(2)]
    assert judge(raw_zip(entries)).images == 2


def test_a_quoted_overlap_bomb_is_refused_unread(judge: Judge) -> None:
    bomb = quoted_overlap(count=500, kernel_bytes=4_000_000)
    with zipfile.ZipFile(io.BytesIO(bomb)) as control:  # it is a real one: Python 3.11.7 would read it
        assert len(bomb) < 80_000
        assert sum(info.file_size for info in control.infolist()) > 2_000_000_000
    tracemalloc.start()
    report = judge(bomb, max_uncompressed_bytes=10 * 1024**3)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert report.code == "overlapping_entries"
    assert peak < 4_000_000
    assert judge(bomb).code == "too_large_uncompressed"


def test_many_records_on_one_body_are_refused(judge: Judge) -> None:
    body = Raw(b"a.png", bytes(100_000), method=8)
    others = [Raw(b"a.png", bytes(100_000), method=8, offset=0, has_local=False) for _ in range(499)]
    assert judge(raw_zip([body, *others])).code == "overlapping_entries"


def test_an_entry_that_runs_into_the_directory_is_refused(judge: Judge) -> None:
    longer = len(png(1)) + 40
    assert judge(raw_zip([Raw(b"a.png", png(1), size=longer, packed_size=longer)])).code == "overlapping_entries"


@pytest.mark.parametrize("declared", [None, 2**31])
def test_a_deflate_bomb_stops_at_the_cap(judge: Judge, declared: int | None) -> None:
    zeros = bytes(64 * 1024**2)
    archive = raw_zip([Raw(b"a.png", zeros, method=8, size=declared)])
    assert len(archive) < 100_000
    tracemalloc.start()
    report = judge(archive)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert report.code == "too_large_uncompressed"
    assert peak < 4_000_000


def test_a_bomb_that_announces_little_stops_at_what_it_announced(judge: Judge) -> None:
    archive = raw_zip([Raw(b"a.png", bytes(64 * 1024**2), method=8, size=1000)])
    tracemalloc.start()
    report = judge(archive)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert report.code == "size_mismatch"
    assert peak < 4_000_000


def test_many_small_bombs_are_refused_by_their_sum(judge: Judge) -> None:
    report = judge(zip_of({f"{index}.png": bytes(100_000) for index in range(100)}), max_uncompressed_bytes=5_000_000)
    assert (report.code, "10000000 bytes" in str(report.detail)) == ("too_large_uncompressed", True)


@pytest.mark.parametrize("number", [2**63, 2**64 - 1, 2**62])
def test_absurd_zip64_numbers_are_refused(judge: Judge, number: int) -> None:
    plain = zip_of(some())
    for claims in ({"entries": number}, {"size": number}, {"offset": number}):
        honest = {"entries": 3, "size": 100, "offset": 100}
        assert judge(zip64_end(plain, **{**honest, **claims})).status == "error"
    extra = struct.pack("<2H3Q", 1, 24, number, number, number)
    entry = Raw(b"a.png", png(), size=2**32 - 1, packed_size=2**32 - 1, offset=2**32 - 1, extra=extra)
    assert judge(raw_zip([entry])).code == "too_large_uncompressed"
    entry.extra = struct.pack("<2H3Q", 1, 24, 10, 10, number)
    assert judge(raw_zip([entry])).code == "truncated"
    entry.extra = struct.pack("<2HQ", 1, 8, number)
    assert judge(raw_zip([entry])).code == "malformed_archive"


class Pipe(io.RawIOBase):
    """A sink that cannot seek, as a zip streamed over a network has it."""

    def __init__(self) -> None:
        self.data = bytearray()

    def writable(self) -> bool:
        return True

    def write(self, data: bytes, /) -> int:
        self.data += data
        return len(data)


@pytest.mark.parametrize("force_zip64", [False, True])
@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("seekable", [False, True])
def test_streamed_and_zip64_entries_of_other_writers_are_read(
    judge: Judge, force_zip64: bool, method: int, seekable: bool
) -> None:
    sink = io.BytesIO() if seekable else Pipe()
    with zipfile.ZipFile(sink, "w", method) as archive:
        for name, data in some().items():
            with archive.open(name, "w", force_zip64=force_zip64) as entry:
                entry.write(data)
    made = sink.getvalue() if isinstance(sink, io.BytesIO) else bytes(sink.data)
    assert judge(made).images == 3


def test_numbers_that_stand_in_the_zip64_field_are_read_from_there(judge: Judge) -> None:
    data = png(1)
    extra = struct.pack("<2H", 0x9999, 2) + b"xx" + struct.pack("<2H3Q", 1, 24, len(data), len(data), 0)
    entry = Raw(b"1.png", data, size=2**32 - 1, packed_size=2**32 - 1, extra=extra)
    archive = bytearray(raw_zip([entry, Raw(b"2.png", png(2))]))
    at = archive.find(b"PK\1\2")
    archive[at + 42 : at + 46] = b"\xff" * 4
    assert judge(bytes(archive)).images == 2


def test_a_part_of_a_split_zip_is_refused(judge: Judge) -> None:
    archive = bytearray(zip_of(some()))
    archive[-18:-14] = struct.pack("<2H", 1, 1)
    assert judge(bytes(archive)).code == "unsupported_compression"


def test_a_zip64_end_that_is_not_where_it_should_be_is_refused(judge: Judge) -> None:
    plain = zip_of(some())
    size, offset = struct.unpack("<2L", plain[-10:-2])
    archive = bytearray(zip64_end(plain, entries=3, size=size, offset=offset))
    archive[-34:-26] = struct.pack("<Q", 5)
    assert judge(bytes(archive)).code == "malformed_archive"


def test_an_honest_zip64_end_is_read(judge: Judge) -> None:
    plain = zip_of(some())
    size, offset = struct.unpack("<2L", plain[-10:-2])
    assert judge(zip64_end(plain, entries=3, size=size, offset=offset)).images == 3


def test_too_many_entries_are_refused_by_the_end_record_alone(judge: Judge) -> None:
    report = judge(raw_zip(HONEST, count=60_000))  # no such entries are there: nobody went to look
    assert report.code == "too_many_entries"
    assert judge(zip64_end(zip_of(some()), entries=200_000, size=1, offset=1)).code == "too_many_entries"
