"""`difffit files …`"""

from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from client.api import DiffFit
from client.cli.output import console, moment, say, show, size, table
from client.cli.session import connected
from client.files import LONGEST_WAIT, File

app = typer.Typer(no_args_is_help=True, help="Datasets: archives or folders of images, one sub-folder a class.")


@app.command("push")
def push_files(
    paths: Annotated[list[Path], typer.Argument(help="Folders or archives (.zip, .tar, .tar.gz).")],
    wait: Annotated[bool, typer.Option(help="Wait for validation; a file that is refused fails the command.")] = True,
) -> None:
    """Upload images. A folder is zipped on the way, the same folder always to the same bytes."""
    with connected() as client:
        files = [push(client, path) for path in paths]
        refused = [file for file in files if wait and not is_usable(client, file)]
    if refused:
        raise typer.Exit(1)


@app.command("list")
def list_files(limit: Annotated[int, typer.Option("--limit", "-n", min=1)] = 20) -> None:
    """The newest files."""
    with connected() as client:
        files = list(client.files.list(limit))
    rows = [
        (f.id, f.filename, size(f.bytes), f.status, f.images, len(f.classes) or None, moment(f.created_at))
        for f in files
    ]
    columns = ("ID", "NAME", "SIZE", "STATUS", "IMAGES", "CLASSES", "UPLOADED")
    table(columns, rows, "no files yet: difffit files push FOLDER")


@app.command("show")
def show_file(file_id: str) -> None:
    """One file as JSON."""
    with connected() as client:
        show(client.files.get(file_id).raw)


@app.command("report")
def report_file(
    file_id: str, everything: Annotated[bool, typer.Option("--all", help="Accepted images too, as JSON.")] = False
) -> None:
    """What validation made of a file: the images that were rejected, and why."""
    with connected() as client:
        report = client.files.report(file_id)
    if everything:
        show(report)
        return
    say(f"{report.get('status')}: {report.get('images', 0)} images accepted, {report.get('rejected', 0)} rejected")
    if report.get("detail"):
        say(f"{report['detail']}" + (f" [{report['code']}]" if report.get("code") else ""))
    rejected = [item for item in report.get("verdicts", []) if item["verdict"] == "rejected"]
    if rejected:
        table(("IMAGE", "CODE", "WHY"), [(item["name"], item["code"], item["detail"]) for item in rejected], "")


@app.command("rm")
def remove_files(file_ids: list[str]) -> None:
    """Delete files. Adapters that were trained on them stay."""
    with connected() as client:
        for file_id in file_ids:
            client.files.delete(file_id)
            say(f"deleted {file_id}")


def push(client: DiffFit, path: Path) -> File:
    """Upload with a bar."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(path.name or "upload", total=None)
        file = client.files.push(path, lambda sent, total: progress.update(task, completed=sent, total=total))
    say(f"uploaded {file.filename} ({size(file.bytes)}) as {file.id}")
    return file


def is_usable(client: DiffFit, file: File, seconds: float = LONGEST_WAIT) -> bool:
    """Wait for validation and say what it found. Raises StillUnderWay."""
    settled = client.files.wait(file.id, seconds)
    if settled.status != "processed":
        say(f"{settled.id} was refused: {settled.status_details} (difffit files report {settled.id})")
        return False
    rejected = f", {settled.rejected} rejected (difffit files report {settled.id})" if settled.rejected else ""
    say(f"{settled.id}: {settled.images} images in {len(settled.classes)} classes{rejected}")
    return True
