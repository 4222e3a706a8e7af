"""`difffit models …`"""

import typer

from client.cli.output import show, table
from client.cli.sample import find_model
from client.cli.session import connected

app = typer.Typer(no_args_is_help=True, help="Models: the service's bases, and what adapters make of them.")


@app.command("list")
def list_models() -> None:
    """The bases, and every adapted model of this tenant."""
    with connected() as client:
        models = client.models.list()
    rows = [
        (m.id, "base" if m.is_base else "adapted", f"{m.image_size}x{m.image_size}", len(m.classes), m.adapter_id)
        for m in models
    ]
    table(("ID", "KIND", "SIZE", "CLASSES", "ADAPTER"), rows, "no models: set DIFFFIT_BASES where the service runs")


@app.command("show")
def show_model(model: str) -> None:
    """One model as JSON, with the names of its classes: what it can be prompted with. Takes what `sample` takes."""
    with connected() as client:
        show(client.models.get(find_model(client, model)).raw)
