"""Where the service is and which key opens it."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from client.errors import ClientError

DEFAULT_URL = "http://127.0.0.1:8321"


@dataclass(frozen=True)
class Config:
    url: str
    api_key: str | None
    source: str
    """Where the key came from, in words."""
    data_dir: Path

    def required_key(self) -> str:
        if self.api_key is None:
            raise ClientError(
                f"no API key: set DIFFFIT_API_KEY, or start a service with `difffit up` "
                f"(it writes one to {self.data_dir / 'api_key'})"
            )
        return self.api_key


def find_config(environment: Mapping[str, str] | None = None, data_dir: Path | None = None) -> Config:
    """DIFFFIT_URL and DIFFFIT_API_KEY; else the port and the key file of the service in `data_dir` (`.difffit`)."""
    environment = os.environ if environment is None else environment
    folder = data_dir or Path(environment.get("DIFFFIT_DATA_DIR") or ".difffit")
    origin, url = _url(environment, folder)
    if not _is_http_url(url):
        raise ClientError(f"{origin} {url!r}: it must be an address like {DEFAULT_URL}")
    if key := environment.get("DIFFFIT_API_KEY", "").strip():
        return Config(url, key, "DIFFFIT_API_KEY", folder)
    path = folder / "api_key"
    try:
        key = path.read_text().strip()
    except FileNotFoundError:
        return Config(url, None, "nowhere", folder)
    except OSError as error:
        raise ClientError(f"cannot read the key file {path}: {error.strerror}") from error
    return Config(url, key or None, str(path), folder)


def is_local(url: str) -> bool:
    """Whether the service is on this very machine, as far as its address says so."""
    return urlsplit(url).hostname in ("127.0.0.1", "localhost", "::1", "0.0.0.0")  # noqa: S104 - compared with, never bound


def _url(environment: Mapping[str, str], folder: Path) -> tuple[str, str]:
    """(what names it, the address): DIFFFIT_URL, else the port of the service in `folder`, else what it wrote down."""
    if url := environment.get("DIFFFIT_URL"):
        return "DIFFFIT_URL is", url
    if port := environment.get("DIFFFIT_PORT"):
        return "DIFFFIT_PORT makes", f"http://127.0.0.1:{port}"
    path = folder / "url"
    try:
        return f"{path} says", path.read_text().strip() or DEFAULT_URL
    except OSError:
        return "the default is", DEFAULT_URL


def _is_http_url(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number
        return False
