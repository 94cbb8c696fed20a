"""What every command has: its place on the command line, its output, and how it ends."""

import gc
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Annotated, Any

import typer

from layerwise import __version__

if "OMP_WAIT_POLICY" not in os.environ:  # before torch starts its threads
    # idle ones spin for microseconds, not milliseconds: others on these cores read and write
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
gc.set_threshold(10_000)  # looking for cycles took a tenth of the time to import torch

app = typer.Typer(
    name="layerwise",
    help="Open any deep network as a stack of layers: see what every layer does, decide what "
    "every layer gets under one budget, apply it, and prove what it cost.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.callback(help=app.info.help)
def taking(
    trust: Annotated[
        str, typer.Option(help="Risks to take for a model that you trust: pickles, code.")
    ] = "",
) -> None:
    """What holds for every command."""
    if trust:
        from layerwise.core.trust import trust as allow

        with telling():
            allow(trust.split(","))


class Output:
    """What a command found, printed at its end as a table or as one JSON object."""

    def __init__(self, command: str, model: str, as_json: bool, settings: dict[str, Any]) -> None:
        self.command, self.model, self.as_json = command, model, as_json
        self.settings = settings
        self.began = time.monotonic()
        self.rows: list[dict[str, Any]] = []
        self.files: list[str] = []
        self.warnings: list[str] = []
        self.more: dict[str, Any] = {}

    def table(self, title: str, rows: list[dict[str, Any]], *columns: str) -> None:
        """Show a table; the last one is the command's own."""
        self.rows = rows
        if not self.as_json:
            from layerwise.report.terminal import print_table

            print_table(title, rows, columns)

    def say(self, line: str) -> None:
        """A line for people."""
        if not self.as_json:
            typer.echo(line)

    def as_dict(self) -> dict[str, Any]:
        """The object that `--json` prints."""
        import msgspec

        from layerwise.report.answer import Answer

        answer = Answer(
            layerwise=__version__,
            command=self.command,
            model=self.model,
            settings=self.settings,
            rows=self.rows,
            files=self.files,
            warnings=self.warnings,
            seconds=round(time.monotonic() - self.began, 3),
            more=self.more,
        )
        return msgspec.to_builtins(answer)

    def end(self, last: str) -> None:
        """Close with one line that says where the result is."""
        for warning in self.warnings:
            typer.echo(f"warning: {warning}", err=True)
        if self.as_json:
            typer.echo(json.dumps(self.as_dict()))
        else:
            typer.echo(last)


class Stopped(KeyboardInterrupt):
    """The user, or the system, ended the command by a signal."""


def _stop(number: int, frame: object) -> None:
    raise Stopped(number)


@contextmanager
def telling() -> Iterator[None]:
    """Turn an error that a user can mend into one line and exit status 2."""
    from layerwise.core.errors import LayerwiseError
    from layerwise.core.machine import told

    try:
        yield
    except LayerwiseError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    except (OSError, MemoryError) as error:
        known = told(error)
        if known is None:
            raise
        typer.echo(f"error: {known}", err=True)
        raise typer.Exit(2) from None
    except Stopped as stopped:
        typer.echo("stopped; the same command goes on where it was", err=True)
        raise typer.Exit(128 + stopped.args[0]) from None


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Register a command that ends as `telling` has it, also when it is stopped."""

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> None:
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
        signal.signal(signal.SIGTERM, _stop)
        signal.signal(signal.SIGINT, _stop)
        with telling():
            function(*args, **kwargs)

    return app.command()(run)


def quiet() -> None:
    """Keep other libraries' progress bars and advice off the terminal."""
    os.environ["TQDM_DISABLE"] = "1"
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        from loguru import logger

        logger.disable("compressed_tensors")
    except ImportError:
        pass
