"""Which class a prompt is, by the name that a base or an adapter has for it."""

from dataclasses import replace

import pytest

from core.bases import Catalog
from core.errors import Invalid
from core.models import Adapter
from core.samples.spec import Asked, SampleSpec, resolve
from tests.rows import base_of

IMAGENET = ("tench, Tinca tinca", "eel", "Cardigan, Cardigan Welsh corgi", "cardigan", "great crane, crane", "crane")


def asked_of_a_base(catalog: Catalog, prompt: str) -> int | None:
    base = replace(base_of(catalog), id2label=dict(enumerate(IMAGENET)), num_classes=len(IMAGENET))
    return resolve(base, [], Asked(prompt=prompt), max_n=1).label


def asked_of_an_adapter(catalog: Catalog, prompt: str, classes: list[str]) -> SampleSpec:
    adapter = Adapter(id="adapter-1", model="ft:tiny-dit:me::1", classes=classes, image_size=8)
    return resolve(base_of(catalog), [(adapter, 1.0)], Asked(prompt=prompt), max_n=1)


@pytest.mark.parametrize(
    ("prompt", "label"),
    [
        ("tench, Tinca tinca", 0), ("tench", 0), ("Tinca tinca", 0), ("TENCH", 0), (" eel ", 1), ("Cardigan", 2),
        ("cardigan", 3), ("Cardigan Welsh corgi", 2), ("crane", 5), ("great crane", 4), ("", None), (" ", None),
    ],
)  # fmt: skip
def test_a_class_of_a_base_is_found_by_any_of_its_names(catalog: Catalog, prompt: str, label: int | None) -> None:
    assert asked_of_a_base(catalog, prompt) == label


def test_a_class_that_is_not_there_is_answered_with_those_that_are(catalog: Catalog) -> None:
    with pytest.raises(Invalid, match="draws: tench, Tinca tinca, eel") as caught:
        asked_of_a_base(catalog, "shark")
    assert (caught.value.code, caught.value.pointer) == ("unknown_class", "/prompt")


@pytest.mark.parametrize(("prompt", "label"), [("Cat", 0), ("cat", 1), ("CAT", 0), ("dog", 2)])
def test_of_classes_that_differ_in_case_alone_the_very_name_is_drawn(catalog: Catalog, prompt: str, label: int) -> None:
    (part,) = asked_of_an_adapter(catalog, prompt, ["Cat", "cat", "dog"]).adapters
    assert part.label == label


def test_a_class_of_an_adapter_is_a_folders_name_and_no_list_of_names(catalog: Catalog) -> None:
    with pytest.raises(Invalid, match="names no class"):
        asked_of_an_adapter(catalog, "black", ["cats, black"])
