"""Whatever the bytes: a report or the one domain error, no other exception, no hang, no pack left of a refusal."""

import io
import tempfile
from pathlib import Path

from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from core.datasets.intake import quick_check
from core.datasets.limits import Limits
from core.datasets.names import entry_parts
from core.datasets.normalise import normalise
from core.datasets.report import Refused
from tests.datasets.archives import encode, pax, picture, png, quoted_overlap, some, tar_entry, tar_gz, tar_of, zip_of

LIMITS = Limits(max_uncompressed_bytes=10**7, max_image_bytes=10**6, max_pixels=10**6)
FILES = {**some("cats", 2), "dogs/a.jpg": encode(picture(1), "JPEG"), "dogs/b.gif": encode(picture(2), "GIF")}
FILES |= {"dogs/c.webp": encode(picture(3), "WEBP"), "notes.txt": b"words"}
SEEDS = [
    zip_of(FILES),
    zip_of(FILES, 0),
    tar_of(FILES),
    tar_gz(tar_of(FILES)),
    pax({"path": "cats/long.png"}) + tar_of(FILES),
    tar_entry(b"@LongLink", b"n" * 200, b"L") + tar_of(FILES),
    quoted_overlap(5, 1000),
]
RELAXED = settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


def judge(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "upload"
        path.write_bytes(data)
        report = normalise(path, io.BytesIO(), LIMITS, "default")
    assert (report.status == "processed") == (report.code is None)
    assert report.status == "processed" or (report.detail and report.detail.isprintable())


@RELAXED
@given(st.binary(max_size=3000))
@example(b"PK\3\4")
@example(b"PK\5\6" + bytes(18))
@example(b"PK\5\6" + b"\xff" * 18)
@example(b"\x1f\x8b")
@example(b"\x1f\x8b\x08" + b"\xff" * 600)
def test_any_bytes_are_judged(data: bytes) -> None:
    judge(data)
    try:
        quick_check(data)
    except Refused:
        pass


@settings(RELAXED, max_examples=400)
@given(
    seed=st.sampled_from(SEEDS),
    edits=st.lists(st.tuples(st.floats(0, 1), st.binary(min_size=1, max_size=8)), min_size=1, max_size=6),
    keep=st.floats(0.2, 1) | st.just(1.0),
)
def test_any_damage_to_an_archive_is_judged(seed: bytes, edits: list[tuple[float, bytes]], keep: float) -> None:
    data = bytearray(seed)
    for where, new in edits:
        at = int(where * (len(data) - len(new)))
        data[at : at + len(new)] = new
    judge(bytes(data[: int(len(data) * keep)]))


@settings(RELAXED, max_examples=200)
@given(
    seed=st.sampled_from([zip_of(FILES), quoted_overlap(5, 1000)]),
    back=st.integers(0, 500),
    new=st.sampled_from([b"\0\0", b"\xff\xff", b"\xff" * 4, b"\x7f", b"PK\1\2", b"PK\5\6", b"PK\6\7", b"\0\0\0\x80"]),
)
def test_any_number_in_a_zips_directory_is_judged(seed: bytes, back: int, new: bytes) -> None:
    at = len(seed) - 1 - back
    judge(seed[:at] + new + seed[at + len(new) :])


@settings(RELAXED, max_examples=200)
@given(
    kind=st.sampled_from(["PNG", "JPEG", "GIF", "WEBP"]),
    edits=st.lists(st.tuples(st.floats(0, 1), st.binary(min_size=1, max_size=4)), min_size=1, max_size=5),
)
def test_any_damage_to_an_image_is_judged(kind: str, edits: list[tuple[float, bytes]]) -> None:
    data = bytearray(encode(picture(5), kind))
    for where, new in edits:
        at = int(where * (len(data) - len(new)))
        data[at : at + len(new)] = new
    judge(zip_of({"a.png": bytes(data), "b.png": png(1), "c.png": png(2)}))


@settings(RELAXED, max_examples=200)
@given(st.text(max_size=60) | st.text(alphabet="./\\:aC\0\u0301 ", max_size=20))
def test_any_name_is_taken_apart_safely_or_refused(name: str) -> None:
    refusal = None
    parts: tuple[str, ...] = ()
    try:
        parts = entry_parts(name)
    except Refused as error:
        refusal = error
    assert refusal is None or (refusal.code == "bad_entry_name" and str(refusal).isprintable())
    assert not {"", ".", ".."} & set(parts)
    assert not any("/" in part or "\\" in part or "\0" in part for part in parts)
