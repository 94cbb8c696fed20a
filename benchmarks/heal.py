"""What healing closes: plans of depth and the best naive one, before and after equal training."""

import time

from msgspec import structs

from benchmarks.timing import table
from layerwise.core.plan import DataSpec, Heal
from layerwise.core.quality import Quality, ratio
from layerwise.core.reader import samples_of
from layerwise.jobs.contest import Contest
from layerwise.jobs.naive import healed_equally, naive_depth
from layerwise.jobs.plan import Request, make_plan
from layerwise.jobs.session import Budget, load_reader, silent, texts_of

DEPTH, DOCUMENTS, LENGTH = 9, 48, 256
DATA = DataSpec(samples=32, length=128)
HOW = Heal(steps=300, rank=16, rate=2e-3, batch=4, samples=1024, length=128, every=100)


def main(scores: tuple[str, ...] = ("greedy",)) -> None:
    """Print the table; the goal is 0.9 of the best naive plan's rise of the loss."""
    rows = []
    original: Quality | None = None
    rivals: dict[bool, tuple[str, Quality]] = {}
    for score in scores:
        request = Request("demo", Budget(depth=DEPTH), target="hf", score=score, data=DATA)
        planned = make_plan(request)
        for how in (None, HOW):
            plan = structs.replace(planned.plan, heal=how)
            contest = Contest("demo", plan, planned.nbytes, ())
            texts = texts_of(DATA)._replace(length=LENGTH)
            batches = samples_of(load_reader(contest.opened()), texts, "evaluate", DOCUMENTS)
            contest = contest._replace(batches=batches)
            edited = contest.opened(plan.wiring)
            if original is None:
                original = contest.qualities(edited)[0]
            began = time.monotonic()
            own = healed_equally(contest, edited, silent) if how else contest.qualities(edited)[1]
            seconds = time.monotonic() - began if how else 0.0
            if bool(how) not in rivals:
                naive = naive_depth(contest)
                assert naive is not None
                rivals[bool(how)] = naive.what, naive.quality
                rows.append(_row(naive.what, how, naive.quality, original, naive.quality, 0.0))
            rows.append(_row(score, how, own, original, rivals[bool(how)][1], seconds))
    header = ("plan", "steps", "KL", "rise of the loss", "rise / naive's", "seconds")
    title = f"Healing the demo model at {DEPTH} of 12 layers, {DOCUMENTS} documents"
    table(title, header, sorted(rows, key=lambda row: row[1]))


def _row(
    name: str,
    how: Heal | None,
    own: Quality,
    original: Quality,
    naive: Quality,
    seconds: float,
) -> tuple[object, ...]:
    share = ratio(own.loss - original.loss, naive.loss - original.loss)
    steps, taken = how.steps if how else 0, f"{seconds:.0f}" if seconds else ""
    return name, steps, own.estimate("kl"), own.rise(original), share, taken


if __name__ == "__main__":
    main()
