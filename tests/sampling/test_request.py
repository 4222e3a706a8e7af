from typing import Any

import pytest

from core.errors import Invalid
from core.sampling.request import SampleRequest


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
        ({"adapter_scale": float("inf")}, "/adapter_scale"),
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
        SampleRequest(**{"id": "1", "tenant": "t", "adapter_digest": None, "label": 0, "seed": 1, **change})
    assert caught.value.pointer == pointer


def test_work_counts_both_branches():
    plain = SampleRequest("1", "t", None, 0, 1, steps=10, guidance="none")
    guided = SampleRequest("1", "t", None, 0, 1, steps=10, guidance="cfg", guidance_scale=3.0)
    assert (plain.rows, plain.work, guided.rows, guided.work) == (1, 10, 2, 20)
    assert SampleRequest("1", "t", None, 0, 1, guidance="cfg", guidance_scale=1.0).rows == 1
    assert SampleRequest("1", "t", "a", None, 1, guidance="cfg", guidance_scale=3.0).rows == 1
    assert SampleRequest("1", "t", "a", None, 1, guidance="domain", guidance_scale=3.0).rows == 2
