"""What each score and allocator reaches with the same solver at the same bytes, on both models.

python -m benchmarks.allocation             both models, four budgets
python -m benchmarks.allocation demo 3.0    one model, one mean of bits
"""

import sys
from collections.abc import Sequence

from benchmarks.models import Model, models
from benchmarks.timing import table
from layerwise.core.data import Texts
from layerwise.core.open import open_network
from layerwise.core.plan import DataSpec, Plan
from layerwise.core.reader import samples_of
from layerwise.export import PACKED
from layerwise.jobs.bits import plan_bits, scores_of
from layerwise.jobs.contest import Contest
from layerwise.jobs.request import Request, identity
from layerwise.jobs.session import Budget, load_reader, silent

BUDGETS = (2.25, 3.0, 3.5, 4.0)
#: allocator, score, solver; the first one is what all others are compared with
WAYS = (
    ("uniform", "", "gptq on full ranges"),
    ("uniform", "", "gptq"),
    ("uniform", "", "qep+gptq"),
    ("knapsack", "sensitivity", "qep+gptq"),
    ("knapsack", "sensitivity", "gptq"),
    ("knapsack", "linearity", "gptq"),
    ("knapsack", "interactions", "gptq"),
    ("knapsack", "fisher", "gptq"),
    ("knapsack", "trial_error", "gptq"),
    ("waterfill", "trial_error", "gptq"),
    ("waterfill", "sensitivity", "gptq"),
    ("knapsack", "lim", "gptq"),
    ("knapsack", "zd", "gptq"),
    ("threshold", "lim", "gptq"),
    ("threshold", "zd", "gptq"),
)


def main(words: Sequence[str] = ()) -> None:
    """Print a table per model, or of what is named."""
    budgets = tuple(float(word) for word in words if word[0].isdigit()) or BUDGETS
    named = [model for model in models() if model.name in words]
    for model in named or models():
        compare(model, budgets)


def compare(
    model: Model, budgets: Sequence[float] = BUDGETS, documents: int = 48, length: int = 256
) -> None:
    """KL of every way at every budget, with its ratio to uniform bits."""
    data = DataSpec(source=model.data, samples=64, length=256)
    texts = Texts(model.data, 0, 0, length)
    network = open_network(model.folder)
    batches = samples_of(load_reader(network), texts, "evaluate", documents)
    contest = Contest(model.folder, Plan(identity(network)), 0, batches)
    rows, known = [], {}  # a score is the same for every budget and solver
    for bits in budgets:
        base = None
        for allocator, score, method in WAYS:
            full = {"gptq": {"shrink": False}} if method.endswith("full ranges") else {}
            request = Request(
                model.folder,
                Budget(bits=bits),
                method=method.partition(" ")[0],
                allocator=allocator,
                score=score,
                data=data,
                settings=full,
            )
            if score and score not in known:
                known[score] = scores_of(request, network, PACKED, silent)
            planned = plan_bits(request, network, PACKED, silent, known.get(score))
            found = contest.solved(planned.plan)
            base = found if base is None else base
            ratio = found.against(base, "kl")
            way = f"{allocator}, {score}" if score else allocator
            rows.append((bits, way, method, f"{planned.nbytes:,}", found.estimate("kl"), ratio))
            print(*rows[-1], file=sys.stderr, flush=True)
    header = ("bits", "allocator, score", "solver", "bytes", "KL (nats/token)", "over the first")
    table(f"Allocators, {model.name} model", header, rows)


if __name__ == "__main__":
    main(sys.argv[1:])
