"""How few bits a KL can be had with, by the order that allocators go by.

python -m benchmarks.within                  both models, KL 0.05
python -m benchmarks.within demo 0.05 0.1    one model, other bounds
"""

import sys
from collections.abc import Sequence

from benchmarks.models import Model, models
from benchmarks.timing import table
from layerwise.core.plan import DataSpec
from layerwise.jobs.plan import make_plan
from layerwise.jobs.request import Request
from layerwise.jobs.session import Budget

#: allocator and score; all but the last two go by an order, these are exact
WAYS = (
    ("uniform", ""),
    ("threshold", "fisher"),
    ("threshold", "sensitivity"),
    ("threshold", "interactions"),
    ("knapsack", "sensitivity"),
    ("knapsack", "interactions"),
)


def compared(model: Model, bound: float) -> None:
    """A row per way: bits, bytes, the KL that was measured, and how many plans that took."""
    rows = []
    for allocator, score in WAYS:
        data = DataSpec(model.data, 0, 32, 256)
        request = Request(model.folder, Budget(kl=bound), score=score, allocator=allocator)
        planned = make_plan(request._replace(data=data))
        taken = next(row for row in planned.edge if row["chosen"])
        bits, kl = f"{planned.bits or 16:.3f}", f"{taken['expected']:.4f}, to {taken['high']:.4f}"
        rows.append((allocator, score, bits, f"{planned.nbytes:,}", kl, len(planned.edge)))
        print(*rows[-1], file=sys.stderr, flush=True)
    header = ("allocator", "score", "bits", "bytes", "KL (nats/token)", "plans measured")
    table(f"The smallest plan within a KL of {bound}, {model.name} model", header, rows)


def main(words: Sequence[str] = ()) -> None:
    """Print a table per model and bound."""
    named = [model for model in models() if model.name in words]
    bounds = [float(word) for word in words if word[0].isdigit()] or [0.05]
    for model in named or models():
        for bound in bounds:
            compared(model, bound)


if __name__ == "__main__":
    main(sys.argv[1:])
