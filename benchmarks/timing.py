"""Interleaved repetitions, medians and spreads."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

#: the lines of every table so far
PRINTED: list[str] = []


def interleaved(
    tasks: Mapping[str, Callable[[], Any]], repeats: int = 7
) -> dict[str, tuple[float, float]]:
    """Seconds of each task: median and half the spread between the quartiles."""
    times: dict[str, list[float]] = {name: [] for name in tasks}
    for task in tasks.values():
        task()
    for _ in range(repeats):
        for name, task in tasks.items():
            began = time.perf_counter()
            task()
            times[name].append(time.perf_counter() - began)
    return {name: _summary(found) for name, found in times.items()}


def _summary(found: list[float]) -> tuple[float, float]:
    quarters = statistics.quantiles(found, n=4)
    return statistics.median(found), (quarters[2] - quarters[0]) / 2


def table(title: str, header: tuple[str, ...], rows: list[tuple[Any, ...]]) -> None:
    """Print a Markdown table."""
    lines = [f"\n## {title}\n", "| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    lines += ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
    print("\n".join(lines), flush=True)
    PRINTED.extend(lines)
