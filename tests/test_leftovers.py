"""What killed processes left behind goes, what is being written stays."""

import os
import time
from pathlib import Path

from core import leftovers


def aged(path: Path, hours: float) -> None:
    moment = time.time() - hours * 3600
    for entry in [*path.rglob("*"), path]:
        os.utime(entry, (moment, moment))


def test_what_nobody_has_written_to_for_an_hour_goes(tmp_path: Path) -> None:
    for name in ("old-folder/inside/file", "old-file", "young-folder/inside/file", "young-file"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    for name in ("old-folder", "old-file"):
        aged(tmp_path / name, 1.1)
    for name in ("young-folder", "young-file"):
        aged(tmp_path / name, 0.9)
    assert leftovers.clear(tmp_path) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["young-file", "young-folder"]


def test_a_folder_is_as_young_as_the_newest_file_in_it(tmp_path: Path) -> None:
    (tmp_path / "work" / "inside").mkdir(parents=True)
    aged(tmp_path / "work", 5)
    (tmp_path / "work" / "inside" / "file").write_bytes(b"x")
    aged(tmp_path / "work" / "inside" / "file", 0)
    os.utime(tmp_path / "work" / "inside", (0, 0))
    assert leftovers.clear(tmp_path) == 0


def test_a_link_goes_and_what_it_points_to_stays(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "kept").mkdir()
    link = tmp_path / "folder" / "link"
    link.symlink_to(tmp_path / "kept")
    os.utime(link, (0, 0), follow_symlinks=False)
    assert leftovers.clear(tmp_path / "folder") == 1
    assert (tmp_path / "kept").is_dir()


def test_a_folder_that_is_not_there_has_no_leftovers(tmp_path: Path) -> None:
    assert leftovers.clear(tmp_path / "nothing") == 0
    (tmp_path / "file").write_bytes(b"")
    assert leftovers.clear(tmp_path / "file") == 0
