"""Interleaved repetitions, medians and spreads."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

#: the lines of every table so far
PRINTED: list[str] = []


def rounds(tasks: Mapping[str, Callable[[], Any]], repeats: int = 7) -> dict[str, list[float]]:
    """Seconds of each task in every round, after one that does not count."""
    times: dict[str, list[float]] = {name: [] for name in tasks}
    for task in tasks.values():
        task()
    for _ in range(repeats):
        for name, task in tasks.items():
            began = time.perf_counter()
            task()
            times[name].append(time.perf_counter() - began)
    return times


def interleaved(
    tasks: Mapping[str, Callable[[], Any]], repeats: int = 7
) -> dict[str, tuple[float, float]]:
    """Seconds of each task: median and half the spread between the quartiles."""
    return {name: summary(found) for name, found in rounds(tasks, repeats).items()}


def over(found: list[float], base: list[float]) -> str:
    """Median of a ratio taken round by round, and half the spread between its quartiles."""
    middle, spread = summary([a / b for a, b in zip(found, base, strict=True)])
    return f"{middle:.3f} ± {spread:.3f}"


def summary(found: list[float]) -> tuple[float, float]:
    """Median, and half the spread between the quartiles."""
    quarters = statistics.quantiles(found, n=4)
    return statistics.median(found), (quarters[2] - quarters[0]) / 2


def table(title: str, header: tuple[str, ...], rows: list[tuple[Any, ...]]) -> None:
    """Print a Markdown table."""
    lines = [f"\n## {title}\n", "| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    lines += ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
    print("\n".join(lines), flush=True)
    PRINTED.extend(lines)
