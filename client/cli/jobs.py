"""`difffit train`, `difffit watch`, `difffit jobs …`"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from client.api import DiffFit
from client.cli.board import watch
from client.cli.files import is_usable, push
from client.cli.output import moment, say, show, table
from client.cli.saving import save
from client.cli.session import connected
from client.errors import StillUnderWay
from client.jobs import Job

app = typer.Typer(no_args_is_help=True, help="Fine-tuning jobs.")

_VERDICT_SECONDS = 60.0  # enough for most files, and nothing hangs on it: a job may be made of one without a verdict


def train(
    source: Annotated[
        str, typer.Argument(metavar="FILE_OR_PATH", help="A file's id, or a folder or archive to upload.")
    ],
    model: Annotated[
        str | None, typer.Option(help="The base, or an adapted model to continue; default: the service's first base.")
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
    hyperparameters |= {name: _value(text) for name, text in _pairs(option, "--set").items()}
    with connected() as client:
        chosen = model or client.models.default_base().id
        job = client.jobs.create(
            _file_id(client, source),
            model=chosen,
            hyperparameters=hyperparameters,
            suffix=suffix,
            seed=seed,
            metadata=_pairs(label, "--metadata"),
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


@app.command("list")
def list_jobs(
    limit: Annotated[int, typer.Option("--limit", "-n", min=1)] = 20,
    label: Annotated[
        list[str] | None, typer.Option("--metadata", metavar="NAME=VALUE", help="Only those that it was kept with.")
    ] = None,
) -> None:
    """The newest jobs."""
    with connected() as client:
        jobs = list(client.jobs.list(limit, _pairs(label, "--metadata")))
    rows = [(j.id, j.status, _steps(j), j.model, j.adapter_id, moment(j.created_at)) for j in jobs]
    table(("ID", "STATUS", "STEP", "BASE", "ADAPTER", "CREATED"), rows, "no jobs yet: difffit train FOLDER")


@app.command("show")
def show_job(job_id: str) -> None:
    """One job as JSON."""
    with connected() as client:
        show(client.jobs.get(job_id).raw)


@app.command("events")
def list_events(job_id: str) -> None:
    """What happened to a job, in order; goes on until it has ended."""
    with connected() as client:
        for event in client.jobs.events(job_id):
            say(f"{moment(event.created_at)}  {event.level:5}  {event.message}")


@app.command("cancel")
def cancel_jobs(job_ids: list[str]) -> None:
    """End jobs for good. No adapter is made."""
    with connected() as client:
        for job_id in job_ids:
            _told(client.jobs.cancel(job_id))


@app.command("pause")
def pause_jobs(job_ids: list[str]) -> None:
    """Keep a checkpoint and give the device away until `difffit jobs resume`."""
    with connected() as client:
        for job_id in job_ids:
            _told(client.jobs.pause(job_id))


@app.command("resume")
def resume_jobs(job_ids: list[str]) -> None:
    """Let paused jobs go on from their checkpoints."""
    with connected() as client:
        for job_id in job_ids:
            _told(client.jobs.resume(job_id))


@app.command("previews")
def pull_previews(
    job_id: str,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the PNGs.")] = Path("previews"),
) -> None:
    """Save the pictures that a job drew while it trained."""
    with connected() as client:
        previews = client.jobs.previews(job_id)
        if not previews:
            say("no previews yet")
            return
        for preview in previews:
            path = out / f"{job_id}-{preview.step:06d}.png"
            save(path, client.jobs.preview(job_id, preview.id))
            say(f"{path}  step {preview.step}: {', '.join(str(name) for name in preview.classes)}")


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


def _told(job: Job) -> None:
    say(f"{job.id}: {job.status}" + (f" ({job.phase})" if job.phase and job.status == "running" else ""))


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


def _pairs(items: list[str] | None, flag: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for item in items or []:
        name, equals, value = item.partition("=")
        if not equals or not name:
            raise typer.BadParameter(f"{flag} takes NAME=VALUE, not {item!r}")
        found[name] = value
    return found


def _value(text: str) -> Any:
    """`3`, `0.1`, `true`, `["mlp"]` as JSON reads them, anything else as a word."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _steps(job: Job) -> str:
    return f"{job.progress.step}/{job.progress.total_steps}" if job.progress.total_steps else ""
