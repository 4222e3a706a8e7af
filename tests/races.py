"""Things that happen at the same moment, as far as threads can."""

import threading
from collections.abc import Callable
from typing import Any


def race(*acts: Callable[[], Any]) -> list[Any]:
    """Start all at once; what each returned, in order. The first exception of any is raised."""
    barrier = threading.Barrier(len(acts))
    answers: list[Any] = [None] * len(acts)
    troubles: list[BaseException] = []

    def run(index: int) -> None:
        try:
            barrier.wait(timeout=30)
            answers[index] = acts[index]()
        except BaseException as error:
            troubles.append(error)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(acts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if troubles:
        raise troubles[0]
    return answers
