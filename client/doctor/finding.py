"""What a check has found."""

from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Finding:
    """`advice` says what to do where the level is not ok."""

    level: Level
    subject: str
    text: str
    advice: str = ""
