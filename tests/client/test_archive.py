"""A folder becomes the same zip whenever and wherever it is packed."""

import os
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from client.archive import as_archive, sha256_of
from client.errors import ClientError


def make_folder(root: Path, *, names: tuple[str, ...] = ("cat/1.png", "cat/2.png", "dog/1.png")) -> Path:
    for number, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (number * 40, 10, 200)).save(path)
    return root


def packed(folder: Path) -> tuple[str, list[str]]:
    with as_archive(folder) as archive, zipfile.ZipFile(archive) as opened:
        return sha256_of(archive), opened.namelist()


def test_equal_folders_give_equal_bytes_whatever_their_times_modes_and_order(tmp_path: Path) -> None:
    first = make_folder(tmp_path / "a" / "pets")
    second = make_folder(tmp_path / "b" / "pets", names=("dog/1.png", "cat/2.png", "cat/1.png"))
    for name, source in (("dog/1.png", "dog/1.png"), ("cat/2.png", "cat/2.png"), ("cat/1.png", "cat/1.png")):
        (second / name).write_bytes((first / source).read_bytes())
        os.utime(second / name, (1, 1))
        (second / name).chmod(0o600)
    assert packed(first) == packed(second)
    assert packed(first)[1] == ["cat/1.png", "cat/2.png", "dog/1.png"]


def test_another_pixel_gives_other_bytes(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "pets")
    before = packed(folder)
    Image.new("RGB", (8, 8), "white").save(folder / "dog" / "1.png")
    assert packed(folder)[0] != before[0]


def test_hidden_files_and_linked_folders_are_left_out(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "pets")
    names = packed(folder)
    (folder / ".DS_Store").write_bytes(b"x")
    (folder / "cat" / "._1.png").write_bytes(b"x")
    (folder / "__MACOSX").mkdir()
    (folder / "__MACOSX" / "1.png").write_bytes(b"x")
    (folder / "loop").symlink_to(folder)
    assert packed(folder) == names


def test_the_zip_is_named_after_the_folder_and_gone_afterwards(tmp_path: Path) -> None:
    with as_archive(make_folder(tmp_path / "pets")) as archive:
        assert archive.name == "pets.zip"
    assert not archive.exists()


def test_an_archive_is_taken_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "pets.tar.gz"
    path.write_bytes(b"anything: the service judges it")
    with as_archive(path) as archive:
        assert archive == path


@pytest.mark.parametrize(
    ("name", "makes", "message"),
    [
        ("nowhere", None, "no such file or folder"),
        ("photo.png", b"x", "give a folder of images or an archive"),
        ("empty", "folder", "holds no files"),
    ],
)
def test_what_is_no_dataset_is_refused_by_name(
    tmp_path: Path, name: str, makes: bytes | str | None, message: str
) -> None:
    path = tmp_path / name
    if makes == "folder":
        path.mkdir()
    elif isinstance(makes, bytes):
        path.write_bytes(makes)
    with pytest.raises(ClientError, match=message) as caught, as_archive(path):
        pass
    assert str(path) in str(caught.value)
