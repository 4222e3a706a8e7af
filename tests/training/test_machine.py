"""What a job's bits rest on."""

from collections.abc import Iterator

import pytest
import torch

from core.training.machine import ask_for_determinism


@pytest.fixture
def torchs_own(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What is asked of torch is asked of the process: take it back."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("torchs_own")
def test_a_gpu_is_asked_for_kernels_that_add_in_one_order_and_a_cpu_is_left_alone() -> None:
    ask_for_determinism(torch.device("cpu"))
    assert not torch.are_deterministic_algorithms_enabled()
    ask_for_determinism(torch.device("cuda"))
    assert torch.are_deterministic_algorithms_enabled()
    assert torch.is_deterministic_algorithms_warn_only_enabled()
