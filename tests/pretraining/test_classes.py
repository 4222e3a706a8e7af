"""The class table and the rule for mirror images."""

import json
from pathlib import Path

import pytest
import torch

from pretraining.classes import CLASSES, ID2LABEL, NULL_CLASS, class_of
from pretraining.data import WORK, is_held_out, subject_of
from pretraining.latents import balance, may_flip


def label(name: str) -> int:
    return next(number for number, kind in enumerate(CLASSES) if kind.name == name)


def test_there_are_32_classes_with_names_of_their_own() -> None:
    assert (len(CLASSES), NULL_CLASS, len(set(ID2LABEL.values()))) == (32, 32, 32)
    # DiTPipeline splits names at commas, which would make two labels of one class.
    assert not any("," in name for name in ID2LABEL.values())


def test_no_subcategory_belongs_to_two_classes() -> None:
    listed = [sub for kind in CLASSES for sub in kind.subcategories]
    assert len(listed) == len(set(listed))


def test_every_emoji_of_the_list_has_a_class_except_skin_swatches() -> None:
    emoji_json = WORK / "npm" / "node_modules" / "emoji-datasource" / "emoji.json"
    if not emoji_json.exists():
        pytest.skip("emoji-datasource is not fetched: run python -m pretraining.data")
    emoji = json.loads(Path(emoji_json).read_text())
    without = {e["subcategory"] for e in emoji if class_of(e["name"] or "", e["subcategory"]) is None}
    assert without == {"skin-tone"}


def test_an_animal_drawn_as_a_head_is_an_animal_face() -> None:
    assert class_of("DOG FACE", "animal-mammal") == label("animal-face")
    assert class_of("DOG", "animal-mammal") == label("mammal")
    assert class_of("FROG FACE", "animal-amphibian") == label("animal-face")


def test_hands_arrows_flags_clocks_and_letters_are_never_mirrored() -> None:
    kept = torch.tensor([label(name) for name in ("hand", "arrow", "flag", "clock", "letter", "sign", "music")])
    mirrored = torch.tensor([label(name) for name in ("mammal", "vehicle", "fruit", "face")])
    assert not may_flip(kept).any()
    assert may_flip(mirrored).all()


def test_one_subject_is_on_one_side_of_the_split_however_it_is_spelled() -> None:
    assert subject_of("2764-FE0F") == subject_of("2764") == "2764"
    held_out = sum(is_held_out(f"{code:x}") for code in range(0x1F300, 0x1F700))
    assert 0.02 < held_out / 0x400 < 0.08


def test_small_classes_are_drawn_more_often_than_their_share() -> None:
    labels = torch.tensor([0] * 90 + [1] * 10)
    weights = balance(labels)
    share = float(weights[labels == 1].sum() / weights.sum())
    assert 0.1 < share < 0.5
