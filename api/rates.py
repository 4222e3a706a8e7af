"""How often a tenant may ask: a bucket each that holds a minute's requests and fills up again all the time.

The tenant's keys share it. Every API process counts for itself, so that N of them let N times as much through.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from core.errors import OverQuota

WINDOW_SECONDS = 60


class RateLimited(OverQuota):
    """The tenant asks too often; nothing of the request was done."""

    code = "rate_limited"


@dataclass(frozen=True)
class Allowance:
    """What a tenant has left after a request. `reset_seconds`: until that is the quota, or a refused request is due."""

    quota: int
    remaining: int
    reset_seconds: int
    is_allowed: bool

    def check(self) -> None:
        """Raises RateLimited."""
        if not self.is_allowed:
            raise RateLimited(
                f"a tenant may send {self.quota} requests a minute, all of its keys together: "
                f"try again in {self.reset_seconds} s",
                retry_after_seconds=self.reset_seconds,
            )

    def fields(self) -> dict[str, str]:
        """The reply's header fields (draft-ietf-httpapi-ratelimit-headers)."""
        return {
            "RateLimit-Policy": f'"default";q={self.quota};w={WINDOW_SECONDS}',
            "RateLimit": f'"default";r={self.remaining};t={self.reset_seconds}',
        }


class Buckets:
    """One a tenant that has asked of late: one that is full again is forgotten, so they are never more than that."""

    def __init__(self, quota: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._quota = quota
        self._clock = clock
        self._left: dict[str, tuple[float, float]] = {}  # requests, at which moment
        self._swept_at = clock()

    def take(self, tenant_id: str) -> Allowance:
        """Count a request, unless it is one too many. Only the event loop's thread takes, so no lock is needed."""
        now = self._clock()
        if now - self._swept_at >= WINDOW_SECONDS:
            self._sweep(now)
        left = self._left_at(now, tenant_id)
        if left < 1:
            return Allowance(self._quota, 0, self._seconds_for(1 - left), is_allowed=False)
        left -= 1
        self._left[tenant_id] = (left, now)
        return Allowance(self._quota, int(left), self._seconds_for(self._quota - left), is_allowed=True)

    def _left_at(self, now: float, tenant_id: str) -> float:
        left, then = self._left.get(tenant_id, (self._quota, now))
        return min(self._quota, left + (now - then) * self._quota / WINDOW_SECONDS)

    def _seconds_for(self, requests: float) -> int:
        return max(1, math.ceil(requests * WINDOW_SECONDS / self._quota))

    def _sweep(self, now: float) -> None:
        self._left = {name: kept for name, kept in self._left.items() if self._left_at(now, name) < self._quota}
        self._swept_at = now
