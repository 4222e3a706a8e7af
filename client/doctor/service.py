"""Whether the service answers and our key opens it; where nobody answers, whether it could be started."""

import socket
from collections.abc import Iterator

from client.api import DiffFit
from client.config import Config, is_local
from client.doctor.finding import Finding
from client.doctor.settings import Settings
from client.errors import ApiError, ClientError, Unreachable


def examine(config: Config, settings: Settings | None) -> Iterator[Finding]:
    """`settings` are those that a service started here would have."""
    with DiffFit(config.url, config.api_key, timeout=5, retries=0) as client:
        try:
            client.health()
        except Unreachable:
            yield _silence(config.url, settings)
            return
        except ApiError as error:
            yield Finding(
                "fail", "service", f"{config.url} answers, but not as DiffFit: {error}", "choose another port"
            )
            return
        yield Finding("ok", "service", f"answers at {config.url}")
        yield from _readiness(client, _logs(config))
        yield _key(client, config)


def _silence(url: str, settings: Settings | None) -> Finding:
    """Nobody answers as an HTTP service. Is the port of this machine free for one?"""
    if not is_local(url):
        return Finding("fail", "service", f"no answer from {url}", "is DIFFFIT_URL right, and the service running?")
    if settings is None:
        return Finding("warn", "service", f"no answer from {url}")
    host, port = settings.host, settings.port
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            return Finding("fail", "port", f"{port} cannot be had: {error.strerror}", "difffit up --port another")
    return Finding("warn", "service", f"no answer from {url}; port {port} is free", "start it: difffit up")


def _readiness(client: DiffFit, logs: str) -> Iterator[Finding]:
    trouble = "no DiffFit: it names no checks"
    try:
        body = client.ready()
    except ApiError as error:
        body, trouble = error.body, str(error)  # 503 says what fails, in the same shape
    except Unreachable as error:
        body, trouble = {}, str(error)
    if not isinstance(body.get("checks"), dict):
        yield Finding("fail", "ready", trouble, logs)
        return
    for name, check in body["checks"].items():
        if check["status"] == "ok":
            yield Finding("ok", name, "ready")
        else:
            level = "warn" if name == "broker" else "fail"  # jobs are accepted without one
            yield Finding(level, name, check["detail"] or check["status"], logs)


def _key(client: DiffFit, config: Config) -> Finding:
    if config.api_key is None:
        return Finding(
            "fail", "key", "none found", f"set DIFFFIT_API_KEY (looked in {config.data_dir / 'api_key'} too)"
        )
    try:
        count = len(client.models.list())
    except ClientError as error:
        advice = ""
        if isinstance(error, ApiError) and error.status == 401:
            # a key from here would need one that is live
            advice = "have another made where the service runs: python -m core.tenants NAME --new-key"
        return Finding("fail", "key", f"from {config.source}: {error}", advice)
    return Finding("ok", "key", f"from {config.source}, opens {count} models")


def _logs(config: Config) -> str:
    return "see the logs in the data folder" if is_local(config.url) else "its operator finds why in its logs"
