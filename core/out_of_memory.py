"""Memory that runs out in a pass: how that shows, and what there is to do before less is tried."""

import torch

_PHRASES = (
    "out of memory",
    "can't allocate memory",
    "cannot allocate memory",
    "not enough memory",
    "bad_alloc",
    "could not create a primitive",  # oneDNN, where the kernel's own memory is not to be had
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed: on the device, in torch's allocator, in oneDNN, in Python."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    message = str(error).lower()
    return isinstance(error, RuntimeError) and any(phrase in message for phrase in _PHRASES)


def halved(rows: int) -> int:
    return (rows + 1) // 2


def let_go(error: BaseException, device: torch.device) -> None:
    """Free what the pass had taken, which the error's frames hold."""
    error.__traceback__ = None
    if device.type == "cuda":
        torch.cuda.empty_cache()
