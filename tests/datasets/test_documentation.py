import re
from dataclasses import fields
from pathlib import Path

import pytest

from core.datasets import names
from core.datasets.limits import Limits

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "datasets.md").read_text()
NOT_SHOWN = {"max_side_stored", "min_images", "max_images"}  # said within a sentence or a range


def codes_in_the_source() -> set[str]:
    text = "".join(path.read_text() for path in (ROOT / "core" / "datasets").glob("*.py") if path.name != "service.py")
    raised = re.findall(r'(?:Refused|Rejected|Report\.error)\(\s*"(\w+)"', text)
    given_up = re.findall(r'_give_up\(\w+, \w+, "(\w+)"', (ROOT / "worker" / "tasks" / "datasets.py").read_text())
    return {*raised, *given_up, *re.findall(r'\bcode = "(\w+)"', text)} - {"invalid_archive"}


def test_the_page_lists_every_code_and_no_other() -> None:
    found = codes_in_the_source()
    assert len(found) > 30
    marked = set(re.findall(r"`([a-z]+(?:_[a-z]+)+|encrypted|truncated|duplicate|unreadable)`", PAGE))
    assert found == marked - {"class_name", "zip_reader", "tar_reader"}


@pytest.mark.parametrize("field", [field.name for field in fields(Limits) if field.name not in NOT_SHOWN])
def test_the_page_shows_every_limits_default(field: str) -> None:
    limits = PAGE.split("## Limits")[1].split("## Codes")[0]
    assert re.search(rf"\b{getattr(Limits(), field):g}\b|\b{getattr(Limits(), field)}\b", limits)


def test_the_page_shows_the_ignore_list() -> None:
    page = PAGE.lower()
    for name in names.CLUTTER_FILES | names.CLUTTER_FOLDERS | names.NOTE_SUFFIXES | names.IMAGE_SUFFIXES:
        assert f"{name}`" in page or f"{name}/`" in page, name
