"""A folder of images as a zip: the same folder gives the same bytes, so an upload can be recognised."""

import hashlib
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from client.errors import ClientError

_SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz")
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest time that a zip can state
_MODE = 0o100644 << 16


@contextmanager
def as_archive(path: Path) -> Iterator[Path]:
    """The archive itself, or a temporary zip of the folder (one sub-folder a class). Raises ClientError."""
    if path.is_dir():
        with TemporaryDirectory(prefix="difffit-") as folder:
            packed = Path(folder) / f"{path.resolve().name or 'dataset'}.zip"
            zip_folder(path, packed)
            yield packed
    elif path.is_file():
        if not path.name.lower().endswith(_SUFFIXES):
            raise ClientError(f"{path}: give a folder of images or an archive ({', '.join(_SUFFIXES)})")
        yield path
    else:
        raise ClientError(f"{path}: no such file or folder")


def zip_folder(folder: Path, target: Path) -> None:
    """Sorted names, one fixed time and mode, stored (images are compressed already); hidden files are left out."""
    files = sorted(_visible(folder), key=lambda path: path.relative_to(folder).as_posix())
    if not files:
        raise ClientError(f"{folder}: the folder holds no files; put images into it, one sub-folder a class")
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
        for path in files:
            entry = zipfile.ZipInfo(path.relative_to(folder).as_posix(), _EPOCH)
            entry.external_attr, entry.create_system = _MODE, 3
            archive.writestr(entry, path.read_bytes())


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _visible(folder: Path) -> Iterator[Path]:
    """Files below a folder; hidden ones and folders that are links (they may lead in a circle) are not entered."""
    for path in folder.iterdir():
        if path.name.startswith(".") or path.name in ("__MACOSX", "Thumbs.db"):
            continue
        if path.is_dir() and not path.is_symlink():
            yield from _visible(path)
        elif path.is_file():
            yield path
