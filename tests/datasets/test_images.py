import io
import struct
import tracemalloc
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from core.datasets.pack import read_manifest
from tests.datasets.archives import encode, picture, png, some, zip_of
from tests.datasets.conftest import Judge


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size, with next to no data."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">L", len(data)) + kind + data + struct.pack(">L", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">2L5B", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")


def stored(pack: Path, index: int = 0) -> np.ndarray:
    with zipfile.ZipFile(pack) as archive:
        image = Image.open(io.BytesIO(archive.read(f"{index:05}.png")))
        assert image.mode == "RGB"
        return np.asarray(image)


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (encode(picture()), "a.png"),
        (encode(picture(), "JPEG"), "a.jpg"),
        (encode(picture(), "WEBP", lossless=True), "a.webp"),
        (encode(picture(), "GIF"), "a.gif"),
        (encode(picture(), "JPEG"), "a.png"),  # told by content, not by name
        (encode(picture()), "A.JPEG"),
    ],
)
def test_the_four_formats_are_taken(judge: Judge, pack_path: Path, data: bytes, name: str) -> None:
    report = judge(zip_of({name: data, "other.png": png(99)}))
    assert (report.images, report.verdicts[0].width) == (2, 32)
    assert np.abs(stored(pack_path).astype(int) - np.asarray(picture())).max() <= 8


@pytest.mark.parametrize("size", [(50_000, 50_000), (2**31 - 1, 2**31 - 1), (65_000, 1_000), (7_200, 7_200)])
def test_a_header_that_claims_too_many_pixels_refuses_the_dataset(judge: Judge, size: tuple[int, int]) -> None:
    tracemalloc.start()
    report = judge(zip_of({**some(), "cats/huge.png": png_header(*size)}))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (report.code, "cats/huge.png" in str(report.detail)) == ("image_too_large", True)
    assert peak < 4_000_000


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (png(size=(1, 1)), "image_too_small"),
        (png_header(65_000, 1), "image_too_small"),
        (png(size=(15, 400)), "image_too_small"),
        (png(size=(16, 161)), "bad_aspect_ratio"),
        (png_header(0, 10), "decode_failed"),
        (png_header(100, 100), "decode_failed"),
        (b"", "decode_failed"),
        (b"\0\x80\xff" * 100, "decode_failed"),
        (png()[:-40], "decode_failed"),
        (encode(picture(), "JPEG")[:200], "decode_failed"),
        (encode(picture(), "GIF")[:30], "decode_failed"),
        (encode(picture(), "WEBP")[:60], "decode_failed"),
        (b"\x89PNG\r\n\x1a\n", "decode_failed"),
        (png(0), "duplicate"),
    ],
)
def test_one_bad_image_is_rejected_and_the_rest_goes_on(judge: Judge, data: bytes, code: str) -> None:
    report = judge(zip_of({"cats/0.png": png(0), "cats/1.png": png(1), "cats/bad.png": data}))
    assert (report.status, report.images, report.rejected) == ("processed", 2, 1)
    bad = report.verdicts[2]
    assert (bad.name, bad.class_name, bad.verdict, bad.code) == ("cats/bad.png", "default", "rejected", code)
    assert bad.detail
    assert report.detail == f"1 of 3 images were rejected: 1 {code}"


@pytest.mark.parametrize(
    "data",
    [
        encode(picture(), "TIFF"), encode(picture(), "BMP"), encode(picture(), "EPS"), encode(picture(), "PDF"),
        encode(picture(), "ICO"), encode(picture(), "JPEG2000"), encode(picture(), "AVIF"), b"8BPS" + bytes(100),
        encode(Image.new("F", (32, 32), float("nan")), "TIFF"),
        b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"<!DOCTYPE html>", b"alert('x')",
        "// ünïcode".encode() * 60, b"MZ" + bytes(90),
    ],
)  # fmt: skip
def test_another_format_under_an_images_name_refuses_the_dataset(judge: Judge, data: bytes) -> None:
    report = judge(zip_of({**some(), "cats/fake.png": data}))
    assert (report.code, "cats/fake.png" in str(report.detail)) == ("unsupported_type", True)


def animated(kind: str, frames: int) -> bytes:
    pictures = [picture(3 * index) for index in range(frames)]
    return encode(pictures[0], kind, save_all=True, append_images=pictures[1:], loop=0)


@pytest.mark.parametrize(("kind", "name"), [("GIF", "a.gif"), ("WEBP", "a.webp"), ("PNG", "a.png")])
def test_of_an_animation_the_first_frame_counts(judge: Judge, pack_path: Path, kind: str, name: str) -> None:
    report = judge(zip_of({name: animated(kind, 40), "other.png": png(99)}))
    assert report.images == 2
    assert np.abs(stored(pack_path).astype(int) - np.asarray(picture())).max() <= 12


def modes() -> dict[str, tuple[bytes, tuple[int, int, int]]]:
    size = (32, 32)
    palette = Image.new("P", size, 1)
    palette.putpalette([0, 0, 0, 10, 200, 30])
    return {
        "black and white": (encode(Image.new("1", size, 1)), (255, 255, 255)),
        "grey": (encode(Image.new("L", size, 77)), (77, 77, 77)),
        "grey, half transparent": (encode(Image.new("LA", size, (0, 127))), (128, 128, 128)),
        "16 bits": (encode(Image.fromarray(np.full(size, 0x4DFF, np.uint16))), (0x4D, 0x4D, 0x4D)),
        "palette": (encode(palette), (10, 200, 30)),
        "palette, transparent": (encode(palette, transparency=1), (255, 255, 255)),
        "RGB, transparent colour": (encode(Image.new("RGB", size, (1, 2, 3)), transparency=(1, 2, 3)), (255, 255, 255)),
        "RGBA, clear": (encode(Image.new("RGBA", size, (255, 0, 0, 0))), (255, 255, 255)),
        "RGBA, half": (encode(Image.new("RGBA", size, (255, 0, 0, 127))), (255, 128, 128)),
        "RGBA WebP": (encode(Image.new("RGBA", size, (255, 0, 0, 0)), "WEBP", lossless=True), (255, 255, 255)),
        "transparent GIF": (encode(palette, "GIF", transparency=1), (255, 255, 255)),
        "CMYK": (encode(Image.new("CMYK", size, (0, 255, 255, 0)), "JPEG", quality=100), (254, 0, 0)),
    }


@pytest.mark.parametrize("mode", modes())
def test_every_mode_becomes_rgb_by_the_documented_rule(judge: Judge, pack_path: Path, mode: str) -> None:
    data, colour = modes()[mode]
    archive = zip_of({"a.png": data, "b.png": png(99)})
    first = judge(archive)
    assert first.images == 2, first.verdicts
    pixels = stored(pack_path)
    assert np.abs(pixels.reshape(-1, 3).astype(int) - colour).max() <= 1
    bytes_then = pack_path.read_bytes()
    judge(archive)
    assert pack_path.read_bytes() == bytes_then


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_exif_orientation_is_applied_once(judge: Judge, pack_path: Path, orientation: int, kind: str) -> None:
    upright = Image.new("RGB", (48, 32), "white")
    upright.paste((200, 0, 0), (0, 0, 24, 16))
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Pillow's transposes that lay the picture down
    laid = upright.transpose(Image.Transpose(undo[orientation])) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if kind == "WEBP" else {"quality": 100} if kind == "JPEG" else {}
    report = judge(zip_of({"a.png": encode(laid, kind, exif=exif, **options), "b.png": png(1)}))
    assert (report.verdicts[0].width, report.verdicts[0].height) == (48, 32)
    off = np.abs(stored(pack_path).astype(int) - np.asarray(upright))
    assert off.mean() < 3


def test_a_broken_exif_block_costs_nothing(judge: Judge) -> None:
    report = judge(zip_of({"a.jpg": encode(picture(), "JPEG", exif=b"Exif\0\0MM\0*garbage"), "b.png": png(1)}))
    assert report.images == 2


SECRET = b"secret-48.137N-11.575E"


def test_metadata_and_trailing_data_do_not_reach_the_pack_or_the_report(judge: Judge, pack_path: Path) -> None:
    text = PngInfo()
    text.add_text("Comment", SECRET.decode())
    text.add_itxt("XML:com.adobe.xmp", SECRET.decode())
    exif = Image.Exif()
    exif[0x010E] = SECRET.decode()
    report = judge(
        zip_of(
            {
                "a.png": encode(picture(1), pnginfo=text, exif=exif, icc_profile=SECRET * 10),
                "b.jpg": encode(picture(2), "JPEG", exif=exif, comment=SECRET, icc_profile=SECRET * 10) + SECRET,
                "c.gif": encode(picture(3), "GIF", comment=SECRET),
                "d.webp": encode(picture(4), "WEBP", exif=exif, xmp=SECRET),
            }
        )
    )
    assert report.images == 4
    assert SECRET not in pack_path.read_bytes()
    assert SECRET.decode() not in str(report.to_json())
    with zipfile.ZipFile(pack_path) as archive:
        for image in read_manifest(pack_path).images:
            kinds = archive.read(image.file)
            assert not any(kind in kinds for kind in (b"tEXt", b"iTXt", b"zTXt", b"eXIf", b"iCCP", b"gAMA", b"pHYs"))


def test_a_jpeg_padded_with_metadata_is_refused_by_its_bytes(judge: Judge) -> None:
    plain = encode(picture(), "JPEG")
    padded = plain[:2] + (b"\xff\xe9" + struct.pack(">H", 0xFFFF) + bytes(0xFFFD)) * 600 + plain[2:]
    report = judge(zip_of({**some(), "cats/fat.jpg": padded}))
    assert (report.code, "cats/fat.jpg" in str(report.detail)) == ("too_large_uncompressed", True)


def test_a_text_chunk_bomb_costs_one_image_at_most(judge: Judge) -> None:
    bomb = struct.pack(">L", 0) + b"zTXt"
    body = b"k\0\0" + zlib.compress(bytes(80 * 1024**2), 9)
    bomb = struct.pack(">L", len(body)) + b"zTXt" + body + struct.pack(">L", zlib.crc32(b"zTXt" + body))
    plain = png()
    tracemalloc.start()
    report = judge(zip_of({**some(), "cats/bomb.png": plain[:33] + bomb + plain[33:]}))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (report.status, report.images) in (("processed", 3), ("processed", 4))
    assert peak < 20_000_000


def test_large_pictures_are_stored_smaller_and_keep_their_aspect(judge: Judge, pack_path: Path) -> None:
    archive = zip_of(
        {"wide.png": png(size=(1000, 400)), "tall.jpg": encode(picture(9, (300, 900)), "JPEG"), "small.png": png(5)}
    )
    report = judge(archive)
    assert [(verdict.width, verdict.height) for verdict in report.verdicts] == [(1000, 400), (300, 900), (32, 32)]
    assert [(image.width, image.height) for image in read_manifest(pack_path).images] == [
        (512, 205),
        (171, 512),
        (32, 32),
    ]
    assert stored(pack_path).shape == (205, 512, 3)


def test_duplicates_count_once_in_a_class_but_may_stand_in_two(judge: Judge) -> None:
    same, resaved = png(1), encode(picture(1), compress_level=0)
    files = {"cats/a.png": same, "cats/b.png": resaved, "cats/c.png": png(2), "dogs/a.png": same, "dogs/b.png": png(3)}
    report = judge(zip_of(files))
    assert [verdict.code for verdict in report.verdicts] == [None, "duplicate", None, None, None]
    assert [(count.name, count.count) for count in report.classes] == [("cats", 2), ("dogs", 2)]


@pytest.mark.parametrize(
    ("files", "code"),
    [
        ({"a.png": png()}, "too_few_images"),
        ({f"{index}.png": png() for index in range(50)}, "too_few_images"),
        ({"a.png": b"\x89PNG\r\n\x1a\nx", "b.png": b""}, "no_images"),
        ({"a.png": png(size=(1, 1))}, "no_images"),
    ],
)
def test_too_few_usable_images_refuse_the_dataset_with_their_verdicts(judge: Judge, files: dict, code: str) -> None:
    report = judge(zip_of(files))
    assert (report.status, report.code, len(report.verdicts)) == ("error", code, len(files))


def test_all_black_images_are_images(judge: Judge) -> None:
    files = {f"{side}.png": encode(Image.new("RGB", (side, side))) for side in (32, 33)}
    assert judge(zip_of(files)).images == 2
