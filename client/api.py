"""The Python client of the service: `DiffFit().images.generate("ft:…", "cat")`."""

from types import TracebackType
from typing import Any, Self

from client.adapters import Adapters
from client.config import find_config
from client.evaluations import Evaluations
from client.files import Files
from client.images import Images
from client.jobs import Jobs
from client.keys import Keys
from client.models import Models
from client.transport import Transport


class DiffFit:
    """A service and a key. What is not given comes from the environment or from the folder of a local service.

    Methods raise `ApiError` for an answer that is no success, `Unreachable` where nobody answers, and those that wait
    for something `StillUnderWay` where it has not ended in time.
    """

    def __init__(
        self, base_url: str | None = None, api_key: str | None = None, *, timeout: float = 60.0, retries: int = 4
    ) -> None:
        if base_url is None or api_key is None:
            config = find_config()
            base_url, api_key = base_url or config.url, api_key or config.api_key
        self.transport = Transport(base_url, api_key, timeout=timeout, retries=retries)
        self.base_url = self.transport.base_url
        self.files = Files(self.transport)
        self.jobs = Jobs(self.transport)
        self.adapters = Adapters(self.transport)
        self.models = Models(self.transport)
        self.images = Images(self.transport)
        self.evaluations = Evaluations(self.transport)
        self.keys = Keys(self.transport)

    def health(self) -> dict[str, Any]:
        """Whether the process lives."""
        return self.transport.get("/healthz")

    def ready(self) -> dict[str, Any]:
        """Whether what it stands on answers; raises ApiError 503 where it does not."""
        return self.transport.get("/readyz")

    def close(self) -> None:
        self.transport.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
