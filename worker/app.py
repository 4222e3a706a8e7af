"""The Celery app. A message is a nudge: it wakes a worker, which asks the database what there is to do."""

import atexit
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from celery import Celery
from celery.signals import setup_logging, worker_init, worker_process_init, worker_shutting_down

from core import nudges
from core.logs import configure_logs
from core.parent import die_with_parent
from core.settings import BadSettings, Settings, get_settings

QUEUES = {
    "dataset.validate": "datasets",
    "job.train": "train",
    "sample.draw": "sample",
    "evaluation.measure": "train",
}

STOP_FILE = "DIFFFIT_STOP_FILE"  # the parent touches it when it shuts down; the pump looks at it between steps


def make_app() -> Celery:
    settings = get_settings()
    app = Celery("difffit", broker=settings.broker, include=["worker.tasks.datasets", "worker.tasks.device"])
    app.conf.update(
        task_routes={name: {"queue": queue} for name, queue in QUEUES.items()},
        task_serializer="json",
        accept_content=["json"],  # a pickle in the queue is refused
        task_ignore_result=True,
        task_acks_late=True,
        task_reject_on_worker_lost=False,
        worker_pool="prefork",
        worker_pool_start_method="spawn",
        worker_concurrency=1,
        worker_prefetch_multiplier=1,
        worker_proc_alive_timeout=60,  # a loaded machine takes longer than the default 4 s to spawn a child
        worker_hijack_root_logger=False,
        worker_enable_remote_control=False,
        worker_send_task_events=False,
        broker_connection_retry_on_startup=True,
        broker_transport_options={
            "visibility_timeout": 600,
            "unacked_restore_interval": 5,
            "unacked_restore_throttle": 1,
            "socket_timeout": 5,
            "socket_connect_timeout": 2,
            "socket_keepalive": not settings.broker.startswith("redis+socket://"),
        },
    )
    return app


@setup_logging.connect
def _logs(**_: Any) -> None:
    configure_logs(get_settings().log_level)


@worker_init.connect
def _prepare(**_: Any) -> None:
    """In the parent, before the child is spawned: the child inherits the stop file's name."""
    check_broker(get_settings())
    # A thread that waits for its twin must not burn the core that the twin needs: with both cores in use elsewhere,
    # a step on two spinning threads took over 10 s, on two that sleep 0.65 s (docs/log.md).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    folder = tempfile.mkdtemp(prefix="difffit-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ[STOP_FILE] = str(Path(folder) / "stop")


def check_broker(settings: Settings) -> None:
    """End this process, saying why, where the broker may drop what is queued."""
    try:
        nudges.refuse_eviction(settings.broker)
    except BadSettings as error:
        sys.exit(str(error))


@worker_process_init.connect
def _child(**_: Any) -> None:
    die_with_parent()


@worker_shutting_down.connect
def _stop(**_: Any) -> None:
    """On SIGTERM's warm shutdown this is said at once; Celery's soft shutdown says it only when its time is over."""
    Path(os.environ[STOP_FILE]).touch()


def is_stopping() -> bool:
    return STOP_FILE in os.environ and Path(os.environ[STOP_FILE]).exists()


app = make_app()
