from collections.abc import Callable
from pathlib import Path

import pytest

from core.datasets.limits import Limits
from core.datasets.normalise import normalise
from core.datasets.report import Report

Judge = Callable[..., Report]


@pytest.fixture
def judge(tmp_path: Path) -> Judge:
    """The deep pass on these bytes, in this process. Cheap limits; the child has tests of its own."""

    def run(archive: bytes, class_name: str = "default", **limits: float) -> Report:
        path, out = tmp_path / "upload", tmp_path / "pack"
        path.write_bytes(archive)
        with out.open("wb") as file:
            return normalise(path, file, Limits(**limits), class_name)

    return run


@pytest.fixture
def pack_path(tmp_path: Path) -> Path:
    """Where `judge` writes the pack."""
    return tmp_path / "pack"
