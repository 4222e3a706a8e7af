"""Rows that another release wrote: left alone for a while, and said once in that while."""

from structlog.testing import capture_logs

from core.unread import Unread


def read_of(data: dict[str, int]) -> object:
    return (lambda *, known: known)(**data)


def test_what_cannot_be_read_is_left_out_and_said_once() -> None:
    unread = Unread("job")
    with capture_logs() as logs:
        assert unread.read("good", lambda: read_of({"known": 1})) == 1
        assert unread.read("bad", lambda: read_of({"known": 1, "of_a_newer_release": 1})) is None
    assert unread.ids() == ["bad"]
    [line] = logs
    assert (line["event"], line["row_id"]) == ("job.left_to_another_release", "bad")
    assert "of_a_newer_release" in line["error"]


def test_it_is_looked_at_anew_after_a_while() -> None:
    unread = Unread("job", again_seconds=0.0)
    assert unread.read("bad", lambda: read_of({})) is None
    assert unread.ids() == []
