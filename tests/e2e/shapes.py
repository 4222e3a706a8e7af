"""A small real dataset: discs and bars of random sizes, places and colours, in class folders."""

import io
import random
import zipfile
from collections.abc import Sequence

from PIL import Image, ImageDraw


def shapes_zip(each: int = 12, side: int = 32, names: Sequence[str] = ("bar", "disc")) -> bytes:
    """Class folders with `each` PNGs; the same bytes every time."""
    rng = random.Random(0)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in names:
            for index in range(each):
                archive.writestr(zipfile.ZipInfo(f"{name}/{index}.png"), _shape(rng, name, side))
    return buffer.getvalue()


def _shape(rng: random.Random, name: str, side: int) -> bytes:
    image = Image.new("RGB", (side, side), "white")
    draw = ImageDraw.Draw(image)
    colour = tuple(rng.randrange(200) for _ in range(3))
    x, y, reach = (rng.randrange(side // 4, side // 2) for _ in range(3))
    box = (x - reach // 2, y - reach // 2, x + reach // 2, y + reach // 2)
    if name == "disc":
        draw.ellipse(box, fill=colour)
    else:
        draw.rectangle((box[0], y - 2, box[2], y + 2), fill=colour)
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()
