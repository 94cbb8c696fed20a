"""What looking costs: one pass with measures over a plain forward of the same batches."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from benchmarks.timing import over, rounds, summary, table
from layerwise.core.data import Texts
from layerwise.core.method import methods
from layerwise.core.network import Network
from layerwise.core.open import open_network
from layerwise.core.reader import windows
from layerwise.core.stops import Batch
from layerwise.jobs.inspect import inspect_model
from layerwise.jobs.session import load_reader
from layerwise.jobs.wanted import MEASURES, Wanted, chosen, kind_of

#: documents for the table of single measures, and the default amount
SOME, ALL = 16, 128


def _forward(network: Network, batches: Sequence[Batch]) -> None:
    with torch.no_grad():
        for batch in batches:
            inputs = {k: v for k, v in batch.items() if k != "labels"}
            network.module(**inputs, use_cache=False)


def cheap(network: Network) -> tuple[str, ...]:
    """Everything that `all` is made of and that announces no cost of its own: no gradient, no
    second forward, no singular values of weights."""
    ready, _ = chosen(Wanted(("all",)), network, against=False)
    return tuple(m.name for m in ready if m.cost is None and kind_of(m) == "text")


def main() -> None:
    """Print the tables; the goal is 1.5 for everything without a cost of its own."""
    network = open_network("demo", dtype="float32").load()
    reader = load_reader(open_network("demo"))
    names = cheap(network)
    alone = {name: (name,) for name in (*names, "stream_moments", "token_sample", "spectrum")}
    alone |= {m.name: (m.name,) for m in methods("measure") if m.name.startswith("pooled")}
    together = {
        "the default measures": MEASURES,
        f"all {len(names)} without a cost of their own": names,
    }
    tables: list[tuple[int, int, dict[str, Any]]] = [(SOME, 3, alone), (ALL, 5, together)]
    for samples, repeats, wanted in tables:
        batches = windows(reader, Texts(samples=samples, length=512), "calibrate")
        tasks = {"plain forward": partial(_forward, network, batches)}
        for name, measures in wanted.items():
            tasks[name] = partial(inspect_model, network, batches, Wanted(measures))
        found = rounds(tasks, repeats=repeats)
        plain = found["plain forward"]
        rows = []
        for name, seconds in found.items():
            middle, spread = summary(seconds)
            rows.append((name, f"{middle:.2f} s", f"{spread:.2f}", over(seconds, plain)))
        title = f"Inspecting {samples} x 512 tokens, demo model, float32"
        table(title, ("what", "time", "spread", "of a forward, round by round"), rows)


if __name__ == "__main__":
    main()
