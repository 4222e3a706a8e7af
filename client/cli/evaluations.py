"""`difffit evaluate`, `difffit evaluations …`"""

from typing import Annotated

import typer

from client.api import DiffFit
from client.cli.output import moment, say, show, table
from client.cli.sample import find_model
from client.cli.session import connected
from client.errors import ClientError
from client.evaluations import Evaluation

app = typer.Typer(no_args_is_help=True, help="Evaluations: how far a model's pictures lie from a file's.")

_ROWS = (
    ("kernel distance", "kernel_distance"),
    ("Fréchet distance", "frechet_distance"),
    ("coverage", "coverage"),
)


def evaluate(
    model: Annotated[str, typer.Argument(help="A model, an adapter's or a job's id, or `base`.")],
    file_id: Annotated[
        str | None, typer.Argument(metavar="FILE", help="What to measure against; default: what it was trained on.")
    ] = None,
    images: Annotated[int | None, typer.Option("-n", min=8, help="Pictures to draw; default: 200.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Picture i has this seed plus i.")] = None,
    waiting: Annotated[bool, typer.Option("--wait/--no-wait", help="Until it has ended.")] = True,
) -> None:
    """Measure how far a model's pictures lie from a file's, and how far training has brought them."""
    with connected() as client:
        name = find_model(client, model)
        asked = client.evaluations.create(name, file_id or _trained_on(client, name), images=images, seed=seed)
        if not waiting:
            say(f"created {asked.id}: look at it with difffit evaluations show {asked.id}")
            return
        say(f"created {asked.id}: {asked.total} pictures to draw")
        ended = client.evaluations.wait(asked.id)
    if ended.result is None:
        say(f"{ended.id} {ended.status}" + (f": {ended.trouble}" if ended.trouble else ""))
        raise typer.Exit(1)
    _print(ended)


@app.command("list")
def list_evaluations(limit: Annotated[int, typer.Option("--limit", "-n", min=1)] = 20) -> None:
    """The newest evaluations."""
    with connected() as client:
        found = list(client.evaluations.list(limit))
    rows = [(e.id, e.status, f"{e.drawn}/{e.total}", e.model, e.file, moment(e.created_at)) for e in found]
    table(("ID", "STATUS", "DRAWN", "MODEL", "FILE", "CREATED"), rows, "no evaluations yet: difffit evaluate MODEL")


@app.command("show")
def show_evaluation(evaluation_id: str) -> None:
    """One evaluation as JSON."""
    with connected() as client:
        show(client.evaluations.get(evaluation_id).raw)


@app.command("cancel")
def cancel_evaluations(evaluation_ids: list[str]) -> None:
    """End evaluations for good."""
    with connected() as client:
        for evaluation_id in evaluation_ids:
            say(f"{evaluation_id}: {client.evaluations.cancel(evaluation_id).status}")


def _trained_on(client: DiffFit, model: str) -> str:
    adapter_id = client.models.get(model).adapter_id
    job_id = client.adapters.get(adapter_id).job_id if adapter_id else None
    if job_id is None:
        raise ClientError(f"{model} was not trained here: name a file to measure against")
    return client.jobs.get(job_id).training_file


def _print(evaluation: Evaluation) -> None:
    result = evaluation.result or {}
    after, before = result["after"], result.get("before")
    rows = [(title, *(_figure(side[key]) if side else "" for side in (before, after))) for title, key in _ROWS]
    if floor := after.get("kernel_floor"):
        rows.append(("real against real", "", _figure(floor)))
    table(("", "BEFORE", "AFTER"), rows, "")
    if (moved := result.get("moved")) is not None:
        say(f"training went {moved:.0%} of the way to the file's pictures")


def _figure(value: object) -> str:
    if isinstance(value, dict):
        return f"{value['value']:.1f} ± {value['error']:.1f}"
    return f"{value:.2f}" if isinstance(value, float) else str(value)
