"""What layer ratios and solvers reach at the same zeros, and ranks beside bits at the same bytes.

python -m benchmarks.sparsity                  both tables, both models
python -m benchmarks.sparsity --few            less text and fewer documents
python -m benchmarks.sparsity demo ratios      one model, one of the tables: ratios or ranks
"""

import sys
from collections.abc import Sequence
from typing import Any

from msgspec import structs

from benchmarks.models import models
from benchmarks.solvers import Bench
from benchmarks.timing import table
from layerwise.core.plan import Edit, Plan, Step
from layerwise.export import TARGETS
from layerwise.jobs.bits import plan_bits
from layerwise.jobs.request import Request
from layerwise.jobs.scoring import make_scores
from layerwise.jobs.session import Budget, silent

SPARSITIES = (0.5, 0.6, 0.7)
SOLVERS = ("magnitude", "wanda", "sparsegpt")
#: what ratios are known as, allocator, score, and what is set
RATIOS: tuple[tuple[str, str, str, dict[str, Any]], ...] = (
    ("uniform", "uniform", "", {}),
    ("LAMP", "global_threshold", "", {}),
    ("OWL", "spread_ratios", "outlier_share", {}),
    ("DLP", "spread_ratios", "median_share", {"spread_ratios": {"width": 0.15}}),
    ("ECoFLaP", "proportional", "directional_change", {"directional_change": {"draws": 2}}),
    ("measured", "knapsack", "sensitivity", {"sensitivity": {"trial": "magnitude"}}),
)
#: shares in steps of 2%
SHARES = {"menu": {"share": [i / 50 for i in range(1, 50)]}}
SIZES = (2.5, 3.0)
#: what is compared at the same bytes, and by which methods; others go by the first
MENUS = (
    ("bits, uniform", "uniform", "gptq"),
    ("bits", "knapsack", "gptq"),
    ("ranks", "knapsack", "low_rank"),
    ("quantized factors", "knapsack", "quantized_factors"),
    ("bits or quantized factors (MLoRQ)", "knapsack", "gptq,quantized_factors"),
    ("bits, or bits beside ranks", "knapsack", "gptq,gptq+low_rank"),
    ("bits or zeros", "knapsack", "gptq,sparsegpt"),
)


def solved_by(plan: Plan, method: str) -> Plan:
    """The same shares, by another method."""
    edits = (
        Edit(edit.select, (Step(method, {"share": edit.chain[0].options["share"]}),))
        for edit in plan.edits
    )
    return structs.replace(plan, edits=tuple(edits))


def ratios(bench: Bench) -> None:
    """KL of every ratio, sparsity and solver, with its ratio to the same share everywhere."""
    found = {}
    for what, allocator, score, settings in RATIOS:
        request = Request(
            bench.model.folder,
            Budget(),
            "hf",
            "magnitude",
            score,
            allocator,
            data=bench.data,
            settings=SHARES | settings,
        )
        scores = make_scores(request, bench.network, score, silent) if score else None
        for zeros in SPARSITIES:
            asked = request._replace(budget=Budget(sparsity=zeros))
            plan = plan_bits(asked, bench.network, TARGETS["hf"], silent, scores).plan
            for method in SOLVERS:
                quality = bench.measure(solved_by(plan, method))[0]
                found[zeros, method, what] = quality
                print(zeros, method, what, quality.estimate("kl"), file=sys.stderr, flush=True)
    rows = []
    for zeros in SPARSITIES:
        for method in SOLVERS:
            for what, *_ in RATIOS:
                own, base = found[zeros, method, what], found[zeros, method, "uniform"]
                figures = str(own.estimate("kl")), str(own.against(base, "kl"))
                rows.append((f"{zeros:.0%}", method, what, *figures))
    header = ("zeros", "solver", "ratios", "KL (nats/token)", "over uniform")
    table(f"Sparsity, {bench.model.name} model", header, rows)


def ranks(bench: Bench) -> None:
    """KL of every menu at every size, in the bytes of the target `compact`."""
    menu = {"menu": {"group": [128], "share": [0.05, *(i / 10 for i in range(1, 10))]}}
    request = Request(bench.model.folder, Budget(), "compact", data=bench.data, settings=menu)
    scores = make_scores(request, bench.network, "sensitivity", silent)
    rows = []
    for size in SIZES:
        base = None
        for what, allocator, method in MENUS:
            asked = request._replace(budget=Budget(bits=size), method=method, allocator=allocator)
            planned = plan_bits(asked, bench.network, TARGETS["compact"], silent, scores)
            found = bench.measure(planned.plan)[0]
            base = found if base is None else base
            figures = str(found.estimate("kl")), str(found.against(base, "kl"))
            rows.append((size, what, f"{planned.nbytes:,}", *figures))
            print(*rows[-1], file=sys.stderr, flush=True)
    header = ("bits", "menu", "bytes", "KL (nats/token)", "over uniform bits")
    table(f"Ranks beside bits, {bench.model.name} model", header, rows)


def main(few: bool = False, only: Sequence[str] = ()) -> None:
    """Print both tables per model; `only` names models and tables."""
    for model in models():
        if {"demo", "second"} & {*only} and model.name not in only:
            continue
        bench = Bench(model, *((16, 24, 128) if few else (64, 48, 256)))
        for name, compare in (("ratios", ratios), ("ranks", ranks)):
            if not {"ratios", "ranks"} & {*only} or name in only:
                compare(bench)


if __name__ == "__main__":
    main("--few" in sys.argv, sys.argv[1:])
