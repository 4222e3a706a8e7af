"""What the command line saves."""

from pathlib import Path

from client.errors import ClientError


def save(path: Path, data: bytes) -> None:
    """Folders are made on the way. Raises ClientError that names the file."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    except OSError as error:
        raise ClientError(f"cannot write {path}: {error.strerror}") from error
