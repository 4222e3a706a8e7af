import json

import pytest
import torch

from core.diffusion.base import Base
from core.diffusion.layout import AdapterLayout, LayoutOptions
from core.errors import Invalid


def test_the_pieces_tile_the_vector_in_order(base: Base):
    layout = base.layout()
    offset = 0
    for entry in layout.entries:
        assert entry.offset == offset
        offset += entry.size
    assert offset == layout.size
    rows = torch.arange(2 * layout.size, dtype=torch.float32).view(2, -1)
    pieces = layout.split(rows)
    assert torch.equal(torch.cat([piece.flatten(1) for piece in pieces.values()], dim=1), rows)
    assert all(piece.data_ptr() == rows.data_ptr() + 4 * layout.by_name[name].offset for name, piece in pieces.items())


@pytest.mark.parametrize("kind", ["difffit", "bitfit"])
def test_a_layout_survives_json(base: Base, kind: str):
    layout = base.layout(kind, **({"gamma_depth": [1, 3], "gamma_places": ["qkv"]} if kind == "difffit" else {}))
    assert AdapterLayout.from_json(json.loads(json.dumps(layout.to_json()))) == layout


def gamma_blocks(layout: AdapterLayout) -> set[str]:
    return {entry.name.split(".")[1] for entry in layout.entries if entry.name.endswith("gamma")}


@pytest.mark.parametrize(
    ("depth", "blocks"), [("none", set()), ("half", {"0", "1"}), ("all", {"0", "1", "2", "3"}), ((2, 4), {"2", "3"})]
)
def test_gamma_sits_where_the_depth_says(base: Base, depth: object, blocks: set[str]):
    assert gamma_blocks(base.layout(gamma_depth=depth)) == blocks


def test_bitfit_is_difffit_without_gamma(base: Base):
    names = [entry.name for entry in base.layout().entries if not entry.name.endswith("gamma")]
    assert [entry.name for entry in base.layout("bitfit").entries] == names


@pytest.mark.parametrize(
    ("options", "pointer"),
    [
        ({"gamma_depth": "most"}, "/gamma_depth"),
        ({"gamma_depth": [3, 3]}, "/gamma_depth"),
        ({"gamma_depth": [0, 99]}, "/gamma_depth"),
        ({"gamma_depth": [True, 2]}, "/gamma_depth"),
        ({"gamma_places": ["nose"]}, "/gamma_places"),
        ({"gamma_places": "mlp"}, "/gamma_places"),
        ({"kind": "bitfit", "gamma_depth": "all"}, "/gamma_depth"),
    ],
)
def test_options_that_make_no_sense_name_their_field(base: Base, options: dict[str, object], pointer: str):
    with pytest.raises(Invalid) as caught:
        base.layout(**options)
    assert caught.value.pointer == pointer


def test_a_smaller_layout_is_zero_elsewhere(base: Base):
    narrow, wide = base.layout("bitfit"), base.layout()
    theta = torch.arange(1, narrow.size + 1, dtype=torch.float32)
    pieces = wide.split(wide.embed(narrow, theta)[None])
    for name, piece in pieces.items():
        if name in narrow.by_name:
            assert torch.equal(piece, narrow.split(theta[None])[name])
        else:
            assert not piece.any()
    with pytest.raises(Invalid, match=r"attn1\.gamma"):
        narrow.embed(wide, torch.zeros(wide.size))


def test_unreadable_layouts_are_refused():
    good = {"kind": "difffit", "hidden": 4, "gamma_depth": "half", "gamma_places": ["mlp"], "entries": [["a", [4]]]}
    assert AdapterLayout.from_json(good).options == LayoutOptions("half", ("mlp",))
    for change in ({"entries": [["a", [4]], ["a", [4]]]}, {"entries": [["a", [0]]]}, {"entries": 5}, {"hidden": None}):
        with pytest.raises(Invalid):
            AdapterLayout.from_json({**good, **change})
