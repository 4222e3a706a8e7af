"""`difffit train`, `difffit watch`"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from client.api import DiffFit
from client.cli.board import watch
from client.cli.files import is_usable, push
from client.cli.jobs import pairs
from client.cli.output import say
from client.cli.sample import find_model
from client.cli.session import connected
from client.errors import StillUnderWay

_VERDICT_SECONDS = 60.0  # enough for most files, and nothing hangs on it: a job may be made of one without a verdict


def train(
    source: Annotated[
        str, typer.Argument(metavar="FILE_OR_PATH", help="A file's id, or a folder or archive to upload.")
    ],
    model: Annotated[
        str | None,
        typer.Option(help="The base, or a model, adapter or job to continue; default: the service's first base."),
    ] = None,
    checkpoint: Annotated[str | None, typer.Option(help="A checkpoint to continue from, by its id.")] = None,
    suffix: Annotated[str | None, typer.Option(help="A word for the adapted model's name.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Training steps; default: chosen for the dataset.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1)] = None,
    learning_rate: Annotated[float | None, typer.Option(min=0.0)] = None,
    devices: Annotated[int | None, typer.Option(min=1, help="Devices to train on at once; default: 1.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="The same seed trains the same adapter.")] = None,
    option: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="Any other hyperparameter.")
    ] = None,
    label: Annotated[
        list[str] | None, typer.Option("--metadata", metavar="NAME=VALUE", help="Kept with the job.")
    ] = None,
    evaluating: Annotated[
        bool, typer.Option("--evaluate", help="Measure the adapter against held-out images, before and after.")
    ] = False,
    watching: Annotated[bool, typer.Option("--watch/--no-watch", help="Follow the job until it has ended.")] = False,
) -> None:
    """Adapt the base to a set of images."""
    named = {"steps": steps, "batch_size": batch_size, "learning_rate": learning_rate, "devices": devices}
    hyperparameters = {key: value for key, value in named.items() if value is not None}
    hyperparameters |= {name: _value(text) for name, text in pairs(option, "--set").items()}
    with connected() as client:
        chosen = find_model(client, model or "base")
        job = client.jobs.create(
            _file_id(client, source),
            model=chosen,
            hyperparameters=hyperparameters,
            suffix=suffix,
            seed=seed,
            metadata=pairs(label, "--metadata"),
            evaluate=evaluating,
            checkpoint=checkpoint,
        )
        say(f"created {job.id} on {chosen}: {job.status}")
        if watching:
            _watch(client, {job.id: suffix or job.id})
        else:
            say(f"follow it with: difffit watch {job.id}")


def watch_jobs(job_ids: Annotated[list[str], typer.Argument(metavar="JOB...")]) -> None:
    """Follow jobs live: step, losses, speed, time left. Ctrl-C leaves them running."""
    with connected() as client:
        _watch(client, {job_id: job_id for job_id in job_ids})


def _watch(client: DiffFit, names: Mapping[str, str]) -> None:
    """Exit code 0 only where every job succeeded; 130 after Ctrl-C."""
    try:
        jobs = watch(client, names)
    except KeyboardInterrupt:
        listed = " ".join(names)
        say(
            f"stopped watching; the work goes on. "
            f"Look again: difffit watch {listed}   End it: difffit jobs cancel {listed}"
        )
        raise typer.Exit(130) from None
    for job in jobs:
        if job.status == "succeeded":
            say(f"{job.id} made {job.fine_tuned_model}")
            say(f"draw with it: difffit sample {job.adapter_id or job.fine_tuned_model} CLASS -n 4 -o out.png")
        elif job.trouble:
            say(f"{job.id} {job.status}: {job.trouble}")
        else:
            say(f"{job.id} {job.status}")
    if any(job.status != "succeeded" for job in jobs):
        raise typer.Exit(1)


def _file_id(client: DiffFit, source: str) -> str:
    if source.startswith("file-") and not Path(source).exists():
        return source
    file = push(client, Path(source))
    try:
        if not is_usable(client, file, _VERDICT_SECONDS):
            raise typer.Exit(1)
    except StillUnderWay:
        say(f"{file.id} is still being validated: the job waits for that and starts by itself")
    return file.id


def _value(text: str) -> Any:
    """`3`, `0.1`, `true`, `["mlp"]` as JSON reads them, anything else as a word."""
    try:
        return json.loads(text)
    except ValueError:
        return text
