"""Tables and progress in a terminal; everything goes to stderr but the table itself."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from layerwise.core.machine import amount


@contextmanager
def progress_bar(quiet: bool) -> Iterator[Callable[[str, int, int], None]]:
    """A bar per kind of work, with the time left, on stderr."""
    if quiet:
        yield lambda what, done, total: None
        return
    columns = (
        TextColumn("{task.description:<24}"),
        BarColumn(bar_width=30),
        TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        tasks: dict[str, Any] = {}

        def tell(what: str, done: int, total: int) -> None:
            if what not in tasks or (done <= 1 and bar.tasks[tasks[what]].finished):
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done, total=total)

        yield tell


def show_bytes(count: float | None) -> str:
    """A cell of bytes: `3.71 MB`."""
    return "-" if count is None else amount(count)


def show(value: Any, digits: int = 4) -> str:
    """A cell: an interval, a number, a word."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if _is_interval(value):
        middle, low, high = value
        return f"{middle:.{digits}g} [{low:.{digits}g}, {high:.{digits}g}]"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return f"{value:.{digits}g}" if isinstance(value, float) else str(value)


def _is_interval(value: Any) -> bool:
    """A figure with the ends of its interval."""
    three = isinstance(value, list | tuple) and len(value) == 3
    return three and all(isinstance(x, int | float) for x in value)


_UNITS = {"loss": "loss (nats)", "kl": "KL (nats)", "prefill": "prefill /s", "decode": "decode /s"}


def print_table(title: str, rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> None:
    """A table of chosen columns, but those without any value; bytes and intervals in words."""
    table = Table(title=title, title_justify="left", header_style="bold", box=None, pad_edge=False)
    filled = [c for c in columns if any(row.get(c) is not None for row in rows)]
    for column in filled:
        numeric = any(isinstance(row.get(column), int | float) for row in rows)
        short = column.rpartition(".")[2]
        alone = sum(c.rpartition(".")[2] == short for c in filled) == 1
        name = short if alone else column.replace(".", " ")
        name = _UNITS.get(name, name.replace("_", " "))
        key = column in ("layer", "draft")
        side = "right" if numeric else "left"
        table.add_column(name, justify=side, overflow="fold", no_wrap=key)
    for row in rows:
        cells = [
            show_bytes(row.get(c)) if c in ("bytes", "memory") else show(row.get(c)) for c in filled
        ]
        table.add_row(*cells)
    Console(markup=False, highlight=False).print(table)
