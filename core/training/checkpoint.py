"""A job's state as bytes, bound to what it belongs to: spec, data and numeric path."""

import json
from collections.abc import Mapping
from typing import Any

import torch

from core.adapters.format import CorruptAdapter, read_header, read_tensors, write_safetensors
from core.errors import Conflict
from core.training.path import NumericPath
from core.training.trainee import TrainState

FORMAT_VERSION = "1"


class CorruptCheckpoint(Conflict):
    """The bytes are no checkpoint as `dump` writes them."""

    code = "corrupt_checkpoint"


class CheckpointMismatch(Conflict):
    """The checkpoint belongs to another spec, dataset or numeric path; the message says which part differs."""

    code = "checkpoint_mismatch"


def dump(state: TrainState, spec_digest: str, data_digest: str, path: NumericPath) -> bytes:
    """The state and what it belongs to, as safetensors; equal states have equal bytes."""
    metadata = {
        "format_version": FORMAT_VERSION,
        "spec": spec_digest,
        "data": data_digest,
        "numeric_path": json.dumps(path.to_json(), sort_keys=True),
        "step": str(state.step),
        "class_start": json.dumps(list(state.class_start)),
    }
    return write_safetensors({name: getattr(state, name) for name in TrainState.TENSORS}, metadata)


def load(
    data: bytes,
    spec_digest: str,
    data_digest: str,
    path: NumericPath,
    device: torch.device | str = "cpu",
) -> TrainState:
    """The state to go on from, if it belongs to exactly this spec, dataset and numeric path.

    The micro-batch may have been halved since: the job's record says so.
    """
    metadata, state = _parse(data, device)
    for part, wanted in (("spec", spec_digest), ("data", data_digest)):
        if metadata.get(part) != wanted:
            raise CheckpointMismatch(f"the checkpoint belongs to another {part}")
    found, wanted = _path(metadata).to_json(), path.to_json()
    for key in sorted(wanted):
        if found[key] != wanted[key] and not (key == "micro_batch" and found[key] > wanted[key]):
            raise CheckpointMismatch(
                f"the checkpoint's numeric path has {key} {found[key]!r}, this run {wanted[key]!r}"
            )
    return state


def read(data: bytes) -> TrainState:
    """The state, whatever it belongs to: for another job to begin with."""
    return _parse(data, "cpu")[1]


def _parse(data: bytes, device: torch.device | str) -> tuple[dict[str, str], TrainState]:
    try:
        metadata, specs = read_header(data)
        tensors = read_tensors(data)
    except CorruptAdapter as error:
        raise CorruptCheckpoint(str(error)) from error
    if metadata.get("format_version") != FORMAT_VERSION or set(specs) != set(TrainState.TENSORS):
        raise CorruptCheckpoint("the file is no checkpoint of this version")
    if {spec.dtype for spec in specs.values()} != {"F32"} or len({spec.shape for spec in specs.values()}) != 1:
        raise CorruptCheckpoint("the checkpoint's vectors differ in type or length")
    moved = {name: tensors[name].to(device) for name in TrainState.TENSORS}
    step, starts = _header(metadata, "step"), _header(metadata, "class_start")
    if type(step) is not int or type(starts) is not list:
        raise CorruptCheckpoint("the checkpoint's header is not readable")
    return dict(metadata), TrainState(**moved, step=step, class_start=tuple(starts))


def _path(metadata: Mapping[str, str]) -> NumericPath:
    try:
        return NumericPath.from_json(_header(metadata, "numeric_path"))
    except TypeError as error:
        raise CheckpointMismatch(f"the checkpoint's numeric path is another version's: {error}") from error


def _header(metadata: Mapping[str, str], key: str) -> Any:
    try:
        return json.loads(metadata[key])
    except (KeyError, ValueError) as error:
        raise CorruptCheckpoint(f"the checkpoint's header is not readable: {error!r}") from error
