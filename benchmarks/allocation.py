"""What each score and allocator reaches with the same solver at the same bytes, on both models."""

from benchmarks.models import Model, models
from benchmarks.timing import table
from layerwise.core.data import Texts
from layerwise.core.open import open_network
from layerwise.core.plan import DataSpec, Plan
from layerwise.core.reader import samples_of
from layerwise.export import PACKED
from layerwise.jobs.bits import plan_bits
from layerwise.jobs.naive import Contest
from layerwise.jobs.request import Request, identity
from layerwise.jobs.session import Budget, load_reader, silent

BUDGETS = (2.5, 3.0, 4.0)
WAYS = (
    ("uniform", ""),
    ("knapsack", "sensitivity"),
    ("knapsack", "linearity"),
    ("knapsack", "interactions"),
    ("knapsack", "fisher"),
    ("knapsack", "trial_error"),
    ("waterfill", "trial_error"),
    ("waterfill", "sensitivity"),
    ("knapsack", "lim"),
    ("knapsack", "zd"),
    ("threshold", "lim"),
    ("threshold", "zd"),
)


def main() -> None:
    """Print a table per model."""
    for model in models():
        compare(model)


def compare(model: Model, documents: int = 48, length: int = 256) -> None:
    """KL of every way at every budget, with its ratio to uniform bits."""
    data = DataSpec(source=model.data, samples=64, length=256)
    texts = Texts(model.data, 0, 0, length)
    network = open_network(model.folder)
    batches = samples_of(load_reader(network), texts, "evaluate", documents)
    contest = Contest(model.folder, Plan(identity(network)), 0, batches)
    rows = []
    for bits in BUDGETS:
        base = None
        for allocator, score in WAYS:
            request = Request(
                model.folder, Budget(bits=bits), allocator=allocator, score=score, data=data
            )
            planned = plan_bits(request, network, PACKED, silent)
            found = contest.solved(planned.plan)
            base = found if base is None else base
            ratio = found.against(base, "kl")
            way = f"{allocator}, {score}" if score else allocator
            rows.append((bits, way, f"{planned.nbytes:,}", found.estimate("kl"), ratio))
    header = ("bits", "allocator, score", "bytes", "KL (nats/token)", "over uniform")
    table(f"Allocators, {model.name} model, GPTQ", header, rows)
