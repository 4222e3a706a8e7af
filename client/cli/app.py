"""The `difffit` command."""

import os
import sys
from typing import Annotated

import typer

from client import machine
from client.cli import adapters, evaluations, files, jobs, keys, models, sample, train, up
from client.cli.output import complain, say
from client.demo.command import demo
from client.doctor.command import doctor
from client.errors import ClientError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="DiffFit: adapt one frozen diffusion transformer to many sets of images.",
    epilog="Exit codes: 0 done, 1 refused or failed, 2 wrong usage, 3 no answer from the service, 130 interrupted.",
)


def _print_version(is_asked: bool) -> None:
    if is_asked:
        say(f"difffit {machine.version()}")
        raise typer.Exit


@app.callback()
def difffit(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Say which this is.")
    ] = False,
) -> None:
    """What all commands share."""


app.command()(up.up)
app.command()(demo)
app.command()(doctor)
app.add_typer(files.app, name="files")
app.command()(train.train)
app.command("watch")(train.watch_jobs)
app.add_typer(jobs.app, name="jobs")
app.command()(sample.sample)
app.add_typer(models.app, name="models")
app.add_typer(adapters.app, name="adapters")
app.command()(evaluations.evaluate)
app.add_typer(evaluations.app, name="evaluations")
app.add_typer(keys.app, name="keys")


def main() -> None:
    """Expected trouble is one line on standard error; only a fault of ours shows a traceback."""
    try:
        app(prog_name="difffit")
    except ClientError as error:
        complain(str(error))
        sys.exit(error.exit_code)
    except BrokenPipeError:  # `difffit … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


if __name__ == "__main__":
    main()
