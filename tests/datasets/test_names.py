import pytest

from tests.datasets.archives import png, some, tar_of, zip_info, zip_of
from tests.datasets.conftest import Judge


def counts(report) -> dict[str, int]:
    return {count.name: count.count for count in report.classes}


def test_class_folders_become_classes_with_or_without_one_folder_around(judge: Judge) -> None:
    files = {**some("cats", 3), **some("dogs", 2)}
    for archive in (zip_of(files), tar_of(files), zip_of({f"my set/{name}": data for name, data in files.items()})):
        assert counts(judge(archive)) == {"cats": 3, "dogs": 2}


@pytest.mark.parametrize("folder", ["", "photos/"])
def test_images_side_by_side_are_one_class_that_the_caller_names(judge: Judge, folder: str) -> None:
    archive = zip_of({f"{folder}{index}.png": png(index) for index in range(3)})
    assert counts(judge(archive)) == {"default": 3}
    assert counts(judge(archive, class_name="cats")) == {"cats": 3}


def test_one_class_folder_inside_a_folder_keeps_its_own_name(judge: Judge) -> None:
    assert counts(judge(zip_of({f"top/{name}": data for name, data in some("cats").items()}))) == {"cats": 3}


def test_composed_and_decomposed_names_are_one_class(judge: Judge) -> None:
    files = {**some("cats"), "caf\u00e9/1.png": png(50), "cafe\u0301/2.png": png(51)}
    assert counts(judge(zip_of(files))) == {"cats": 3, "caf\u00e9": 2}


@pytest.mark.parametrize(
    "name",
    [
        "__MACOSX/._a.png", "__MACOSX/cats/._0.png", "cats/.DS_Store", "cats/Thumbs.db", "cats/._0.png", "desktop.ini",
        "Icon\r", "LICENSE", "LICENSE-CC-BY-4.0", "licence.txt", "README", "README.md", "ATTRIBUTION.txt", "COPYING",
        "cats/0.txt", "metadata.csv", "cats/0.json", "captions.jsonl", ".git/config.py", "NOTICE",
    ],
)  # fmt: skip
def test_the_ignore_list_is_passed_over(judge: Judge, name: str) -> None:
    report = judge(zip_of({**some("cats"), **some("dogs"), name: b"not an image"}))
    assert (report.status, report.images, report.rejected) == ("processed", 6, 0), report.detail


@pytest.mark.parametrize(
    "name",
    [
        "run.py", "page.html", "logo.svg", "setup.exe", "photo.tiff", "photo.bmp", "clip.mp4", "noext", "README.exe",
        "readme.first", "x.heic", "x.avif",
    ],
)  # fmt: skip
def test_other_types_refuse_the_dataset_by_name(judge: Judge, name: str) -> None:
    report = judge(zip_of({**some(), f"cats/{name}": b"x"}))
    assert (report.code, name in str(report.detail)) == ("unsupported_type", True)


@pytest.mark.parametrize(
    "marker",
    [
        ("dogs/", b""),
        ("dogs/notes.txt", b"none yet"),
        ("dogs/0.png", b"\x89PNG\r\n\x1a\nbroken"),
        ("dogs/0.png", png(size=(4, 4))),
    ],
)
@pytest.mark.parametrize("top", ["", "set/"])
def test_a_class_folder_without_a_usable_image_is_named(judge: Judge, marker: tuple[str, bytes], top: str) -> None:
    name, data = marker
    entry = (zip_info(top + name, 0o040755), data) if name.endswith("/") else (top + name, data)
    files = [(top + path, content) for path, content in {**some("cats"), **some("birds")}.items()]
    report = judge(zip_of([*files, entry]))
    assert (report.code, "dogs'" in str(report.detail)) == ("empty_class", True), report.detail


def test_an_empty_folder_beside_a_single_one_is_an_empty_class(judge: Judge) -> None:
    assert judge(zip_of([*some("cats").items(), (zip_info("dogs/", 0o040755), b"")])).code == "empty_class"
    assert (
        judge(zip_of([("0.png", png()), ("1.png", png(1)), (zip_info("dogs/", 0o040755), b"")])).code == "empty_class"
    )


def test_folders_that_only_hold_clutter_or_lie_around_are_no_classes(judge: Judge) -> None:
    folders = [
        (zip_info(name, 0o040755), b"") for name in ("set/", "set/cats/", "set/dogs/", "__MACOSX/", "__MACOSX/set/")
    ]
    files = [(f"set/{name}", data) for name, data in {**some("cats"), **some("dogs")}.items()]
    assert counts(judge(zip_of([*folders, *files]))) == {"cats": 3, "dogs": 3}


@pytest.mark.parametrize("odd", ["odd.png", "cats/deeper/odd.png", "a/b/c/odd.png"])
def test_images_off_the_layout_are_named(judge: Judge, odd: str) -> None:
    report = judge(zip_of({**some("cats"), **some("dogs"), odd: png(99)}))
    assert (report.code, odd in str(report.detail)) == ("bad_layout", True)


@pytest.mark.parametrize("name", ["x" * 101, " cats"])
def test_a_class_name_must_be_short_and_trimmed(judge: Judge, name: str) -> None:
    assert judge(zip_of({**some("dogs"), **some(name)})).code == "bad_class_name"


@pytest.mark.parametrize(("name", "twin"), [("Cats", "cats"), ("STRASSE", "straße")])
def test_class_names_that_differ_in_case_alone_are_refused(judge: Judge, name: str, twin: str) -> None:
    """A prompt names a class in any case: it could mean either."""
    report = judge(zip_of({**some("birds"), **some(name), **some(twin)}))
    assert report.code == "bad_class_name"
    assert f"'{twin}' differs from '{name}' in case alone" in str(report.detail)


def test_too_many_classes_or_images_are_refused(judge: Judge) -> None:
    archive = zip_of({**some("cats"), **some("dogs"), **some("birds")})
    assert judge(archive, max_classes=2).code == "too_many_classes"
    assert judge(archive, max_images=8).code == "too_many_images"
    assert judge(archive, max_classes=3, max_images=9).images == 9
