"""What the command line prints: rich on a terminal, plain lines and tabs elsewhere."""

import json
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

console = Console(highlight=False, soft_wrap=True)


def say(line: str) -> None:
    """One line, as it is: names from outside are never read as markup."""
    console.print(escape(line))


def remark(line: str) -> None:
    """One line on standard error, out of the way of who reads the output; control characters shown, not obeyed."""
    sys.stderr.write("".join(c if c.isprintable() else repr(c)[1:-1] for c in line) + "\n")


def complain(line: str) -> None:
    """What went wrong, on standard error."""
    remark(f"difffit: {line}")


def show(data: Any) -> None:
    """JSON, for people and for programs."""
    console.print_json(json.dumps(dict(data) if isinstance(data, Mapping) else data))


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]], empty: str) -> None:
    """A table on a terminal; tab-separated lines with a head where a program reads."""
    cells = [[_cell(value) for value in row] for row in rows]
    if not console.is_terminal:
        for line in (columns, *cells):
            sys.stdout.write("\t".join(line) + "\n")
        return
    if not rows:
        say(empty)
        return
    drawn = Table(box=None, pad_edge=False, header_style="bold")
    for number, name in enumerate(columns):
        drawn.add_column(name, no_wrap=number == 0, overflow="fold")
    for line in cells:
        drawn.add_row(*(escape(cell) for cell in line))
    console.print(drawn, soft_wrap=False)


def moment(seconds: int | None) -> str:
    """Local time of a UNIX time."""
    return datetime.fromtimestamp(seconds, UTC).astimezone().strftime("%Y-%m-%d %H:%M:%S") if seconds else ""


def size(count: float) -> str:
    """Bytes in the unit that fits: 1.8 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError("GB is the last unit")


def duration(seconds: float) -> str:
    """`48 s` or `2 min 05 s`."""
    whole = round(seconds)
    return (
        f"{whole // 60} min {whole % 60:02d} s"
        if whole >= 100
        else f"{seconds:.1f} s"
        if seconds < 10
        else f"{whole} s"
    )


def _cell(value: Any) -> str:
    text = "" if value is None else str(value)
    return "".join(c if c.isprintable() else "�" for c in text)
