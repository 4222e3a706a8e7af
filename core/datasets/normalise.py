"""The deep pass, from an archive to a pack and a verdict per image: for the child process."""

import hashlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from core.datasets.images import read_picture
from core.datasets.intake import quick_check
from core.datasets.limits import Limits
from core.datasets.names import ClassMap, Parts, kind_of, map_classes
from core.datasets.pack import PackWriter
from core.datasets.report import ClassCount, Refused, Rejected, Report, Verdict, quoted
from core.datasets.tar_reader import TarEntry, TarReader
from core.datasets.zip_reader import ZipEntry, ZipReader

Reader = ZipReader | TarReader


def normalise(
    archive: Path, out: BinaryIO, limits: Limits, class_name: str, announce: Callable[[str], object] = lambda name: None
) -> Report:
    """Write the pack to `out` and report, without its digest. `announce` hears each image's name before it is read."""
    verdicts: list[Verdict] = []
    try:
        kind = quick_check(archive, limits)
        if kind != "zip":
            return _normalise(
                TarReader(archive, limits, gzipped=kind == "tar.gz"), out, limits, class_name, announce, verdicts
            )
        with archive.open("rb") as file:
            return _normalise(ZipReader(file, limits), out, limits, class_name, announce, verdicts)
    except Refused as refusal:
        return Report.error(refusal.code, str(refusal), verdicts)


def _normalise(
    reader: Reader,
    out: BinaryIO,
    limits: Limits,
    class_name: str,
    announce: Callable[[str], object],
    verdicts: list[Verdict],
) -> Report:
    images, mapping = survey(reader, limits, class_name)
    seen: dict[tuple[str, bytes], str] = {}
    counts: Counter[str] = Counter()
    with PackWriter(out) as pack:
        for entry, data in reader.contents(images):
            announce(entry.name)
            own_class = mapping.class_of(entry.parts)
            try:
                picture = read_picture(data, entry.name, limits)
                stored = picture.image
                key = (own_class, hashlib.sha256(repr(stored.size).encode() + stored.tobytes()).digest())
                if (first := seen.setdefault(key, entry.name)) != entry.name:
                    raise Rejected("duplicate", f"the same picture as {quoted(first)}", picture.width, picture.height)
            except Rejected as fault:
                rejected = Verdict(entry.name, own_class, "rejected", fault.code, str(fault), fault.width, fault.height)
                verdicts.append(rejected)
                continue
            pack.add(
                picture.to_png(), class_name=own_class, source=entry.name, width=stored.width, height=stored.height
            )
            verdicts.append(Verdict(entry.name, own_class, "accepted", None, None, picture.width, picture.height))
            counts[own_class] += 1
        classes = [ClassCount(name, counts[name]) for name in mapping.classes]
        _check_counts(classes, verdicts, limits)
        pack.finish(classes)
    return Report.processed(classes, verdicts)


def survey(reader: Reader, limits: Limits, class_name: str) -> tuple[set[Parts], ClassMap]:
    """Which files to decode and how they fall into classes, by names and sizes alone."""
    images: list[ZipEntry | TarEntry] = []
    notes: list[Parts] = []
    folders: list[Parts] = []
    files: set[Parts] = set()
    for entry in reader.entries():
        if entry.is_folder:
            folders.append(entry.parts)
            continue
        if not entry.parts or entry.parts in files:
            raise Refused(
                "bad_entry_name", f"two entries are called {quoted(entry.name)}; every file needs a name of its own"
            )
        files.add(entry.parts)
        kind = kind_of(entry.parts)
        if kind == "image":
            images.append(entry)
        elif kind == "note":
            notes.append(entry.parts)
    if len(images) > limits.max_images:
        raise Refused(
            "too_many_images", f"the archive holds {len(images)} images; at most {limits.max_images} are taken"
        )
    for entry in images:
        if entry.size > limits.max_image_bytes:
            raise Refused(
                "too_large_uncompressed",
                f"{quoted(entry.name)} unpacks to {entry.size} bytes; one may have at most {limits.max_image_bytes}",
            )
    paths = [entry.parts for entry in images]
    mapping = map_classes(paths, notes, folders, class_name)
    if len(mapping.classes) > limits.max_classes:
        raise Refused(
            "too_many_classes",
            f"the archive has {len(mapping.classes)} class folders; at most {limits.max_classes} are taken",
        )
    return set(paths), mapping


def _check_counts(classes: list[ClassCount], verdicts: list[Verdict], limits: Limits) -> None:
    accepted = sum(count.count for count in classes)
    first = next((verdict for verdict in verdicts if verdict.verdict == "rejected"), None)
    why = f"; {quoted(first.name)}, for one: {first.detail}" if first else ""
    if not accepted:
        raise Refused("no_images", f"none of the {len(verdicts)} images is usable{why}")
    for count in classes:
        if not count.count:
            own = next(verdict for verdict in verdicts if verdict.class_name == count.name)
            raise Refused(
                "empty_class",
                f"the class folder {quoted(count.name)} has no usable image ({quoted(own.name)}: {own.detail}); "
                "add images or remove the folder",
            )
    if accepted < limits.min_images:
        raise Refused("too_few_images", f"{accepted} image is usable; at least {limits.min_images} are needed{why}")
