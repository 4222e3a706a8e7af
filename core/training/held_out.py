"""How many pictures of each class a job keeps for itself to be measured by. No torch here."""

from collections.abc import Sequence

HELD_OUT_SHARE = 0.1
MIN_FOR_HELD_OUT = 5


def held_out_counts(counts: Sequence[int]) -> list[int]:
    """About a tenth of each class, at least one where it has five; none of a smaller class."""
    return [max(1, round(HELD_OUT_SHARE * count)) if count >= MIN_FOR_HELD_OUT else 0 for count in counts]
