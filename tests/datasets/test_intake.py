from pathlib import Path

import pytest

from core.datasets.intake import quick_check
from core.datasets.limits import Limits
from core.datasets.report import Refused
from core.errors import Invalid
from tests.datasets.archives import Raw, png, raw_zip, some, tar_gz, tar_of, zip_of

FORMATS = {"zip": zip_of(some()), "tar": tar_of(some()), "tar.gz": tar_gz(tar_of(some()))}


@pytest.mark.parametrize("kind", FORMATS)
def test_the_format_is_told_from_the_file_or_its_first_bytes(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "upload"
    path.write_bytes(FORMATS[kind])
    assert quick_check(path) == kind
    assert quick_check(FORMATS[kind][:4096]) == kind


@pytest.mark.parametrize(
    ("archive", "limits", "code"),
    [
        (b"", Limits(), "not_an_archive"),
        (png(), Limits(), "not_an_archive"),
        (b"Rar!\x1a\x07\x01\0", Limits(), "unsupported_compression"),
        (tar_gz(FORMATS["tar.gz"]), Limits(), "nested_archive"),
        (zip_of({}), Limits(), "no_images"),
        (FORMATS["zip"], Limits(max_archive_bytes=50), "archive_too_large"),
        (FORMATS["tar"], Limits(max_archive_bytes=50), "archive_too_large"),
        (FORMATS["zip"][:-50], Limits(), "truncated"),
        (raw_zip([Raw(b"a.png", png())], count=60_000), Limits(), "too_many_entries"),
        (raw_zip([Raw(b"a.png", png())], shift=5), Limits(), "truncated"),
    ],
)
def test_what_is_plainly_wrong_is_an_invalid_file_field(
    tmp_path: Path, archive: bytes, limits: Limits, code: str
) -> None:
    path = tmp_path / "upload"
    path.write_bytes(archive)
    with pytest.raises(Refused) as caught:
        quick_check(path, limits)
    assert isinstance(caught.value, Invalid)
    assert (caught.value.code, caught.value.pointer) == (code, "/file")
