"""`difffit adapters …`"""

from pathlib import Path
from typing import Annotated

import typer

from client.cli.output import moment, say, show, size, table
from client.cli.saving import save
from client.cli.session import connected

app = typer.Typer(no_args_is_help=True, help="Adapters: what training made.")


@app.command("list")
def list_adapters(limit: Annotated[int, typer.Option("--limit", "-n", min=1)] = 20) -> None:
    """The newest adapters."""
    with connected() as client:
        adapters = list(client.adapters.list(limit))
    rows = [
        (
            a.id,
            a.model,
            size(a.bytes),
            f"{a.parameters:,}",
            f"{a.share_of_base:.2%}",
            len(a.classes),
            moment(a.created_at),
        )
        for a in adapters
    ]
    columns = ("ID", "MODEL", "SIZE", "PARAMETERS", "OF BASE", "CLASSES", "CREATED")
    table(columns, rows, "no adapters yet: difffit train FOLDER")


@app.command("show")
def show_adapter(adapter_id: str) -> None:
    """One adapter as JSON."""
    with connected() as client:
        show(client.adapters.get(adapter_id).raw)


@app.command("pull")
def pull_adapter(
    adapter_id: str,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Default: ADAPTER.safetensors here.")] = None,
) -> None:
    """Save an adapter's safetensors file."""
    path = out or Path(f"{adapter_id}.safetensors")
    with connected() as client:
        data = client.adapters.pull(adapter_id)
    save(path, data)
    say(f"saved {path} ({size(len(data))})")


@app.command("rm")
def remove_adapters(adapter_ids: list[str]) -> None:
    """Delete adapters and the models that they make."""
    with connected() as client:
        for adapter_id in adapter_ids:
            client.adapters.delete(adapter_id)
            say(f"deleted {adapter_id}")
