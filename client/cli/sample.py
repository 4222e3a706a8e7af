"""`difffit sample`"""

import math
from pathlib import Path
from typing import Annotated

import typer

from client.api import DiffFit
from client.cli.adapters import write
from client.cli.output import duration, say
from client.cli.session import connected
from client.errors import ClientError
from client.pictures import open_png, sheet, to_png


def sample(
    model: Annotated[str, typer.Argument(help="A model, an adapter's or a job's id, or `base`.")],
    prompt: Annotated[str | None, typer.Argument(help="A class of the model; without one, no class.")] = None,
    n: Annotated[int, typer.Option("-n", min=1, help="How many images.")] = 1,
    seed: Annotated[int | None, typer.Option(min=0, help="Image i has this seed plus i.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps.")] = None,
    guidance: Annotated[str | None, typer.Option(help="none, cfg or domain.")] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="How strongly.")] = None,
    adapter_scale: Annotated[float | None, typer.Option(help="0 is the base, 1 the adapter.")] = None,
    solver: Annotated[str | None, typer.Option(help="ddim or dpm++.")] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="A PNG; with several images, their grid.")] = Path(
        "sample.png"
    ),
) -> None:
    """Draw images. Several go to OUT-1.png, OUT-2.png … and, as a grid, to OUT.png."""
    with connected() as client:
        drawn = client.images.generate(
            find_model(client, model),
            prompt,
            n=n,
            seed=seed,
            steps=steps,
            solver=solver,
            guidance=guidance,
            guidance_scale=guidance_scale,
            adapter_scale=adapter_scale,
        )
    if len(drawn.images) == 1:
        write(out, drawn.images[0].png)
    else:
        for number, image in enumerate(drawn.images, 1):
            write(out.with_name(f"{out.stem}-{number}{out.suffix}"), image.png)
        pictures = [open_png(image.png) for image in drawn.images]
        columns = math.ceil(math.sqrt(len(pictures)))
        rows = [pictures[start : start + columns] for start in range(0, len(pictures), columns)]
        write(out, to_png(sheet(rows, side=pictures[0].width)))
    seeds = ", ".join(str(image.seed) for image in drawn.images)
    took = drawn.stats.get("compute_ms")
    figures = f"; {duration(took / 1000)} of computing in a batch of {drawn.stats.get('batch_size')}" if took else ""
    say(f"saved {out} (seed {seeds}{figures})")


def find_model(client: DiffFit, name: str) -> str:
    """A model's id for whatever was named. Raises ClientError, ApiError."""
    if name == "base":
        return client.models.default_base().id
    if name.startswith("adapter-"):
        return client.adapters.get(name).model
    if name.startswith("ftjob-"):
        job = client.jobs.get(name)
        if job.fine_tuned_model is None:
            raise ClientError(f"job {name} is {job.status}: it has made no model")
        return job.fine_tuned_model
    return name
