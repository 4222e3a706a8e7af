import pytest

from client.errors import ClientError, StillUnderWay
from client.patience import wait


def test_what_ends_is_seen_as_it_ended() -> None:
    looks = iter([1, 2, 3, 4])
    assert wait(lambda: next(looks), lambda seen: seen == 3, str, 60, every_seconds=0) == 3


def test_what_goes_on_is_said_in_its_own_words() -> None:
    with pytest.raises(StillUnderWay, match=r"^job 1 is paused after 0 s$") as caught:
        wait(lambda: 1, lambda _: False, lambda seen: f"job {seen} is paused", 0, every_seconds=0)
    assert isinstance(caught.value, ClientError)
