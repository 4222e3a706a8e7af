import bz2
import gzip
import lzma
import tarfile
import tracemalloc

import pytest

from tests.datasets.archives import (
    TAR_END,
    pax,
    png,
    some,
    tar_entry,
    tar_gz,
    tar_header,
    tar_member,
    tar_of,
    zip_of,
)
from tests.datasets.conftest import Judge

HONEST = tar_entry(b"cats/1.png", png(1)) + tar_entry(b"cats/2.png", png(2))


def test_a_plain_tar_is_accepted(judge: Judge) -> None:
    """The control of every refusal below."""
    assert judge(HONEST + TAR_END).images == 2
    assert judge(tar_gz(HONEST + TAR_END)).images == 2


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("zipped", [False, True])
def test_every_dialect_is_read_with_long_and_foreign_names(judge: Judge, format: int, zipped: bool) -> None:
    long = "a-long-folder-name-" * 4
    files = {f"{long}/{'file' * 15}-ö.png": png(1), f"{long}/2.png": png(2), "./dogs/ü.png": png(3)}
    tar = tar_of(files, format)
    report = judge(tar_gz(tar) if zipped else tar)
    assert report.status == "processed", report.detail
    assert {verdict.name for verdict in report.verdicts} == {name.removeprefix("./") for name in files}


def test_folder_entries_and_a_git_archives_comment_are_fine(judge: Judge) -> None:
    folder, _ = tar_member("cats", type=tarfile.DIRTYPE, mode=0o2775)
    tar = pax({"comment": "0123abc"}, b"g") + tar_of([(folder, b""), *(tar_member(*file) for file in some().items())])
    assert judge(tar).images == 3


@pytest.mark.parametrize(
    ("archive", "code"),
    [
        (bytes(10240), "no_images"),
        (HONEST, "truncated"),
        (HONEST + bytes(512), "truncated"),
        (HONEST[:-512], "truncated"),
        (tar_gz(HONEST + TAR_END)[:-20], "truncated"),
        (tar_gz(HONEST + TAR_END)[:-4], "truncated"),
        (tar_gz(HONEST + TAR_END)[:40], "truncated"),
        (tar_gz(HONEST + TAR_END)[:-8] + bytes(8), "bad_crc"),
        (tar_gz(HONEST + TAR_END) + tar_gz(HONEST + TAR_END), "unexpected_data"),
        (HONEST + TAR_END + b"more".ljust(512), "unexpected_data"),
        (HONEST + bytes(512) + HONEST + TAR_END, "unexpected_data"),
        (HONEST + b"x" * 512 + TAR_END, "malformed_archive"),
        (HONEST + tar_header(b"a.png", b"9" * 12) + TAR_END, "malformed_archive"),
        (HONEST + tar_header(b"a.png", b"\x80" + b"\xff" * 11) + TAR_END, "too_large_uncompressed"),
        (HONEST + tar_header(b"a.png", b"\xff" * 12) + TAR_END, "too_large_uncompressed"),
        (HONEST + tar_header(b"a.png", b"77777777777\0") + TAR_END, "too_large_uncompressed"),
        (HONEST + tar_entry(b"../x.png", png(3)) + TAR_END, "bad_entry_name"),
        (HONEST + tar_entry(b"/etc/x.png", png(3)) + TAR_END, "bad_entry_name"),
        (HONEST + tar_entry(b"cats/\xff\xfe.png", png(3)) + TAR_END, "bad_entry_name"),
        (HONEST + tar_entry(b"", png(3)) + TAR_END, "bad_entry_name"),
        (HONEST + tar_entry(b"cats/1.png", png(3)) + TAR_END, "bad_entry_name"),
        (HONEST + tar_entry(b"@LongLink", b"n" * 2000, b"L") + tar_entry(b"x", png(3)) + TAR_END, "bad_entry_name"),
        (HONEST + pax({"path": "../../x.png"}) + tar_entry(b"cats/3.png", png(3)) + TAR_END, "bad_entry_name"),
        (HONEST + pax({"path": "/x.png"}) + tar_entry(b"cats/3.png", png(3)) + TAR_END, "bad_entry_name"),
        (HONEST + pax({"size": "1"}) + tar_entry(b"cats/3.png", png(3)) + TAR_END, "size_mismatch"),
        (HONEST + pax({"size": "99999999999999"}) + tar_entry(b"cats/3.png") + TAR_END, "size_mismatch"),
        (HONEST + pax({"linkpath": "/etc/passwd"}) + tar_entry(b"cats/3.png", png(3)) + TAR_END, "bad_entry_type"),
        (HONEST + pax({"GNU.sparse.major": "1"}) + tar_entry(b"cats/3.png", png(3)) + TAR_END, "bad_entry_type"),
        (HONEST + pax({"path": "x.png"}, b"g") + TAR_END, "malformed_archive"),
        (HONEST + pax({"uid": "1"}) + pax({"uid": "2"}) + tar_entry(b"x.png", png(3)) + TAR_END, "malformed_archive"),
        (HONEST + tar_entry(b"x", b"999 path=x\n", b"x") + TAR_END, "malformed_archive"),
        (HONEST + tar_entry(b"x", b"1" * 60_000, b"x") + TAR_END, "malformed_archive"),
        (HONEST + tar_entry(b"x", b"0 a=b\n", b"x") + TAR_END, "malformed_archive"),
        (HONEST + tar_entry(b"x", b"5 a=b", b"x") + TAR_END, "malformed_archive"),
        (HONEST + tar_entry(b"x", bytes(100_000), b"x") + TAR_END, "oversized_metadata"),
        (HONEST + tar_header(b"x", b"\x80" + b"\x7f" * 11, b"x") + TAR_END, "oversized_metadata"),
        (HONEST + pax({"mtime": "1"}) + TAR_END, "truncated"),
        (HONEST + tar_entry(b"folder", b"x", b"5") + TAR_END, "bad_entry_type"),
        (HONEST + tar_entry(b"cats/s.png", png(3), mode=0o4755) + TAR_END, "bad_entry_type"),
        (HONEST + tar_entry(b"cats/more.tar", HONEST) + TAR_END, "nested_archive"),
        (HONEST + tar_entry(b"cats/more.png", tar_gz(HONEST)) + TAR_END, "nested_archive"),
        (HONEST + tar_entry(b"cats/more.png", HONEST) + TAR_END, "nested_archive"),
        (tar_gz(tar_gz(HONEST + TAR_END)), "nested_archive"),
        (tar_gz(zip_of(some())), "nested_archive"),
        (tar_gz(b"just a text " * 100), "not_an_archive"),
        (tar_gz(b""), "truncated"),
        (b"\x1f\x8b" + bytes(range(200)), "bad_crc"),
        (bz2.compress(HONEST + TAR_END), "unsupported_compression"),
        (lzma.compress(HONEST + TAR_END), "unsupported_compression"),
        (lzma.compress(HONEST + TAR_END, lzma.FORMAT_ALONE), "unsupported_compression"),
        (b"\x28\xb5\x2f\xfd" + bytes(600), "unsupported_compression"),
        (b"7z\xbc\xaf\x27\x1c" + bytes(600), "unsupported_compression"),
        (b"Rar!\x1a\x07\x01" + bytes(600), "unsupported_compression"),
        (gzip.compress(bz2.compress(HONEST * 20)), "nested_archive"),
    ],
)  # fmt: skip
def test_a_broken_or_hostile_tar_is_refused(judge: Judge, archive: bytes, code: str) -> None:
    report = judge(archive)
    assert (report.status, report.code, report.images) == ("error", code, 0), report.detail
    assert report.detail


@pytest.mark.parametrize(
    "kind", [b"1", b"2", b"3", b"4", b"6", b"7", b"S", b"K", b"V", b"M", b"D", b"N", b"Z", b"\xff"]
)
def test_links_devices_sparse_and_unknown_entries_are_refused(judge: Judge, kind: bytes) -> None:
    assert judge(HONEST + tar_entry(b"cats/3.png", kind=kind) + TAR_END).code == "bad_entry_type"


def test_a_gzip_bomb_stops_at_the_cap(judge: Judge) -> None:
    bomb = tar_gz(tar_entry(b"cats/1.png", png()) + tar_header(b"cats/2.png", 10**9) + bytes(64 * 1024**2))
    assert len(bomb) < 100_000
    tracemalloc.start()
    by_size, by_cap = judge(bomb, max_uncompressed_bytes=10**8), judge(bomb)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert by_size.code == "too_large_uncompressed"
    assert by_cap.code == "truncated"  # read to the end of the 64 MiB that it really has, in small pieces
    assert peak < 4_000_000


def test_a_gzip_bomb_of_padding_stops_at_the_cap(judge: Judge) -> None:
    bomb = tar_gz(HONEST + bytes(16 * 1024**2))
    assert judge(bomb, max_uncompressed_bytes=8 * 1024**2).code == "too_large_uncompressed"


def test_empty_members_stop_at_the_entry_cap(judge: Judge) -> None:
    tar = b"".join(tar_entry(f"{index}.txt".encode()) for index in range(3000))
    assert judge(tar_gz(HONEST + tar + TAR_END), max_entries=1000).code == "too_many_entries"
    assert judge(HONEST + TAR_END, max_entries=2).images == 2
    assert judge(HONEST + TAR_END, max_entries=1).code == "too_many_entries"


def test_endless_metadata_headers_stop_at_the_entry_cap(judge: Judge) -> None:
    assert judge(tar_gz(HONEST + pax({"comment": "x"}, b"g") * 500), max_entries=100).code == "too_many_entries"
