import io
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from core.datasets.pack import PackCorrupt, read_manifest, read_pack
from core.datasets.validation import validate
from tests.datasets.archives import encode, picture, png, some, zip_of
from tests.datasets.conftest import Judge


def test_a_pack_gives_squares_labels_and_class_names(judge: Judge, pack_path: Path) -> None:
    judge(zip_of({**some("dogs", 2), **some("cats", 3)}))
    for pack in (pack_path, pack_path.read_bytes()):
        images, labels, classes = read_pack(pack, 24)
        assert (images.shape, images.dtype) == ((5, 24, 24, 3), np.uint8)
        assert (labels, classes) == ([1, 1, 0, 0, 0], ["cats", "dogs"])


def test_pictures_of_the_asked_size_come_back_as_they_were(judge: Judge, pack_path: Path) -> None:
    judge(zip_of({"0.png": png(3), "1.png": png(9)}))
    images, _, _ = read_pack(pack_path, 32)
    assert np.array_equal(images, np.stack([np.asarray(picture(3)), np.asarray(picture(9))]))


@pytest.mark.parametrize("size", [(64, 32), (32, 64)])
def test_the_centre_is_cut_out(judge: Judge, pack_path: Path, size: tuple[int, int]) -> None:
    framed = Image.new("RGB", size, "red")
    framed.paste((0, 0, 255), ((size[0] - 32) // 2, (size[1] - 32) // 2, (size[0] + 32) // 2, (size[1] + 32) // 2))
    judge(zip_of({"0.png": encode(framed), "1.png": png()}))
    for side in (16, 32, 48):
        images, _, _ = read_pack(pack_path, side)
        assert (images[0] == (0, 0, 255)).all()


def test_the_manifest_says_where_each_picture_came_from(judge: Judge, pack_path: Path) -> None:
    judge(zip_of({"cats/a.png": png(1, (640, 320)), "cats/bad.png": b"", "dogs/b.png": png(2)}))
    with zipfile.ZipFile(pack_path) as archive:
        assert archive.namelist() == ["00000.png", "00001.png", "manifest.json"]
        assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_STORED}
        manifest = json.loads(archive.read("manifest.json"))
    assert manifest == {
        "version": 1,
        "classes": [{"name": "cats", "count": 1}, {"name": "dogs", "count": 1}],
        "images": [
            {"file": "00000.png", "class": "cats", "source": "cats/a.png", "width": 512, "height": 256},
            {"file": "00001.png", "class": "dogs", "source": "dogs/b.png", "width": 32, "height": 32},
        ],
    }
    assert [image.source for image in read_manifest(pack_path).images] == ["cats/a.png", "dogs/b.png"]


def test_a_damaged_pack_is_said_to_be_one(judge: Judge, pack_path: Path) -> None:
    judge(zip_of(some()))
    pack = pack_path.read_bytes()
    flipped = bytearray(pack)
    flipped[pack.index(b"IDAT") + 8] ^= 1
    other = io.BytesIO()
    with zipfile.ZipFile(other, "w") as archive:
        archive.writestr("manifest.json", '{"version": 99}')
    for damaged in (pack[:-100], bytes(flipped), b"", other.getvalue(), zip_of(some())):
        with pytest.raises(PackCorrupt) as caught:
            read_pack(damaged, 16)
        assert caught.value.code == "dataset_corrupt"


def test_a_pack_is_accepted_as_an_upload_again(judge: Judge, pack_path: Path, tmp_path: Path) -> None:
    judge(zip_of(some()))
    assert validate(pack_path, tmp_path / "again").images == 3
