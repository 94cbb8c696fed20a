"""Fewer layers, channels and heads under one size, against the best of each alone.

python -m benchmarks.dense                       both models, 60, 70 and 80% of the bytes
python -m benchmarks.dense demo 70               one model, one size
python -m benchmarks.dense demo 70 heal=200      healed equally as well
"""

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from msgspec import structs

from benchmarks.models import Model, models
from benchmarks.timing import table
from layerwise.core.errors import LayerwiseError
from layerwise.core.open import choose_device, open_network
from layerwise.core.plan import DataSpec, Heal, Plan, describe
from layerwise.core.quality import Quality
from layerwise.core.reader import samples_of
from layerwise.jobs.contest import Contest
from layerwise.jobs.heal import apply_healed
from layerwise.jobs.plan import make_plan
from layerwise.jobs.request import Planned, Request
from layerwise.jobs.session import Budget, load_reader, texts_of

DOCUMENTS, SIZES = 48, (60, 70, 80)
#: what is compared, and what the budget may take
WAYS = {
    "layers alone": ("bits",),
    "one width alone": ("width",),
    "layers and widths": ("width", "layer"),
}


def planned(model: Model, size: int, allow: tuple[str, ...]) -> Planned | None:
    """A plan of a size; none if there is none. Alone, the other widths are pinned."""
    data = DataSpec(model.data, 0, 64, 512)
    request = Request(model.folder, Budget(size=size / 100), "hf", data=data, allow=allow)
    if allow != ("width",):
        return _made(request)
    pinned = [request._replace(keep=(f"*/*/{part}.*",)) for part in ("attention", "mlp")]
    found = [plan for plan in map(_made, pinned) if plan is not None]
    return min(found, key=lambda p: min(row["expected"] for row in p.edge), default=None)


def _made(request: Request) -> Planned | None:
    try:
        return make_plan(request)
    except LayerwiseError:
        return None


def quality(model: Model, plan: Plan, healing: int) -> Quality:
    """What a plan comes to on the evaluate split, applied and, if so asked, healed."""
    network = open_network(model.folder)
    texts = texts_of(plan.data)._replace(length=256)
    batches = samples_of(load_reader(network), texts, "evaluate", DOCUMENTS)
    device = str(choose_device())
    heal = Heal(steps=healing, batch=8, samples=1024) if healing else None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "made"
        apply_healed(model.folder, structs.replace(plan, heal=heal), path, check=False)
        contest = Contest(model.folder, plan, 0, batches, device=device)
        return contest.qualities(contest._replace(model=path).opened())[1]


def compared(model: Model, size: int, healing: int) -> None:
    """A table: each alone and both, healed and not."""
    rows = []
    plans = {what: planned(model, size, allow) for what, allow in WAYS.items()}
    for steps in (0, healing) if healing else (0,):
        found = {w: quality(model, p.plan, steps) for w, p in plans.items() if p is not None}
        alone = [q for what, q in found.items() if what != "layers and widths"]
        best = min(alone, key=lambda q: q.estimate("kl").value, default=None)
        for what, own in found.items():
            made = plans[what]
            assert made is not None
            ratio = str(own.against(best, "kl")) if best else ""
            kl, nbytes = str(own.estimate("kl")), f"{made.nbytes / 1e6:.2f} MB"
            rows.append((f"{size}%", steps, what, describe(made.plan), nbytes, kl, ratio))
            print(*rows[-1], file=sys.stderr, flush=True)
    header = ("size", "healed", "may take", "plan", "bytes", "KL (nats/token)", "over best alone")
    table(f"Layers and widths under one size, {model.name} model", header, rows)


def main(words: Sequence[str] = ()) -> None:
    """Print a table per model and size."""
    chosen = {model.name: model for model in models()}
    healing = next((int(w.partition("=")[2]) for w in words if w.startswith("heal=")), 0)
    for model in [chosen[n] for n in words if n in chosen] or list(chosen.values()):
        for size in [int(w) for w in words if w.isdigit()] or SIZES:
            compared(model, size, healing)


if __name__ == "__main__":
    main(sys.argv[1:])
