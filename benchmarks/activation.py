"""What zeros in activations cost and save: LaRoSA beside what is simpler, and the time of it.

python -m benchmarks.activation            both models, and the times
python -m benchmarks.activation --few      less text and fewer documents
"""

import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.models import Model, models
from benchmarks.solvers import Bench
from benchmarks.timing import interleaved, table
from layerwise.core.errors import LayerwiseError
from layerwise.core.journal import Journal
from layerwise.core.network import Network
from layerwise.core.open import open_network, refolded
from layerwise.core.plan import Plan, Step
from layerwise.core.quality import Quality, measure_quality
from layerwise.jobs.activations import Met, activation_edits, measured_for, rotations
from layerwise.jobs.request import identity
from layerwise.jobs.rewrite import rewrite
from layerwise.jobs.stock import answers_of

LEVELS = (0.25, 0.4, 0.5)
FACTORS = {"stream": 0.8, "inner": 1.2}
#: what is compared, the method and its options; others go by the first
WAYS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("top-k of every token", "top_k", {"basis": "none"}),
    ("thresholds (TEAL)", "magnitude_threshold", {}),
    ("top-k, random rotations", "top_k", {"basis": "random"}),
    ("top-k, principal axes (LaRoSA)", "top_k", {"basis": "pca"}),
)
FOLDED = "top-k, one principal axes folded"


def compare(model: Model, few: bool) -> None:
    """KL at the same zeros, with the multiplications that are left."""
    bench = Bench(model, *((16, 24, 128) if few else (64, 48, 256)))
    network, turned = open_network(model.folder, dtype="float32").load(), _turned(bench)
    networks = {FOLDED: turned} if turned is not None else {}
    stats = {name: measured_for(network, bench.calibration, name) for _, name, _ in WAYS}
    rows = []
    for level in LEVELS:
        base = None
        for what, name, options in (*WAYS, (FOLDED, "top_k", {"basis": "none"})):
            if what == FOLDED and turned is None:
                continue
            own = networks.get(what, network)
            chosen = {"share": 1 - level, **FACTORS, **options}
            found, met = _quality(bench, own, stats[name], name, chosen)
            base = found if base is None else base
            left = met.left([m for stack in own.stacks for m in stack.matrices()])
            extra = rotations(own, name, chosen)
            figures = str(found.estimate("kl")), str(found.against(base, "kl"))
            saved = f"{1 - left:.1%}", f"{1 - left - extra:.1%}"
            rows.append((f"{level:.0%}", what, *saved, *figures))
            print(*rows[-1], file=sys.stderr, flush=True)
    counts = "multiplications saved", "less rotations"
    header = ("zeros", "way", *counts, "KL (nats/token)", "over top-k")
    table(f"Zeros in activations, {model.name} model", header, rows)


def _turned(bench: Bench) -> Network | None:
    """The network turned to the principal axes of its stream, where that can be folded in."""
    plan = Plan(identity(bench.network), rewrites=(Step("principal_axes"),))
    with tempfile.TemporaryDirectory() as folder, Journal(Path(folder, "journal"), {}) as journal:
        try:
            folds = rewrite(bench.network, plan, bench.calibration, journal).folds
        except LayerwiseError as error:
            print(error, file=sys.stderr)
            return None
    return refolded(bench.network, folds, exact=True).load()


def _quality(
    bench: Bench, network: Network, stats: Any, name: str, options: dict[str, Any]
) -> tuple[Quality, Met]:
    met = Met({}, {})
    edits = activation_edits(network, stats, name, options, met)
    with network.edited(edits):
        answers = answers_of(network.module)
        found = measure_quality(bench.batches, lambda b: bench.original[id(b)], answers)[1]
    return found, met


def times() -> None:
    """One token through a matrix: dense, by the rows of its kept entries, and rotated before."""
    rows = []
    for size in ((256, 704), (2048, 8192), (4096, 4096)):
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(size[1], size[0], generator=generator)  # [out, in]
        columns, axes = weight.T.contiguous(), torch.randn(size[0], size[0], generator=generator)
        x = torch.randn(size[0], generator=generator)
        tasks = {"dense": partial(torch.mv, weight, x)}
        for level in LEVELS:
            count = round((1 - level) * size[0])
            tasks[f"{level:.0%} top-k"] = partial(_gathered, x, columns, count)
            tasks[f"{level:.0%} rotated"] = partial(_gathered, x, columns, count, axes)
        found = interleaved(tasks, 21)
        dense = found["dense"][0]
        rows.append((f"{size[1]} x {size[0]}", *(f"{found[k][0] / dense:.2f}" for k in tasks)))
    names = [f"{level:.0%} {what}" for level in LEVELS for what in ("top-k", "rotated")]
    table("Time of one token over a dense product, float32", ("matrix", "dense", *names), rows)


def _gathered(x: Tensor, columns: Tensor, count: int, axes: Tensor | None = None) -> Tensor:
    """The product with those columns of a matrix alone, laid out as rows, that meet an entry."""
    turned = x if axes is None else x @ axes
    chosen = turned.abs().topk(count).indices
    return turned[chosen] @ columns[chosen]


def main(few: bool = False) -> None:
    """Print the tables."""
    for model in models():
        compare(model, few)
    times()


if __name__ == "__main__":
    main("--few" in sys.argv)
