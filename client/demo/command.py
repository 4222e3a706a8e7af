"""`difffit demo`"""

import platform
import signal
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Annotated
from urllib.parse import urlsplit

import typer

from client import machine
from client.cli.output import duration, say, size
from client.cli.saving import save
from client.config import find_config
from client.demo import story
from client.demo.report import batch_sentence, build_grid, build_page, next_steps
from client.demo.scenes import Show
from client.demo.service import Service, running_service
from client.pictures import to_png


def demo(
    keep: Annotated[bool, typer.Option("--keep", help="Leave the service running at the end.")] = False,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Train anew, even where an earlier run's adapters are there.")
    ] = False,
    data_dir: Annotated[Path | None, typer.Option(help="The service's folder; default: .difffit")] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the report.")] = Path("demo"),
) -> None:
    """Adapt the base to two real image sets, draw with base and both adapters in one batch, write a report."""
    signal.signal(signal.SIGTERM, _interrupt)  # as Ctrl-C: the service is stopped in order
    clock = story.Clock()
    try:
        with ExitStack() as stack:
            with clock.act("Start the service"):
                service = stack.enter_context(running_service(data_dir, keep))
            show = _play(service, clock, fresh)
            page = _write(show, clock, out)
            if service.process is not None and not keep:
                with clock.act("Stop the service"):
                    stack.close()
    except KeyboardInterrupt:
        say("interrupted; what was uploaded and trained is kept, and the next run goes on from there")
        raise typer.Exit(130) from None
    _close(show, service, page)


def _play(service: Service, clock: story.Clock, fresh: bool) -> Show:
    client = service.client
    with clock.act("Upload two image sets"):
        base = client.models.default_base()
        files, reused = story.upload(client)
        clock.note(f"{reused} of {len(files)} were there already" if reused else "validated in a child process")
    with clock.act("Train an adapter for each"):
        trained = story.train(client, base, files, fresh)
        kept = sum(one.is_reused for one in trained)
        clock.note(f"{kept} of {len(trained)} reused from an earlier run" if kept else "together, on one device")
    with clock.act("Draw with base, A and B at once"):
        rows, drawn = story.draw(client, base, trained)
        clock.note(f"{len(drawn.stats)} requests, up to {drawn.adapters_at_once} adapters in a forward pass")
    return Show(base, trained, rows, drawn, _facts(), client.base_url, _exports(service), clock.stages)


def _write(show: Show, clock: story.Clock, out: Path) -> Path:
    with clock.act("Write the report"):
        save(out / "grid.png", to_png(build_grid(show)))
        facts = machine.find_torch()
        if facts is not None:
            show.facts = (*show.facts, ("torch", f"{facts.version} on {facts.device}"))
    page = out / "report.html"
    save(page, build_page(show).encode())
    return page


def _close(show: Show, service: Service, page: Path) -> None:
    say("")
    for stage in show.stages:
        say(f"{stage.name:34} {duration(stage.seconds):>12}  {stage.note}".rstrip())
    say(f"{'Together':34} {duration(sum(stage.seconds for stage in show.stages)):>12}")
    say("")
    for one in show.trained:
        adapter = one.adapter
        figures = f"{adapter.bytes:,} bytes, {adapter.parameters:,} parameters, {adapter.share_of_base:.2%} of the base"
        say(f"{one.letter} {one.domain.title}: {adapter.id}, {figures}")
    say(batch_sentence(show))
    say(f"The report: {page.absolute().as_uri()}")
    say("")
    if service.process is None or service.keep:
        process = (
            f" (process {service.process.pid}; end it with: kill {service.process.pid})" if service.process else ""
        )
        say(f"The service still runs at {show.url}{process}")
    say("Try next:")
    for what, command in next_steps(show, is_running=service.process is None or service.keep):
        say(f"  {what}")
        say(f"      {command}")


def _exports(service: Service) -> list[str]:
    known = find_config()
    port = urlsplit(service.client.base_url).port
    elsewhere = [] if known.url == service.client.base_url else [f"DIFFFIT_PORT={port}"]
    folder = service.data_dir
    return elsewhere + (
        [] if known.data_dir.absolute() == folder.absolute() else [f"DIFFFIT_DATA_DIR={folder.absolute()}"]
    )


def _facts() -> tuple[tuple[str, str], ...]:
    memory = machine.memory_bytes()
    facts = [
        ("", machine.processor()),
        ("", f"{machine.cores()} cores"),
        ("memory", size(memory[1]) if memory else "unknown"),
        ("Python", platform.python_version()),
        ("", f"{platform.system()} {platform.machine()}"),
        ("", datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")),
    ]
    return tuple(facts)


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt
