"""A process that takes its share of another's job: `python -m core.training.rank`, started by `core.training.crew`.

It reads one JSON object a line on its standard input and does as told until that ends. On its standard output it says
once that it is ready, or what went wrong.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import structlog
import torch

from core import faults
from core.diffusion.families import load_base
from core.logs import configure_logs
from core.parent import die_with_parent
from core.training.distributed import Group, RankLost, take_over
from core.training.loop import advance
from core.training.machine import ask_for_determinism
from core.training.trainee import Trainee

log = structlog.get_logger()


def main() -> None:
    die_with_parent()
    with _answers() as answers:

        def answer(words: dict[str, str]) -> None:
            answers.write(json.dumps(words) + "\n")
            answers.flush()

        try:
            serve(sys.stdin, answer)
        except Exception as error:
            if not isinstance(error, RankLost):  # that is told where it began
                log.exception("rank.failed")
            answer({"error": f"{type(error).__name__}: {error}"})
            raise SystemExit(1) from error


def serve(orders: TextIO, answer: Callable[[dict[str, str]], None]) -> None:
    """The first order says which base to load, and who we are; every other what to do next."""
    place: dict[str, Any] = json.loads(orders.readline())
    configure_logs(place["log_level"])
    device = torch.device(place["device"])
    ask_for_determinism(device)
    base = load_base(place["folder"], device=device, dtype=getattr(torch, place["dtype"]), name=place["name"])
    answer({"ready": base.fingerprint})
    group: Group | None = None
    trainee: Trainee | None = None
    for line in orders:
        order: dict[str, Any] = json.loads(line)
        if order["do"] == "join":
            if group is None:  # one for life: the lead comes to it with its first job
                rendezvous, rank, world = Path(place["rendezvous"]), place["rank"], place["world"]
                group = Group(rendezvous, rank, world, device, place["timeout_seconds"])
            trainee = take_over(group, base)
            continue
        if order["do"] == "leave":
            trainee = None
            continue
        if group is None or trainee is None or trainee.state.step != order["step"]:
            raise RuntimeError(f"{order} is not what comes next")
        if order["do"] == "step":
            faults.point("rank_step")
            advance(base, [trainee])
        else:
            group.agrees(trainee.state)  # the lead decides what follows where they differ


@contextmanager
def _answers() -> Iterator[TextIO]:
    """The standard output for ourselves: what a library prints goes to standard error."""
    with os.fdopen(os.dup(1), "w") as own:
        os.dup2(2, 1)
        yield own


if __name__ == "__main__":
    main()
