import json
import os
import subprocess
import time
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest
from PIL import Image

from core.datasets.limits import Limits
from core.datasets.pack import read_manifest
from core.datasets.report import Report
from core.datasets.validation import ScratchUnavailable, ValidationInterrupted, validate
from core.errors import Unavailable
from tests.datasets.archives import Raw, encode, picture, png, raw_zip, some, tar_gz, tar_of, zip_of

EXAMPLES = Path(__file__).parents[2] / "examples"
MISBEHAVING = "tests.datasets.crashing_child"


def upload(folder: Path, archive: bytes) -> Path:
    path = folder / "upload"
    path.write_bytes(archive)
    return path


def left_behind(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != "upload")


def running(command: str) -> bool:
    """Whether it still runs after a moment: the kernel ends a killed process in its own time."""
    wanted = command.replace(" ", "\0").encode() + b"\0"
    for _ in range(200):
        if not any(_command(entry) == wanted for entry in Path("/proc").iterdir() if entry.name.isdigit()):
            return False
        time.sleep(0.01)
    return True


def _command(process: Path) -> bytes:
    try:
        return (process / "cmdline").read_bytes()
    except OSError:
        return b""


@pytest.mark.parametrize(("name", "images", "classes"), [("mnist_digits_32", 600, 10), ("openmoji_lineart_64", 527, 9)])
def test_the_shipped_examples_become_packs(tmp_path: Path, name: str, images: int, classes: int) -> None:
    out = tmp_path / "pack.zip"
    report = validate(EXAMPLES / f"{name}.zip", out)
    assert (report.status, report.images, report.rejected, len(report.classes)) == ("processed", images, 0, classes)
    assert report.sha256 == sha256(out.read_bytes()).hexdigest()
    assert left_behind(tmp_path) == ["pack.zip"]
    manifest = read_manifest(out)
    assert (len(manifest.images), manifest.classes) == (images, tuple(report.classes))
    again = validate(EXAMPLES / f"{name}.zip", tmp_path / "again.zip")
    assert again == report


def test_the_same_images_in_zip_tar_and_gzipped_tar_make_the_same_pack(tmp_path: Path) -> None:
    files = {**some("cats"), **some("dogs")}
    digests = set()
    for archive in (zip_of(files), tar_of(files), tar_gz(tar_of(files))):
        digests.add(validate(upload(tmp_path, archive), tmp_path / "pack").sha256)
    assert len(digests) == 1
    assert None not in digests


def test_a_report_survives_json(tmp_path: Path) -> None:
    report = validate(upload(tmp_path, zip_of({**some(), "cats/bad.png": b""})), tmp_path / "pack")
    assert Report.from_json(json.loads(json.dumps(report.to_json()))) == report
    assert report.to_json()["verdicts"][3] == {
        "name": "cats/bad.png",
        "class": "default",
        "verdict": "rejected",
        "code": "decode_failed",
        "detail": "the file is empty",
        "width": None,
        "height": None,
    }


@pytest.mark.parametrize(
    "archive",
    [
        b"no archive",
        zip_of(some())[:-40],
        raw_zip([Raw(b"../x.png", png())]),
        zip_of({"a.png": b""}),
        zip_of({**some(), "x.py": b""}),
    ],
)
def test_a_refusal_leaves_nothing_and_spares_an_earlier_pack(tmp_path: Path, archive: bytes) -> None:
    out = tmp_path / "pack"
    assert validate(upload(tmp_path, archive), out).status == "error"
    assert left_behind(tmp_path) == []
    out.write_bytes(b"earlier")
    (tmp_path / "pack.part").write_bytes(b"left by a crash")
    assert validate(upload(tmp_path, archive), out).status == "error"
    assert (left_behind(tmp_path), out.read_bytes()) == (["pack"], b"earlier")


@pytest.mark.parametrize("misdeed", ["segfault", "abort"])
def test_a_decoder_that_crashes_names_its_image_and_spares_us(tmp_path: Path, misdeed: str) -> None:
    archive = upload(tmp_path, zip_of({**some(), f"cats/{misdeed}.png": png(50)}))
    report = validate(archive, tmp_path / "pack", module=MISBEHAVING)
    assert (report.status, report.code) == ("error", "decode_failed")
    assert f"cats/{misdeed}.png" in str(report.detail)
    assert left_behind(tmp_path) == []
    assert validate(archive, tmp_path / "pack").status == "processed"  # the control: the picture itself is fine


@pytest.mark.parametrize(
    ("misdeed", "limits", "code"),
    [
        ("sleep", Limits(wall_seconds=1.0), "too_slow"),
        ("spin", Limits(cpu_seconds=1), "too_slow"),
        ("spin", Limits(image_cpu_seconds=0.2), "too_slow"),
        ("hog", Limits(memory_bytes=512 * 1024**2), "too_much_memory"),
        ("flood", Limits(), "unreadable"),
        ("bug", Limits(), "unreadable"),
    ],
)
def test_a_child_that_exceeds_its_bounds_is_ended(tmp_path: Path, misdeed: str, limits: Limits, code: str) -> None:
    archive = upload(tmp_path, zip_of({**some(), f"cats/{misdeed}.png": png(50)}))
    report = validate(archive, tmp_path / "pack", limits, module=MISBEHAVING)
    assert (report.status, report.code) == ("error", code)
    assert misdeed in str(report.detail) or misdeed == "flood"
    assert "mistake" not in str(report.detail)
    assert left_behind(tmp_path) == []
    assert not running("sleep 321")


def test_a_process_that_the_child_left_running_is_ended_too(tmp_path: Path) -> None:
    archive = upload(tmp_path, zip_of({**some(), "cats/orphan.png": png(50)}))
    assert validate(archive, tmp_path / "pack", module=MISBEHAVING).status == "processed"
    assert not running("sleep 321")


def test_a_child_ended_from_outside_is_worth_another_try(tmp_path: Path) -> None:
    archive = upload(tmp_path, zip_of({**some(), "cats/killed.png": png(50)}))
    with pytest.raises(ValidationInterrupted, match="SIGKILL") as caught:
        validate(archive, tmp_path / "pack", module=MISBEHAVING)
    assert isinstance(caught.value, Unavailable)
    assert left_behind(tmp_path) == []


def test_a_full_disk_is_our_trouble_and_no_verdict(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "none", str(disk)], capture_output=True).returncode:
        pytest.skip("needs the right to mount")
    try:
        with pytest.raises(ScratchUnavailable, match="ENOSPC"):
            validate(upload(tmp_path, zip_of(some(count=100))), disk / "pack")
        assert left_behind(disk) == []
        assert validate(upload(tmp_path, zip_of(some())), disk / "pack").images == 3
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_pack_over_its_limit_is_refused(tmp_path: Path) -> None:
    archive = upload(tmp_path, zip_of(some(count=20)))
    report = validate(archive, tmp_path / "pack", Limits(max_pack_bytes=2000))
    assert (report.code, left_behind(tmp_path)) == ("dataset_too_large", [])


def test_the_child_inherits_no_secret_and_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFFIT_S3_SECRET_ACCESS_KEY", "hush")
    archive = upload(tmp_path, zip_of({**some(), "cats/environment.png": png(50)}))
    with (tmp_path / "upload").open("rb") as ours:
        os.set_inheritable(ours.fileno(), True)
        report = validate(archive, tmp_path / "pack", module=MISBEHAVING)
    seen = str(report.verdicts[3].detail)
    assert "DIFFFIT" not in seen
    assert "PYTHONPATH" in seen
    files = seen.split("] ", 1)[1]
    assert files.count(str(archive)) == 1  # its own
    assert files.count(str(tmp_path)) == 2  # and the pack


def test_what_the_tick_raises_ends_the_child(tmp_path: Path) -> None:
    archive = upload(tmp_path, zip_of({**some(), "cats/sleep.png": png(50)}))
    ticks = []

    def tick() -> None:
        ticks.append(time.monotonic())
        if len(ticks) == 3:
            raise KeyError("lease lost")

    with pytest.raises(KeyError, match="lease lost"):
        validate(archive, tmp_path / "pack", module=MISBEHAVING, on_tick=tick)
    assert left_behind(tmp_path) == []
    assert not running("sleep 321")


@pytest.mark.parametrize(
    "image",
    [("RGBA", "PNG"), ("CMYK", "JPEG"), ("RGB", "WEBP")],
)
def test_the_largest_pictures_fit_the_memory_that_a_dataset_may_use(tmp_path: Path, image: tuple[str, str]) -> None:
    mode, kind = image
    limits = Limits(max_pixels=4_000_000, memory_bytes=Limits().memory_bytes // 3)
    large = encode(picture(0, (2000, 2000), mode), kind)
    report = validate(upload(tmp_path, zip_of({f"a.{kind.lower()}": large, "b.png": png()})), tmp_path / "pack", limits)
    assert report.images == 2


def test_a_jpeg_of_endless_scans_is_stopped_in_the_midst_of_its_decoding(tmp_path: Path) -> None:
    """Each of its scans is a few bytes and makes the decoder pass over all of its pixels once more."""
    jpeg = encode(Image.new("L", (3000, 3000)), "JPEG", progressive=True, quality=5)
    scan = jpeg[jpeg.rfind(b"\xff\xda") : -2]
    bomb = jpeg[:-2] + scan * 5000 + b"\xff\xd9"
    assert len(bomb) < 200_000
    archive = upload(tmp_path, zip_of({**some(), "cats/scans.jpg": bomb}))
    report = validate(archive, tmp_path / "pack", Limits(image_cpu_seconds=0.5))
    assert (report.code, "cats/scans.jpg" in str(report.detail)) == ("too_slow", True)


def test_an_archive_over_its_limit_is_refused_unread(tmp_path: Path) -> None:
    archive = upload(tmp_path, zip_of(some()))
    report = validate(archive, tmp_path / "pack", replace(Limits(), max_archive_bytes=100))
    assert report.code == "archive_too_large"
