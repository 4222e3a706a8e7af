"""`python -m api`: the API process behind uvicorn."""

import argparse

import uvicorn

from api.protocol import DeadlineProtocol
from core.settings import get_settings


def main() -> None:
    settings = get_settings()
    parser = argparse.ArgumentParser(prog="python -m api", description=__doc__)
    parser.add_argument("--host", default=settings.host, help="default: DIFFFIT_HOST")
    parser.add_argument("--port", type=int, default=settings.port, help="default: DIFFFIT_PORT")
    args = parser.parse_args()
    uvicorn.run(
        "api.app:create_app",
        factory=True,
        host=args.host,
        port=args.port,
        http=DeadlineProtocol,
        access_log=False,  # ours has a line for each request
        timeout_graceful_shutdown=5,  # without it, an open event stream would hold up the shutdown
    )


if __name__ == "__main__":
    main()
