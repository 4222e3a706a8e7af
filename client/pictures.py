"""Pictures laid out on one sheet."""

import io
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

_PAPER, _INK = "#ffffff", "#333333"


def open_picture(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB")


def to_png(image: Image.Image) -> bytes:
    return encode(image, "png")


def encode(image: Image.Image, kind: str, quality: int = 100) -> bytes:
    """`kind` is png, webp or jpeg; a png has no quality."""
    buffer = io.BytesIO()
    image.save(buffer, kind, optimize=True, quality=quality)
    return buffer.getvalue()


def sheet(
    rows: Sequence[Sequence[Image.Image | None]],
    *,
    side: int,
    row_titles: Sequence[str] = (),
    captions: Sequence[Sequence[str]] = (),
    gap: int = 4,
) -> Image.Image:
    """Rows of squares of `side` pixels, with a title before each row and a caption under each picture where given."""
    columns = max((len(row) for row in rows), default=0)
    left = gap + (max(round(_font(14).getlength(title)) for title in row_titles) + 2 * gap if row_titles else 0)
    below = 16 if captions else 0
    width, height = left + columns * (side + gap), gap + len(rows) * (side + gap + below)
    paper = Image.new("RGB", (width, height), _PAPER)
    pen = ImageDraw.Draw(paper)
    for y, row in enumerate(rows):
        top = gap + y * (side + gap + below)
        if row_titles:
            pen.text((gap, top + side / 2), row_titles[y], fill=_INK, font=_font(14), anchor="lm")
        for x, picture in enumerate(row):
            if picture is None:
                continue
            start = left + x * (side + gap)
            paper.paste(_fit(picture, side), (start, top))
            if captions:
                pen.text((start + side / 2, top + side + 8), captions[y][x], fill=_INK, font=_font(10), anchor="mm")
    return paper


def slices(strip: Image.Image, count: int) -> list[Image.Image]:
    """The pictures of a strip that holds `count` of one width, side by side."""
    width = strip.width // max(count, 1)
    return [strip.crop((i * width, 0, (i + 1) * width, strip.height)) for i in range(count)]


def _fit(picture: Image.Image, side: int) -> Image.Image:
    """Small pictures grow without blur where the factor is whole, so that one sees what was drawn."""
    whole = side % picture.width == 0 and picture.width == picture.height
    return picture.resize((side, side), Image.Resampling.NEAREST if whole else Image.Resampling.LANCZOS)


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
