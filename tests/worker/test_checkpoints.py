"""Where a job's state comes from: one wrong read of its bytes costs it nothing."""

from typing import Any

import pytest

from tests.storage.lying import lie_once
from tests.worker.shop import Shop


def test_a_dataset_and_a_checkpoint_that_are_read_wrong_once_are_read_again(
    shop: Shop, monkeypatch: pytest.MonkeyPatch, at_step: dict[tuple[int, int], Any]
) -> None:
    packs, checkpoints = lie_once(monkeypatch, "pack-"), lie_once(monkeypatch, "checkpoint-")

    def crash() -> None:
        raise RuntimeError("no such draw")

    at_step[7, 2] = crash
    job_id = shop.job(steps=3, checkpoint_every=1)
    shop.pump()
    assert shop.get_job(job_id).status == "succeeded", shop.get_job(job_id).error
    assert [len(packs), len(checkpoints)] == [1, 1]
    assert not any("unreadable" in message for message in shop.messages(job_id))
