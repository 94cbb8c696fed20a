"""Applies a plan in forks that are killed at random moments; run by test_resume.py.

Prints: kills, kills between the first and the last journal record, layers solved twice, and how
many of the resumed folders differ from an uninterrupted one.
"""

import os
import random
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import torch

torch.set_num_threads(1)

from layerwise.core.journal import Journal  # noqa: E402
from layerwise.core.open import open_network  # noqa: E402
from layerwise.core.plan import read_plan  # noqa: E402
from layerwise.jobs.apply import apply_plan, beside  # noqa: E402

write = Journal.write


def logged(log: Path):
    """Journal.write that notes every layer once its record is complete."""

    def replacement(self: Journal, layer: str, records: Mapping, report: Mapping) -> None:
        write(self, layer, records, report)
        with log.open("a") as file:
            file.write(layer + "\n")

    return replacement


def records(out: Path) -> int:
    """Finished layers in a journal."""
    journal = beside(out, "journal") / "journal.jsonl"
    return journal.read_bytes().count(b'{"layer"') if journal.exists() else 0


def attempt(model: str, plan: Path, out: Path, delay: float | None, first: int = 0) -> None:
    """One process, killed a while after its `first` record if `delay` is given."""
    child = os.fork()
    if child == 0:
        try:
            Journal.write = logged(out.with_suffix(".log"))
            apply_plan(model, read_plan(plan), out, check=False)  # that it reloads is tested apart
        finally:
            os._exit(0)
    if delay is not None:
        while records(out) < first and not out.exists():
            time.sleep(0.002)
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def main(model: str, plan: Path, folder: Path, kills: int) -> None:
    open_network(model)  # imports what the forks need
    began = time.time()
    attempt(model, plan, folder / "whole", None)
    whole = time.time() - began
    wanted = contents(folder / "whole")
    rng, trials, inside, twice, different = random.Random(0), 0, 0, 0, 0
    while trials < kills:
        out = folder / f"killed-{trials}"
        anywhere = trials % 6 == 0
        delay = rng.uniform(0.0, 0.9 if anywhere else 0.03) * whole
        attempt(model, plan, out, delay, first=0 if anywhere else rng.randint(1, 5))
        inside += not out.exists() and 0 < records(out) < 8
        if not out.exists():
            attempt(model, plan, out, None)
        solved = out.with_suffix(".log").read_text().split()
        twice += len(solved) - len(set(solved))
        different += contents(out) != wanted
        trials += 1
    print(trials, inside, twice, different)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]))
