"""Jobs that are watched: what a service that is away for a while does to the watching."""

from types import SimpleNamespace
from typing import Any

import pytest

from client.errors import ApiError, Unreachable
from client.follow import follow

RUNNING, ENDED = SimpleNamespace(has_ended=False), SimpleNamespace(has_ended=True)
NO_DATABASE = ApiError(503, "database_unavailable", "the database does not answer")
SILENT = Unreachable("http://here", "refused")


def client_that(*answers: Any) -> Any:
    """A service whose jobs are in these states, or in trouble, one look after another."""
    left = list(answers)

    def get(_job_id: str) -> Any:
        answer = left.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    return SimpleNamespace(jobs=SimpleNamespace(get=get))


@pytest.mark.parametrize("trouble", [NO_DATABASE, SILENT])
def test_a_service_that_is_away_for_a_while_is_waited_for(trouble: Exception) -> None:
    heard: list[Exception] = []
    client = client_that(RUNNING, trouble, trouble, ENDED)
    assert follow(client, ["job"], lambda _: None, away=heard.append, every_seconds=0) == [ENDED]
    assert heard == [trouble, trouble]


def test_patience_ends() -> None:
    client = client_that(RUNNING, NO_DATABASE)
    with pytest.raises(ApiError, match="database"):
        follow(client, ["job"], lambda _: None, away=lambda _: None, every_seconds=0, patience_seconds=-1)


def test_what_does_not_pass_is_raised_at_once() -> None:
    client = client_that(RUNNING, ApiError(404, "not_found", "no fine-tuning job"))
    with pytest.raises(ApiError, match="no fine-tuning job"):
        follow(client, ["job"], lambda _: None, away=lambda _: None, every_seconds=0)
