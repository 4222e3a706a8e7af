"""Several jobs watched at once, until each has ended."""

import time
from collections.abc import Callable, Sequence

from client.api import DiffFit
from client.errors import ApiError, Unreachable
from client.jobs import Job

Seen = Callable[[Sequence[Job]], None]
"""Called with every job's present state, in the order in which they were named."""


def follow(
    client: DiffFit,
    job_ids: Sequence[str],
    seen: Seen,
    *,
    away: Callable[[Unreachable | ApiError], None],
    every_seconds: float = 0.5,
    patience_seconds: float = 120.0,
) -> list[Job]:
    """Look until all have ended. `away` hears of a service that is silent or has no database: it may come back.

    Raises ApiError for a job that is not there, Unreachable or ApiError when patience ends.
    """
    jobs: dict[str, Job] = {}
    heard = time.monotonic()
    while True:
        try:
            for job_id in job_ids:
                if job_id not in jobs or not jobs[job_id].has_ended:
                    jobs[job_id] = client.jobs.get(job_id)
            heard = time.monotonic()
        except (Unreachable, ApiError) as error:
            if not error.is_passing or not jobs or time.monotonic() - heard > patience_seconds:
                raise
            away(error)
        else:
            found = [jobs[job_id] for job_id in job_ids]
            seen(found)
            if all(job.has_ended for job in found):
                return found
        time.sleep(every_seconds)
