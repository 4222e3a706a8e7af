from typing import Any

import pytest

from core.errors import Invalid
from core.sampling.request import AdapterPart, SampleRequest


@pytest.mark.parametrize(
    ("change", "pointer"),
    [
        ({"seed": -1}, "/seed"),
        ({"seed": 2**63}, "/seed"),
        ({"steps": 0}, "/steps"),
        ({"steps": True}, "/steps"),
        ({"steps": 251}, "/steps"),
        ({"guidance_scale": float("nan")}, "/guidance_scale"),
        ({"guidance_scale": 21}, "/guidance_scale"),
        ({"adapters": (AdapterPart("a"), AdapterPart("b", 1.0, 2)), "label": None}, "/adapters"),
        ({"adapters": (AdapterPart("a"),) * 5, "label": None}, "/adapters"),
        ({"adapters": (AdapterPart("a"),)}, "/label"),
        ({"timeout": -1.0}, "/timeout"),
        ({"label": -1}, "/label"),
        ({"size": 4}, "/size"),
        ({"solver": "heun"}, "/solver"),
        ({"guidance": "strong"}, "/guidance"),
        ({"guidance_interval": (0.8, 0.2)}, "/guidance_interval"),
    ],
    ids=str,
)
def test_a_field_out_of_bounds_is_named(change: dict[str, Any], pointer: str):
    with pytest.raises(Invalid) as caught:
        SampleRequest(**{"id": "1", "tenant": "t", "label": 0, "seed": 1, **change})
    assert caught.value.pointer == pointer


@pytest.mark.parametrize("weight", [float("inf"), 4.5, True])
def test_a_weight_out_of_bounds_is_refused(weight: Any):
    with pytest.raises(Invalid, match="weight must be a number from -4 to 4"):
        AdapterPart("a", weight)


def test_work_counts_both_branches():
    plain = SampleRequest("1", "t", 1, 0, steps=10, guidance="none")
    guided = SampleRequest("1", "t", 1, 0, steps=10, guidance="cfg", guidance_scale=3.0)
    assert (plain.rows, plain.work, guided.rows, guided.work) == (1, 10, 2, 20)
    assert SampleRequest("1", "t", 1, 0, guidance="cfg", guidance_scale=1.0).rows == 1
    assert SampleRequest("1", "t", 1, None, (AdapterPart("a"),), guidance="cfg", guidance_scale=3.0).rows == 1
    assert SampleRequest("1", "t", 1, None, (AdapterPart("a"),), guidance="domain", guidance_scale=3.0).rows == 2
