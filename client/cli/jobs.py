"""`difffit jobs …`"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from client.cli.output import moment, say, show, size, table
from client.cli.saving import save
from client.cli.session import connected
from client.jobs import Job

app = typer.Typer(no_args_is_help=True, help="Fine-tuning jobs.")


@app.command("list")
def list_jobs(
    limit: Annotated[int, typer.Option("--limit", "-n", min=1)] = 20,
    label: Annotated[
        list[str] | None, typer.Option("--metadata", metavar="NAME=VALUE", help="Only those that it was kept with.")
    ] = None,
) -> None:
    """The newest jobs."""
    with connected() as client:
        jobs = list(client.jobs.list(limit, pairs(label, "--metadata")))
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


@app.command("checkpoints")
def list_checkpoints(job_id: str) -> None:
    """The checkpoints that are kept of a job, newest first: `train --checkpoint ID` goes on from one."""
    with connected() as client:
        checkpoints = client.jobs.checkpoints(job_id)
    rows = [
        (c["id"], c["step_number"], *_losses(c["metrics"]), size(c["bytes"]), moment(c["created_at"]))
        for c in checkpoints
    ]
    table(("ID", "STEP", "LOSS", "VALIDATION", "SIZE", "CREATED"), rows, "no checkpoints yet")


@app.command("metrics")
def list_metrics(job_id: str) -> None:
    """A job's losses and speeds, in order of steps."""
    with connected() as client:
        metrics = client.jobs.metrics(job_id)
    rows = [(m["step"], *_losses(m), m.get("steps_per_second")) for m in metrics]
    table(("STEP", "LOSS", "VALIDATION", "STEPS/S"), rows, "nothing measured yet")


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


def pairs(items: list[str] | None, flag: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for item in items or []:
        name, equals, value = item.partition("=")
        if not equals or not name:
            raise typer.BadParameter(f"{flag} takes NAME=VALUE, not {item!r}")
        found[name] = value
    return found


def _told(job: Job) -> None:
    say(f"{job.id}: {job.status}" + (f" ({job.phase})" if job.phase and job.status == "running" else ""))


def _losses(measured: Mapping[str, Any]) -> list[str]:
    found = (measured.get(name) for name in ("train_loss", "valid_loss"))
    return ["" if loss is None else f"{loss:.4f}" for loss in found]


def _steps(job: Job) -> str:
    return f"{job.progress.step}/{job.progress.total_steps}" if job.progress.total_steps else ""
