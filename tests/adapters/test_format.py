"""The adapter file: equal adapters have equal bytes, and whatever is wrong is refused by name."""

import contextlib
import io
import json
import pickle
import struct
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from core.adapters import format as adapter_format
from core.adapters.format import CorruptAdapter, WrongBase
from core.diffusion.adapter import Adapter
from core.diffusion.base import Base
from core.diffusion.families import load_base
from core.errors import DomainError, Invalid
from tests.diffusion.tiny import make_adapter, make_pipeline

META = {"spec": {"steps": 3, "learning_rate": 0.001}, "step": 3, "metrics": {"val_loss": 0.5}, "licence": "cc0-1.0"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return load_base(make_pipeline(tmp_path_factory.mktemp("format") / "base", vae=False))


@pytest.fixture(scope="module")
def adapter(base: Base) -> Adapter:
    return replace(make_adapter(base, class_start=(2, None, 0)), meta=META)


@pytest.fixture(scope="module")
def data(adapter: Adapter) -> bytes:
    return adapter_format.save(adapter)


def test_save_load_save_gives_the_same_bytes(adapter: Adapter, data: bytes, base: Base):
    back = adapter_format.load(data, base.fingerprint, base.layout())
    assert torch.equal(back.theta, adapter.theta)
    assert torch.equal(back.class_delta, adapter.class_delta)
    assert (back.classes, back.class_start, back.layout) == (adapter.classes, adapter.class_start, adapter.layout)
    assert back.meta == META
    assert adapter_format.save(back) == data


def test_the_file_is_plain_safetensors_with_readable_names(adapter: Adapter, data: bytes, tmp_path: Path):
    (tmp_path / "adapter.safetensors").write_bytes(data)
    with safetensors.safe_open(tmp_path / "adapter.safetensors", "pt") as file:
        assert json.loads(file.metadata()["classes"]) == list(adapter.classes)
        assert set(file.keys()) == {entry.name for entry in adapter.layout.entries} | {"class_table"}
        assert file.get_tensor("transformer_blocks.0.attn1.gamma").shape == (16,)


def test_the_bytes_are_those_of_the_parameters(data: bytes, adapter: Adapter):
    (header,) = struct.unpack("<Q", data[:8])
    assert len(data) - 8 - header == 4 * adapter.parameter_count


def rewrite(data: bytes, change: Callable[[dict[str, torch.Tensor], dict[str, str]], None]) -> bytes:
    metadata, _ = adapter_format.read_header(data)
    tensors = safetensors.torch.load(data)
    change(tensors, metadata)
    return safetensors.torch.save(tensors, metadata)


def test_tensors_in_another_order_are_read_by_name(data: bytes, adapter: Adapter):
    shuffled = rewrite(data, lambda tensors, _: None)  # the safetensors package sorts them in a way of its own
    assert shuffled != data
    back = adapter_format.load(shuffled)
    assert torch.equal(back.theta, adapter.theta)
    assert torch.equal(back.class_delta, adapter.class_delta)


def put(name: str, value: torch.Tensor) -> Callable[[dict[str, torch.Tensor], dict[str, str]], None]:
    return lambda tensors, _: tensors.update({name: value})


def nan(tensors: dict[str, torch.Tensor], _: dict[str, str]) -> None:
    tensors["proj_out_2.bias"][0] = torch.nan


def endless(layout: str) -> str:
    return json.dumps({**json.loads(layout), "hidden": 0}).replace('"hidden": 0', '"hidden": 1e999')


NAME = "proj_out_2.bias"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors, _: tensors.pop(NAME), f"tensor {NAME} is missing"),
        (lambda tensors, _: tensors.pop("class_table"), "tensor class_table is missing"),
        (put("nose.bias", torch.zeros(3)), "tensor nose.bias does not belong"),
        (put(NAME, torch.zeros(5)), rf"tensor {NAME} has shape \[5\], not \[12\]"),
        (put("class_table", torch.zeros(3, 16)), "tensor class_table has shape"),
        (put(NAME, torch.zeros(12, dtype=torch.float16)), f"tensor {NAME} is F16"),
        (nan, f"tensor {NAME} holds NaN"),
        (put("class_table", torch.full((4, 16), torch.inf)), "tensor class_table holds NaN or Inf"),
        (lambda _, meta: meta.update(format_version="99"), "format_version is '99'"),
        (lambda _, meta: meta.pop("layout"), "the header has no layout"),
        (lambda _, meta: meta.update(layout="{}"), "layout is not readable"),
        (lambda _, meta: meta.update(layout=endless(meta["layout"])), "layout is not readable"),
        (lambda _, meta: meta.update(classes="[1]"), "classes is no list of names"),
        (lambda _, meta: meta.update(class_start="[0]"), "class_start is no list"),
        (lambda _, meta: meta.update(class_start="[0, -3, true]"), "class_start is no list"),
        (lambda _, meta: meta.update(step="{"), "step is no JSON"),
    ],
)
def test_a_changed_file_is_refused_by_what_is_wrong(data: bytes, change: Any, message: str):
    with pytest.raises(CorruptAdapter, match=message):
        adapter_format.load(rewrite(data, change))


def test_an_adapter_of_another_base_is_refused(data: bytes):
    with pytest.raises(WrongBase) as caught:
        adapter_format.load(data, "0" * 64)
    assert caught.value.code == "wrong_base"


def test_an_adapter_outside_the_layout_is_refused(data: bytes, base: Base):
    with pytest.raises(Invalid, match="gamma"):
        adapter_format.load(data, base.fingerprint, base.layout("bitfit"))


def zipped_pickle() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("data.pkl", pickle.dumps({"a": 1}))
    return buffer.getvalue()


def million_tensors() -> bytes:
    head = b"{" + b",".join(b'"%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}' % i for i in range(10**6)) + b"}"
    return struct.pack("<Q", len(head)) + head


def many_tensors() -> bytes:
    head = b"{" + b",".join(b'"%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}' % i for i in range(30_000)) + b"}"
    return struct.pack("<Q", len(head)) + head


ENDLESS = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,1e999]}}'  # Python reads it as infinity


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "truncated"),
        (b"\x00" * 7, "truncated"),
        (pickle.dumps({"a": 1}), "pickle"),
        (zipped_pickle(), "pickle"),
        (struct.pack("<Q", 2**62) + b"{}", "a header of"),
        (struct.pack("<Q", 100) + b"{}", "truncated within its header"),
        (struct.pack("<Q", 2) + b"[]", "no safetensors header"),
        (struct.pack("<Q", len(ENDLESS)) + ENDLESS, "no safetensors header"),
        (struct.pack("<Q", 2) + b"{}", "format_version is None"),
        (million_tensors(), "a header of"),
        (many_tensors(), "30000 tensors"),
    ],
    ids=["empty", "short", "pickle", "zip", "huge", "cut", "list", "endless", "bare", "million", "many"],
)
def test_what_is_no_adapter_is_refused(content: bytes, message: str):
    with pytest.raises(CorruptAdapter, match=message):
        adapter_format.load(content)


def test_every_truncation_is_refused(data: bytes):
    for length in [*range(0, len(data), 97), len(data) - 1]:
        with pytest.raises(CorruptAdapter):
            adapter_format.load(data[:length])


@settings(max_examples=300, deadline=None)
@given(place=st.floats(0, 1, exclude_max=True), value=st.integers(0, 255))
def test_a_changed_byte_gives_an_adapter_or_a_domain_error(data: bytes, place: float, value: int):
    changed = bytearray(data)
    changed[int(place * len(changed))] = value
    with contextlib.suppress(DomainError):
        assert torch.isfinite(adapter_format.load(bytes(changed)).theta).all()


def test_meta_may_not_shadow_the_format(adapter: Adapter):
    with pytest.raises(Invalid, match=r"meta\.layout"):
        adapter_format.save(replace(adapter, meta={"layout": 1}))


@pytest.mark.parametrize("length", [0x180, 0x4B50])
def test_a_header_whose_length_looks_like_a_pickle_is_read(length: int) -> None:
    """0x80 opens a pickle and "PK" a zip: lengths that end so are still lengths."""
    note = "x" * (length - len(json.dumps({"__metadata__": {"note": ""}}, separators=(",", ":"))))
    data = adapter_format.write_safetensors({}, {"note": note})
    assert int.from_bytes(data[:8], "little") == length
    assert adapter_format.read_header(data)[0] == {"note": note}
