"""What healing closes: plans of depth and the best naive one, before and after equal training.

python -m benchmarks.heal [demo|second [MODE ...]] [--steps=300]

Modes are adapters, full and layers; the last takes so many steps for each layer.
"""

import sys
import time
from collections.abc import Sequence

from msgspec import structs

from benchmarks.models import Model, models
from benchmarks.timing import table
from layerwise.core.open import open_network
from layerwise.core.plan import DataSpec, Heal, Plan
from layerwise.core.quality import Quality, ratio
from layerwise.core.reader import samples_of
from layerwise.jobs.contest import Contest
from layerwise.jobs.naive import healed_equally, naive_depth
from layerwise.jobs.plan import Request, make_plan
from layerwise.jobs.session import Budget, load_reader, silent, texts_of

DOCUMENTS, LENGTH = 48, 256
#: the share of the layers that stays
SHARE = 0.75
MODES = {
    "adapters": Heal(steps=0, rate=2e-3, samples=1024),
    "full": Heal(steps=0, mode="full", samples=1024),
    "layers": Heal(steps=0, mode="layers", samples=256),
}


def main(names: Sequence[str] = (), modes: Sequence[str] = (), steps: int = 300) -> None:
    """Print a table for each model; the goal is 0.9 of the best naive plan's rise of the loss."""
    every = max(1, steps // 3)
    chosen = [MODES[mode] for mode in modes or ("adapters",)]
    hows = [structs.replace(how, steps=steps, every=every) for how in chosen]
    for model in models():
        if not names or model.name in names:
            _table(model, hows)


def _table(model: Model, hows: Sequence[Heal]) -> None:
    data = DataSpec(model.data, samples=32, length=128)
    network = open_network(model.folder)
    depth = round(SHARE * len(network.stack.layers))
    planned = make_plan(Request(model.folder, Budget(depth=depth), target="hf", data=data))
    texts = texts_of(data)._replace(length=LENGTH)
    batches = samples_of(load_reader(network), texts, "evaluate", DOCUMENTS)
    contest = Contest(model.folder, planned.plan, planned.nbytes, batches)
    original = contest.qualities(contest.opened())[0]
    rows = []
    for how in (None, *hows):
        plan = structs.replace(planned.plan, heal=how)
        rows += _pair(contest._replace(plan=plan), original)
    header = ("plan", "healing", "KL", "rise of the loss", "rise / naive's", "seconds")
    words = f"{depth} of {len(network.stack.layers)} layers, {DOCUMENTS} documents"
    table(f"Healing the {model.name} model at {words}", header, rows)


def _pair(contest: Contest, original: Quality) -> list[tuple[object, ...]]:
    """The best naive plan and the searched one, both healed as the plan says, if at all."""
    plan, naive = contest.plan, naive_depth(contest)
    assert naive is not None
    edited, began = contest.opened(plan.wiring), time.monotonic()
    own = healed_equally(contest, edited, silent) if plan.heal else contest.qualities(edited)[1]
    seconds = f"{time.monotonic() - began:.0f}" if plan.heal else ""
    return [
        _row(naive.what, plan, naive.quality, original, naive.quality, ""),
        _row("greedy", plan, own, original, naive.quality, seconds),
    ]


def _row(
    name: str, plan: Plan, own: Quality, original: Quality, naive: Quality, seconds: str
) -> tuple[object, ...]:
    share = ratio(own.loss - original.loss, naive.loss - original.loss)
    how = f"{plan.heal.mode}, {plan.heal.steps} steps" if plan.heal else "none"
    return name, how, own.estimate("kl"), own.rise(original), share, seconds


if __name__ == "__main__":
    words = [word for word in sys.argv[1:] if not word.startswith("--steps=")]
    given = [int(word.removeprefix("--steps=")) for word in sys.argv[1:] if word not in words]
    main(words[:1], words[1:], *given[-1:])
