"""`difffit sample`"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from client.api import DiffFit
from client.cli.output import console, duration, say
from client.cli.saving import save
from client.cli.session import connected
from client.errors import ClientError
from client.images import Asked, CompletedImage, Generation, PartialImage
from client.pictures import encode, open_picture, sheet

_FORMATS = {".png": "png", ".webp": "webp", ".jpg": "jpeg", ".jpeg": "jpeg"}


def sample(
    model: Annotated[str, typer.Argument(help="A model, an adapter's or a job's id, or `base`.")],
    prompt: Annotated[str | None, typer.Argument(help="A class of the model; without one, no class.")] = None,
    mix: Annotated[
        list[str] | None,
        typer.Option(
            metavar="MODEL=WEIGHT", help="Add up tuned models, one each time; the model drawn from is then their base."
        ),
    ] = None,
    n: Annotated[int, typer.Option("-n", min=1, help="How many images.")] = 1,
    seed: Annotated[int | None, typer.Option(min=0, help="Image i has this seed plus i.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps.")] = None,
    guidance: Annotated[str | None, typer.Option(help="none, cfg or domain.")] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="How strongly.")] = None,
    guidance_interval: Annotated[
        tuple[float, float] | None, typer.Option(metavar="LOW HIGH", help="Guide between these shares of noise alone.")
    ] = None,
    adapter_scale: Annotated[float | None, typer.Option(help="0 is the base, 1 the adapter.")] = None,
    solver: Annotated[str | None, typer.Option(help="dpm++, ddim, or euler for flow bases.")] = None,
    size: Annotated[str | None, typer.Option(help="As 64x64; default: what the model was trained at.")] = None,
    timeout: Annotated[float | None, typer.Option(help="Seconds after which the service gives up.")] = None,
    output_format: Annotated[
        Literal["png", "webp", "jpeg"] | None, typer.Option(help="OUT's suffix follows; default: what it says.")
    ] = None,
    output_compression: Annotated[
        int | None, typer.Option(min=0, max=100, help="Quality of webp and jpeg; default: 100.")
    ] = None,
    partial: Annotated[
        int, typer.Option(min=0, max=3, help="Save so many images on the way too, of each, as OUT.partial-0 …")
    ] = 0,
    out: Annotated[
        Path, typer.Option("--out", "-o", dir_okay=False, help="Where to; with several images, their grid.")
    ] = Path("sample.png"),
) -> None:
    """Draw images. Several go to OUT-1.png, OUT-2.png … and, as a grid, to OUT.png."""
    weights = [_weight(item) for item in mix or []]
    if output_format is not None and _FORMATS.get(out.suffix.lower()) != output_format:
        out = out.with_suffix(f".{output_format}")
    kind = output_format or _FORMATS.get(out.suffix.lower(), "png")
    asked = Asked(
        n=n,
        seed=seed,
        steps=steps,
        solver=solver,
        guidance=guidance,
        guidance_scale=guidance_scale,
        guidance_interval=guidance_interval,
        adapter_scale=adapter_scale,
        size=size,
        timeout=timeout,
        output_format=kind,
        output_compression=output_compression,
    )
    with connected() as client:
        name = find_model(client, model)
        if weights:
            asked["adapters"] = [(find_model(client, part), weight) for part, weight in weights]
        paths = [out] if n == 1 else [out.with_name(f"{out.stem}-{number}{out.suffix}") for number in range(1, n + 1)]
        if partial:
            drawn = _stream(client, name, prompt, asked, partial, paths)
        else:
            drawn = client.images.generate(name, prompt, **asked)
    for path, image in zip(paths, drawn.images, strict=True):
        save(path, image.data)
    if n > 1:
        pictures = [open_picture(image.data) for image in drawn.images]
        columns = math.ceil(math.sqrt(len(pictures)))
        rows = [pictures[start : start + columns] for start in range(0, len(pictures), columns)]
        quality = 100 if output_compression is None else output_compression
        save(out, encode(sheet(rows, side=pictures[0].width), kind, quality))
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
    if name.startswith("ftjob-") and ":" not in name:  # with one it is a checkpoint's name
        job = client.jobs.get(name)
        if job.fine_tuned_model is None:
            raise ClientError(f"job {name} is {job.status}: it has made no model")
        return job.fine_tuned_model
    return name


def _stream(
    client: DiffFit, model: str, prompt: str | None, asked: Asked, partial: int, paths: Sequence[Path]
) -> Generation:
    """Draw with a bar; each partial image is saved beside where its image will be, as it comes."""
    completed: list[CompletedImage] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("drawing", total=len(paths) * (partial + 1))
        for event in client.images.stream(model, prompt, partial_images=partial, **asked):
            if isinstance(event, PartialImage):
                path = paths[event.index]
                path = path.with_name(f"{path.stem}.partial-{event.number}{path.suffix}")
                save(path, event.data)
                say(f"saved {path}")
            else:
                completed.append(event)
            progress.advance(task)
    last = completed[-1]
    return Generation(last.id, model, [event.image for event in completed], last.stats)


def _weight(item: str) -> tuple[str, float]:
    """`ft:…=0.7`: a model and its weight."""
    name, _, text = item.rpartition("=")
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not name or not math.isfinite(weight):
        raise typer.BadParameter(f"--mix takes MODEL=WEIGHT, as in ft:…=0.7, not {item!r}")
    return name, weight
