"""The crash points themselves: what is told is done once, and what cannot be meant is said."""

from pathlib import Path

import pytest

from core import faults
from core.faults import InjectedFault


def test_nothing_goes_wrong_unless_it_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for told in ("", "claimed:raise", f"@{tmp_path / 'absent'}"):
        monkeypatch.setenv("FAULT", told)
        faults.point("after_step")


def test_the_passing_that_is_told_goes_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAULT", "after_step:3:raise")
    monkeypatch.setattr(faults, "_passed", faults.Counter())
    faults.point("after_step")
    faults.point("after_step")
    with pytest.raises(InjectedFault, match="after_step"):
        faults.point("after_step")
    faults.point("after_step")


def test_a_file_counts_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "fault"
    monkeypatch.setenv("FAULT", f"@{file}")
    for _ in range(2):
        file.write_text("after_step:raise")
        faults.point("claimed")
        with pytest.raises(InjectedFault):
            faults.point("after_step")
        faults.point("after_step")
        assert not file.exists()
        assert Path(f"{file}.taken").read_text() == "after_step:raise"


@pytest.mark.parametrize(("told", "words"), [("no_such:kill", "no_such"), ("after_step:explode", "explode")])
def test_what_cannot_be_meant_is_said(monkeypatch: pytest.MonkeyPatch, told: str, words: str) -> None:
    monkeypatch.setenv("FAULT", told)
    with pytest.raises(ValueError, match=f"FAULT: unknown .*{words}"):
        faults.point("after_step")
