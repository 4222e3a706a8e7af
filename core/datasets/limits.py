from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Limits:
    """What one dataset may cost us; `docs/datasets.md` shows the defaults to users."""

    max_archive_bytes: int = 512 * 1024**2
    max_uncompressed_bytes: int = 1024**3
    max_entries: int = 20_000
    max_image_bytes: int = 32 * 1024**2
    max_images: int = 10_000
    min_images: int = 2
    max_classes: int = 1_000
    max_pixels: int = 50_000_000
    min_side: int = 16
    max_aspect: float = 10.0
    max_side_stored: int = 512
    max_pack_bytes: int = 4 * 1024**3
    wall_seconds: float = 1800.0
    cpu_seconds: int = 900
    image_cpu_seconds: float = 30.0
    memory_bytes: int = 1536 * 1024**2

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Limits":
        return cls(**data)
