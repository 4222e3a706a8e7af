"""What counts as memory that ran out."""

import pytest
import torch

from core.out_of_memory import is_out_of_memory


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:118] . DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("could not create a primitive"), True),
        (RuntimeError("size mismatch"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_it_is_told_which_errors_are_memory(error: Exception, is_one: bool) -> None:
    assert is_out_of_memory(error) == is_one
