"""What each solver and each step before it reaches, beside GPTQ at the same bits, on both models.

python -m benchmarks.solvers            all rows
python -m benchmarks.solvers --few      less text and fewer documents
python -m benchmarks.solvers demo 3     one of the two models, one number of bits
python -m benchmarks.solvers demo 3 awq smoothquant     the ways with one of these words
"""

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.models import Model, models
from benchmarks.timing import table
from layerwise.core.data import Texts
from layerwise.core.errors import LayerwiseError
from layerwise.core.journal import Journal
from layerwise.core.open import open_network, refolded
from layerwise.core.plan import DataSpec, Edit, Plan, Step
from layerwise.core.quality import Quality, measure_quality
from layerwise.core.reader import samples_of, windows
from layerwise.jobs.request import identity
from layerwise.jobs.rewrite import rewrite
from layerwise.jobs.session import load_reader, texts_of
from layerwise.jobs.solve import needs_of, solve
from layerwise.jobs.stock import streamed

BITS = (2, 3, 4)


class Way(NamedTuple):
    """A chain, under the name of what it is known as."""

    name: str
    chain: tuple[Step, ...]
    #: folded into the weights before
    rewrites: tuple[Step, ...] = ()
    #: leaves out what writes into the stream from the MLP, as the authors of QEP do
    spare: str = ""


def ways(bits: int) -> list[Way]:
    """GPTQ on full ranges first, as it was published: all others are compared with it."""
    grid: dict[str, Any] = {"bits": bits, "group": 128}
    gptq, rtn = Step("gptq", grid | {"shrink": False}), Step("rtn", grid)
    levels, rotate = 2**bits, Step("rotate")
    qep = (Step("qep"), gptq)
    found = [
        Way("gptq", (gptq,)),
        Way("gptq, ranges searched", (Step("gptq", grid),)),
        Way("qep (down too), gptq, ranges searched", (Step("qep"), Step("gptq", grid))),
        Way("rtn", (rtn,)),
        Way("qep, gptq", qep, spare="*/*/mlp.down"),
        Way("qep (down too), gptq", qep),
        Way("rotate, gptq", (rotate, gptq)),
        Way("token importance, gptq", (Step("token_importance"), gptq)),
        Way("rsq: rotate, token importance, gptq", (rotate, Step("token_importance"), gptq)),
        Way("awq: scale channels, rtn", (Step("scale_channels", grid), rtn)),
        Way("comq, scales too", (Step("comq", grid | {"scale_step": True}),)),
        Way("gptq, comq, scales too", (gptq, Step("comq", grid | {"scale_step": True}))),
        Way("higgs: rotate, gaussian", (rotate, Step("gaussian", {"levels": levels}))),
        Way(
            "higgs in pairs",
            (rotate, Step("gaussian", {"levels": levels**2, "dim": 2})),
        ),
        Way("higgs, refined", (rotate, Step("gaussian", {"levels": levels}), _feedback())),
        Way("learned offsets (auto-round)", (Step("learned_rounding", grid),)),
        Way("learned divisors (FlexRound)", (_learned(grid, "divisor"),)),
        Way("learned free offsets (AdaQuant)", (_learned(grid, "free"),)),
    ]
    found += folded(gptq, rtn, grid)
    if bits == 3:
        found += [
            Way("gptq, groups of 32", (Step("gptq", {"bits": 3, "group": 32, "shrink": False}),)),
            Way("trit planes", (Step("trit_planes"),)),
            Way("trit planes, refined", (Step("trit_planes"), _feedback())),
        ]
    return found


def folded(gptq: Step, rtn: Step, grid: dict[str, Any]) -> list[Way]:
    """The rewrites, before rounding and before GPTQ."""
    awq, smooth, turn = Step("awq"), Step("smoothquant"), Step("rotate_stream")
    norms, cut = Step("awq", {"inside": False}), Step("clip", grid)
    return [
        Way("folded awq, rtn", (rtn,), (awq,)),
        Way("folded awq behind norms only, rtn", (rtn,), (norms,)),
        Way("clip, rtn", (cut, rtn)),
        Way("folded awq, clip, rtn (as in AWQ's code)", (cut, rtn), (awq,)),
        Way("folded awq, gptq", (gptq,), (awq,)),
        Way("folded smoothquant, rtn", (rtn,), (smooth,)),
        Way("folded smoothquant, gptq", (gptq,), (smooth,)),
        Way("folded rotate_stream, rtn", (rtn,), (turn,)),
        Way("folded rotate_stream, gptq", (gptq,), (turn,)),
        Way("folded principal_axes, gptq", (gptq,), (Step("principal_axes"),)),
    ]


def _learned(grid: dict[str, Any], form: str) -> Step:
    return Step("learned_rounding", grid | {"form": form})


def _feedback() -> Step:
    return Step("refine", {"by": "feedback"})


class Bench:
    """One model, its text, and what the original answers."""

    def __init__(self, model: Model, samples: int, documents: int, length: int) -> None:
        self.model, self.network = model, open_network(model.folder)
        reader = load_reader(self.network)
        self.data = DataSpec(source=model.data, samples=samples, length=length)
        self.calibration = windows(reader, texts_of(self.data), "calibrate")
        texts = Texts(model.data, 0, 0, length)
        self.batches = samples_of(reader, texts, "evaluate", documents)
        self.sizes = sum(m.size for stack in self.network.stacks for m in stack.matrices())
        with streamed(self.opened(), self.batches) as answers:
            self.original = {id(batch): answers(batch) for batch in self.batches}

    def opened(self) -> Any:
        return open_network(self.model.folder, dtype="float32")

    def run(self, way: Way) -> tuple[Quality, float]:
        """Quality and stored bits per weight."""
        edits = [Edit("*", way.chain)]
        if way.spare:
            edits.append(Edit(way.spare, way.chain[1:]))
        plan = Plan(identity(self.network), rewrites=way.rewrites, edits=tuple(edits))
        found, nbytes = self.measure(plan)
        return found, 8 * nbytes / self.sizes

    def measure(self, plan: Plan) -> tuple[Quality, int]:
        """Quality under a plan, and the bytes of its records."""
        batches: Sequence[Any] = self.calibration if needs_of(plan.edits) else []
        network = open_network(self.model.folder)
        with tempfile.TemporaryDirectory() as folder, Journal(Path(folder), {}) as journal:
            folds = rewrite(network, plan, self.calibration, journal).folds
            solver = solve(refolded(network, folds), plan.edits, batches, journal)
            wide = refolded(self.opened(), folds)
            with streamed(wide, self.batches, solver.finished) as answers:
                before = self.original
                _, found = measure_quality(self.batches, lambda b: before[id(b)], answers)
            return found, sum(report["bytes"] for report in solver.reports.values())


def main(few: bool = False, only: Sequence[str] = ()) -> None:
    """Print a table per model; `only` names models, numbers of bits, and words of ways."""
    words = [w for w in only if w not in ("demo", "second", *map(str, BITS)) and w[0] != "-"]
    for model in models():
        if {"demo", "second"} & {*only} and model.name not in only:
            continue
        bench = Bench(model, *((16, 24, 128) if few else (64, 48, 256)))
        rows = []
        for bits in [b for b in BITS if str(b) in only] or BITS:
            base = None
            for way in ways(bits):
                if base is not None and words and not any(word in way.name for word in words):
                    continue
                try:
                    found, size = bench.run(way)
                except LayerwiseError as refused:
                    print(refused, file=sys.stderr)
                    rows.append((bits, way.name, "", "refused for this network", "", ""))
                    continue
                base = found if base is None else base
                rows.append((bits, way.name, f"{size:.3f}", *_figures(found, base)))
                print(rows[-1], file=sys.stderr, flush=True)
        header = ("bits", "chain", "stored bits", "KL (nats/token)", "over gptq", "loss - gptq's")
        table(f"Solvers, {model.name} model, groups of 128", header, rows)


def _figures(found: Quality, base: Quality) -> tuple[str, str, str]:
    kl, ratio, rise = found.estimate("kl"), found.against(base, "kl"), found.rise(base)
    return str(kl), str(ratio), str(rise)


if __name__ == "__main__":
    main("--few" in sys.argv, sys.argv[1:])
