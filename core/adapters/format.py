"""An adapter as bytes: safetensors, one tensor per layout entry under its name, and what it is in the header.

The header is written here in one fixed order (the safetensors package orders metadata at random), so equal adapters
have equal bytes. Reading goes through the safetensors package after this module has checked what it will find.
"""

import json
import math
import struct
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from core.diffusion.adapter import Adapter
from core.diffusion.layout import AdapterLayout
from core.errors import Conflict, Invalid

FORMAT_VERSION = 1
CLASS_TABLE = "class_table"
MAX_HEADER_BYTES = 4 * 1024**2
MAX_TENSORS = 20_000
MAX_CLASSES = 100_000
_RESERVED = ("format_version", "base_fingerprint", "layout", "classes", "class_start")


class WrongBase(Conflict):
    """The adapter was made for another base than this one."""

    code = "wrong_base"


class CorruptAdapter(Invalid):
    """The bytes are no adapter as `save` writes them; the message says which part is wrong."""

    code = "corrupt_adapter"


def save(adapter: Adapter) -> bytes:
    """The file of an adapter; `meta` (training spec, step, metrics, licence, …) goes into the header as it is."""
    clash = [key for key in adapter.meta if key in _RESERVED]
    if clash:
        raise Invalid(f"meta.{clash[0]} is a field of the format itself")
    metadata = {
        "format_version": str(FORMAT_VERSION),
        "base_fingerprint": adapter.base_fingerprint,
        "layout": _dumps(adapter.layout.to_json()),
        "classes": _dumps(list(adapter.classes)),
        "class_start": _dumps(list(adapter.class_start)),
        **{key: _dumps(value) for key, value in sorted(adapter.meta.items())},
    }
    pieces = adapter.layout.split(adapter.theta)
    return write_safetensors({**pieces, CLASS_TABLE: adapter.class_delta}, metadata)


def load(data: bytes, base_fingerprint: str | None = None, layout: AdapterLayout | None = None) -> Adapter:
    """The adapter of a file, for a base and within a layout where these are given; anything amiss is refused."""
    metadata, specs = read_header(data)
    version = metadata.get("format_version")
    if version != str(FORMAT_VERSION):
        raise CorruptAdapter(f"format_version is {version!r}, this service reads {FORMAT_VERSION!r}")
    fingerprint = metadata.get("base_fingerprint", "")
    if base_fingerprint is not None and fingerprint != base_fingerprint:
        raise WrongBase(
            f"the adapter was made for base {fingerprint[:12] or '(none)'}, not for {base_fingerprint[:12]}"
        )
    own = _read_layout(metadata)
    if layout is not None:
        layout.require(own)
    classes, starts = _read_classes(metadata)
    wanted = {entry.name: entry.shape for entry in own.entries}
    wanted[CLASS_TABLE] = (len(classes) + 1, own.hidden)
    _check_specs(specs, wanted)
    flat = _read_flat(data, specs, own.size + wanted[CLASS_TABLE][0] * own.hidden, list(wanted))
    theta, delta = flat[: own.size], flat[own.size :].view(wanted[CLASS_TABLE])
    if not all(bound.isfinite() for bound in flat.aminmax()):  # NaN is both bounds; one pass, no copy
        pieces = {**own.split(theta), CLASS_TABLE: delta}
        broken = [name for name, tensor in pieces.items() if not torch.isfinite(tensor).all()]
        raise CorruptAdapter(f"tensor {broken[0]} holds NaN or Inf")
    meta = {key: _loads(metadata, key) for key in sorted(metadata) if key not in _RESERVED}
    return Adapter(own, fingerprint, theta, delta, classes, starts, meta)


def write_safetensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """The safetensors bytes of float32 tensors, in the given order of tensors and metadata."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    chunks: list[bytes] = []
    offset = 0
    for name, tensor in tensors.items():
        chunk = tensor.detach().cpu().to(torch.float32).contiguous().numpy().astype("<f4", copy=False).tobytes()
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [offset, offset + len(chunk)]}
        chunks.append(chunk)
        offset += len(chunk)
    head = json.dumps(header, separators=(",", ":"), ensure_ascii=True).encode()
    head += b" " * (-len(head) % 8)
    return b"".join([struct.pack("<Q", len(head)), head, *chunks])


class TensorSpec(NamedTuple):
    """What a header says of a tensor; `begin` and `end` are bytes behind the header."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_header(data: bytes) -> tuple[dict[str, str], dict[str, TensorSpec]]:
    """Metadata, and the tensors by name, before a single one is made."""
    # A safetensors file may begin with the same bytes (its header's length), but its ninth opens a JSON object.
    if data[8:9] != b"{" and (data[:2] == b"PK" or data[:1] == b"\x80"):
        raise CorruptAdapter("this is a pickle (or a zip of pickles); only safetensors is read")
    if len(data) < 8:
        raise CorruptAdapter(f"the file has {len(data)} bytes and is truncated")
    (length,) = struct.unpack("<Q", data[:8])
    if length > MAX_HEADER_BYTES:
        raise CorruptAdapter(f"a header of {length} bytes; at most {MAX_HEADER_BYTES} are read")
    if len(data) < 8 + length:
        raise CorruptAdapter("the file is truncated within its header")
    try:
        header = json.loads(data[8 : 8 + length])
        metadata = header.pop("__metadata__", {})
        if len(header) > MAX_TENSORS:
            raise CorruptAdapter(f"{len(header)} tensors; at most {MAX_TENSORS} are read")
        specs = {
            str(name): TensorSpec(str(spec["dtype"]), tuple(spec["shape"]), *map(int, spec["data_offsets"]))
            for name, spec in header.items()
        }
        end = max((spec.end for spec in specs.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError, RecursionError) as error:
        raise CorruptAdapter(f"this is no safetensors header: {type(error).__name__}") from error
    if not isinstance(metadata, dict) or any(not isinstance(value, str) for value in metadata.values()):
        raise CorruptAdapter("the header's __metadata__ is no map of strings")
    if len(data) - 8 - length < end:
        raise CorruptAdapter(f"the file is truncated: {len(data) - 8 - length} of {end} bytes of tensors")
    return metadata, specs


def _check_specs(specs: Mapping[str, TensorSpec], wanted: Mapping[str, tuple[int, ...]]) -> None:
    for name, shape in wanted.items():
        if name not in specs:
            raise CorruptAdapter(f"tensor {name} is missing")
        dtype, found, _, _ = specs[name]
        if dtype != "F32":
            raise CorruptAdapter(f"tensor {name} is {dtype}, not F32")
        if found != shape:
            raise CorruptAdapter(f"tensor {name} has shape {list(found)}, not {list(shape)}")
    extra = [name for name in specs if name not in wanted]
    if extra:
        raise CorruptAdapter(f"tensor {extra[0][:200]} does not belong to the layout")


def _read_flat(data: bytes, specs: Mapping[str, TensorSpec], size: int, names: list[str]) -> Tensor:
    """The tensors of `names` one behind the other (size,).

    They lie so in a file that `save` wrote, which is one copy. Any other order is the safetensors package's to read.
    """
    end, is_flat = 0, True
    for name in names:
        _, shape, begin, its_end = specs[name]
        is_flat &= begin == end and its_end - begin == 4 * math.prod(shape)
        end = its_end
    (length,) = struct.unpack("<Q", data[:8])
    if is_flat and len(data) == 8 + length + end == 8 + length + 4 * size:
        return torch.from_numpy(np.frombuffer(data, "<f4", size, 8 + length).astype(np.float32))
    tensors = read_tensors(data)
    return torch.cat([tensors[name].flatten() for name in names])


def read_tensors(data: bytes) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load(data)
    except SafetensorError as error:
        raise CorruptAdapter(f"the file is no safetensors: {error}") from error


def _read_layout(metadata: Mapping[str, str]) -> AdapterLayout:
    try:
        return _layout(metadata["layout"])
    except KeyError as error:
        raise CorruptAdapter("the header has no layout") from error
    except (ValueError, RecursionError) as error:
        raise CorruptAdapter("the header's layout is no JSON") from error
    except Invalid as error:
        raise CorruptAdapter(str(error)) from error


@lru_cache(maxsize=64)
def _layout(text: str) -> AdapterLayout:
    """Thousands of adapters share a few layouts: one object each."""
    return AdapterLayout.from_json(json.loads(text))


def _read_classes(metadata: Mapping[str, str]) -> tuple[tuple[str, ...], tuple[int | None, ...]]:
    classes, starts = _loads(metadata, "classes"), _loads(metadata, "class_start")
    if (
        not isinstance(classes, list)
        or not all(isinstance(name, str) for name in classes)
        or len(classes) > MAX_CLASSES
    ):
        raise CorruptAdapter("classes is no list of names")
    if (
        not isinstance(starts, list)
        or len(starts) != len(classes)
        or not all(start is None or (type(start) is int and start >= 0) for start in starts)
    ):
        raise CorruptAdapter("class_start is no list of class numbers or null, one per class")
    return tuple(classes), tuple(starts)


def _dumps(value: object) -> str:
    return json.dumps(value, separators=(",", ":"), sort_keys=True, ensure_ascii=True, default=_plain)


def _plain(value: object) -> object:
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} cannot stand in an adapter's header")


def _loads(metadata: Mapping[str, str], key: str) -> Any:
    try:
        return json.loads(metadata[key])
    except KeyError as error:
        raise CorruptAdapter(f"the header has no {key}") from error
    except (ValueError, RecursionError) as error:
        raise CorruptAdapter(f"the header's {key} is no JSON") from error
