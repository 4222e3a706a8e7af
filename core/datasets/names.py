"""Names inside an archive: which are acceptable, which are passed over, and which class each image belongs to."""

import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Literal

from core.datasets.report import Refused, quoted

MAX_NAME_BYTES = 1024
MAX_PART_BYTES = 255
MAX_DEPTH = 16
MAX_CLASS_NAME = 100

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".gif"})
ARCHIVE_SUFFIXES = frozenset(
    {
        ".zip",
        ".tar",
        ".gz",
        ".tgz",
        ".bz2",
        ".tbz2",
        ".xz",
        ".txz",
        ".zst",
        ".7z",
        ".rar",
        ".lz4",
        ".jar",
        ".cab",
        ".iso",
    }
)

# The ignore list: passed over unread. docs/datasets.md says it to users.
CLUTTER_FOLDERS = frozenset({"__macosx", ".git", ".svn", ".ipynb_checkpoints", "@eadir", ".trashes", ".spotlight-v100"})
CLUTTER_FILES = frozenset(
    {".ds_store", "thumbs.db", "ehthumbs.db", "desktop.ini", ".gitkeep", ".gitignore", ".keep", "icon"}
)
NOTE_SUFFIXES = frozenset({".txt", ".md", ".rst", ".csv", ".tsv", ".json", ".jsonl", ".yaml", ".yml"})
_NOTE_NAME = re.compile(
    r"(licen[cs]e|copying|readme|attribution|notice|credits|authors|changelog)([-_. ].{0,80})?", re.I
)
_NUMBERED = re.compile(r"\.\d+")

# Characters that reorder or break the line that a name is shown on.
_UNSHOWABLE = frozenset("\u200e\u200f\u061c\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\ufeff")

Kind = Literal["image", "note", "clutter"]
Parts = tuple[str, ...]


def entry_parts(name: str) -> Parts:
    """The folders and the file that an entry's name spells, in NFC; empty for `./`. Anything unsafe is refused."""
    if len(name.encode("utf-8", "surrogatepass")) > MAX_NAME_BYTES:
        raise _bad(name, f"is longer than {MAX_NAME_BYTES} bytes")
    name = name.removesuffix("\r") if name.endswith("Icon\r") else name  # macOS: a folder's icon
    if any(unicodedata.category(char) in ("Cc", "Cs", "Zl", "Zp") or char in _UNSHOWABLE for char in name):
        raise _bad(name, "holds control characters")
    if "\\" in name:
        raise _bad(name, "holds a backslash; folders are separated by /")
    if name.startswith("/") or re.match(r"[A-Za-z]:", name):
        raise _bad(name, "is absolute; names must be relative, such as cats/1.png")
    while name.startswith("./"):
        name = name[2:]
    name = unicodedata.normalize("NFC", name.removesuffix("/"))
    if name in ("", "."):
        return ()
    parts = tuple(name.split("/"))
    if ".." in parts:
        raise _bad(name, "climbs out of the archive with ..")
    if "" in parts or "." in parts:
        raise _bad(name, "has an empty folder name")
    if len(parts) > MAX_DEPTH:
        raise _bad(name, f"lies more than {MAX_DEPTH} folders deep")
    if any(len(part.encode()) > MAX_PART_BYTES for part in parts):
        raise _bad(name, f"has a part longer than {MAX_PART_BYTES} bytes")
    return parts


def kind_of(parts: Parts) -> Kind:
    """What a file is by its name; refused when it is something that a dataset of images has no place for."""
    *folders, file = parts
    if any(folder.lower() in CLUTTER_FOLDERS for folder in folders):
        return "clutter"
    if file.lower() in CLUTTER_FILES or file.startswith("._"):
        return "clutter"
    suffix = PurePosixPath(file).suffix.lower()
    if suffix in IMAGE_SUFFIXES:
        return "image"
    if suffix in NOTE_SUFFIXES or (_NOTE_NAME.fullmatch(file) and (not suffix or _NUMBERED.fullmatch(suffix))):
        return "note"
    name = quoted("/".join(parts))
    if suffix in ARCHIVE_SUFFIXES:
        raise Refused("nested_archive", f"{name} is an archive inside the archive; put its images in directly")
    raise Refused("unsupported_type", f"{name} is not an image; only PNG, JPEG, WebP and GIF files belong in a dataset")


def is_clutter_folder(parts: Parts) -> bool:
    return any(part.lower() in CLUTTER_FOLDERS for part in parts)


@dataclass(frozen=True)
class ClassMap:
    """Which class an image belongs to. `folders` are the class folders' names, in order; none for a flat set."""

    root: Parts
    folders: tuple[str, ...]
    flat_name: str

    @property
    def classes(self) -> tuple[str, ...]:
        return self.folders or (self.flat_name,)

    def class_of(self, parts: Parts) -> str:
        return parts[len(self.root)] if self.folders else self.flat_name


def map_classes(images: Sequence[Parts], notes: Iterable[Parts], folders: Iterable[Parts], flat_name: str) -> ClassMap:
    """Read the classes off the paths.

    `folder/file` in several folders, or `top/folder/file`: one class a folder. All files side by side, in one folder or
    in none: one class, `flat_name`. `folders` are explicit folder entries: an empty one is a class without images.
    """
    if not images:
        raise Refused("no_images", "the archive holds no PNG, JPEG, WebP or GIF file")
    marked = {parts for parts in folders if parts and not is_clutter_folder(parts)}
    held = {parts[:depth] for parts in (*images, *notes) for depth in range(1, len(parts))}
    held |= {parts[:depth] for parts in marked for depth in range(1, len(parts))}
    empty = marked - held

    depths = {len(parts) for parts in images}
    tops = {parts[0] for parts in images}
    if depths == {1}:
        if empty:
            raise _empty_class("/".join(min(empty)), "images lie beside it, in no folder")
        return ClassMap((), (), flat_name)
    if depths == {2} and len(tops) == 1 and all(len(parts) > 1 for parts in empty):
        return ClassMap(tuple(tops), (), flat_name)
    if depths == {2}:
        root: Parts = ()
    elif depths == {3} and len(tops) == 1:
        root = tuple(tops)
    else:
        usual = max(depths, key=lambda depth: sum(len(parts) == depth for parts in images))
        odd = next((parts for parts in images if len(parts) != usual), images[0])
        raise Refused(
            "bad_layout",
            f"{quoted('/'.join(odd))} does not fit class folders; put every image into class_name/file.png "
            "(one common folder around the class folders is fine), or all images side by side",
        )

    level = len(root) + 1
    with_images = {parts[:level] for parts in images}
    folders_there = {parts[:level] for parts in held | marked if len(parts) >= level and parts[: len(root)] == root}
    folders_there |= {parts for parts in empty if parts[: len(root)] != root}
    if missing := sorted("/".join(parts) for parts in folders_there - with_images):
        raise _empty_class(missing[0], "a class needs at least one image")
    names = tuple(sorted(parts[-1] for parts in with_images))
    _check_class_names(names)
    return ClassMap(root, names, flat_name)


def _check_class_names(names: Sequence[str]) -> None:
    """A class is drawn by its name in any case, so no two may be the same but for that."""
    met: dict[str, str] = {}
    for name in names:
        if len(name) > MAX_CLASS_NAME or name != name.strip():
            raise Refused(
                "bad_class_name",
                f"the class folder {quoted(name)} is no usable class name: "
                f"up to {MAX_CLASS_NAME} characters, no space around them",
            )
        twin = met.setdefault(name.casefold(), name)
        if twin != name:
            raise Refused(
                "bad_class_name",
                f"the class folder {quoted(name)} differs from {quoted(twin)} in case alone; merge or rename one",
            )


def _bad(name: str, fault: str) -> Refused:
    return Refused("bad_entry_name", f"the entry name {quoted(name)} {fault}")


def _empty_class(folder: str, why: str) -> Refused:
    return Refused(
        "empty_class", f"the class folder {quoted(folder)} has no usable image: {why}; add images or remove the folder"
    )
