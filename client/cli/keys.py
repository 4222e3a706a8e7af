"""`difffit keys …`"""

from typing import Annotated

import typer

from client.cli.output import moment, remark, say, table
from client.cli.session import connected

app = typer.Typer(no_args_is_help=True, help="API keys of this tenant.")


@app.command("list")
def list_keys(limit: Annotated[int, typer.Option("--limit", "-n", min=1)] = 20) -> None:
    """The newest keys; secrets are not kept and cannot be shown."""
    with connected() as client:
        keys = list(client.keys.list(limit))
    rows = [
        (key.id, key.name, f"{key.prefix}…", moment(key.created_at), "revoked" if key.revoked_at else "live")
        for key in keys
    ]
    table(("ID", "NAME", "SECRET", "CREATED", "STATE"), rows, "no keys")


@app.command("create")
def create_key(name: Annotated[str, typer.Argument(help="What it is for.")]) -> None:
    """Make a key. Its secret, alone on standard output, is shown now and never again."""
    with connected() as client:
        key = client.keys.create(name)
    say(key.secret or "")
    remark(f"that is {key.id}; keep the secret, it is not shown again")


@app.command("revoke")
def revoke_keys(key_ids: list[str]) -> None:
    """Shut keys at once."""
    with connected() as client:
        for key_id in key_ids:
            client.keys.revoke(key_id)
            say(f"revoked {key_id}")
