"""What sharing costs: tied stacks by rank, and experts by how many a token runs."""

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from msgspec import structs

from benchmarks.models import Model, models
from benchmarks.timing import table
from layerwise.core.adapters import nbytes_of
from layerwise.core.method import find
from layerwise.core.open import open_network
from layerwise.core.plan import DataSpec, Experts, Plan
from layerwise.core.quality import Quality
from layerwise.core.reader import samples_of
from layerwise.core.stats import Scores
from layerwise.core.visits import entries_of
from layerwise.jobs.contest import Contest
from layerwise.jobs.depth import units_to_drop
from layerwise.jobs.experts import convert_folder, without_routers
from layerwise.jobs.naive import naive_depth
from layerwise.jobs.request import identity
from layerwise.jobs.session import Budget, load_reader, texts_of
from layerwise.jobs.units import layer_bytes, visited

DOCUMENTS, LENGTH = 16, 256
ERRORS = "error", "error_held_out"
RANKS = (0, 4, 16, 48, 80, 112, 144, 256)


def main(
    names: Sequence[str] = ("demo", "second"), tables: Sequence[str] = ("ranks", "experts")
) -> None:
    """Print a table of ranks and one of experts for each model."""
    for model in (model for model in models() if model.name in names):
        spec = DataSpec(model.data, samples=64)
        plan = Plan(identity(open_network(model.folder)), target="compact", data=spec)
        contest = Contest(model.folder, plan, 0, ())
        texts = texts_of(spec)._replace(length=LENGTH)
        batches = samples_of(load_reader(contest.opened()), texts, "evaluate", DOCUMENTS)
        contest = contest._replace(batches=batches)
        for name in tables:
            {"ranks": _ranks, "experts": _experts}[name](model, contest)


def _ranks(model: Model, contest: Contest) -> None:
    """Half as many layers, by what is shared and by rank, and the best naive drop of that size."""
    plain = open_network(model.folder)
    name, depth, sizes = plain.stack.name, len(plain.stack.layers), layer_bytes(plain)
    rows: list[tuple[Any, ...]] = []
    drops: dict[int, Quality] = {}
    for pick in ("mean", "step", "lower"):
        for rank in RANKS if pick == "mean" else (0, 48):
            choose = find("tie", "stack").bind({"count": depth // 2, "pick": pick, "rank": rank})
            wiring = {name: entries_of(choose(plain.stack, Scores({}, "layer", "")))}
            edited = open_network(model.folder, wiring=wiring, dtype="float32")
            nbytes = plain.checkpoint.nbytes - sum(sizes.values())
            nbytes += sum(sizes[key] for key in set(visited(plain, wiring)))
            nbytes += sum(map(nbytes_of, edited.adapters.values()))
            before, after = contest.qualities(edited)
            cells: tuple[object, ...] = ("", "")
            if nbytes < plain.checkpoint.nbytes:
                count = units_to_drop(Budget(bytes=nbytes), plain)
                if count not in drops:
                    plan = Plan(contest.plan.model, target="compact", wiring=wiring)
                    naive = naive_depth(contest._replace(plan=plan, nbytes=nbytes))
                    assert naive is not None
                    drops[count] = naive.quality
                cells = f"{count}: {drops[count].estimate('kl')}", after.against(drops[count])
            rows.append((pick, rank, f"{nbytes:,}", *_told(after, before), *cells))
    header = ("shared", "rank", "bytes", "loss", "KL", "layers dropped: KL", "over it")
    table(f"Sharing, {model.name}: {depth} layers tied to {depth // 2}", header, rows)


def _experts(model: Model, contest: Contest) -> None:
    """Experts, and the same neurons for all tokens, by the share of parameters that runs."""
    rows: list[tuple[Any, ...]] = []
    for share in (0.75, 0.5):
        how = Experts(active=share)
        plan = structs.replace(contest.plan, experts=how)
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "experts"
            made = convert_folder(model.folder, out, plan)[1]
            before, after = contest.qualities(open_network(out, dtype="float32"))
        naive = contest.qualities(without_routers(contest.opened, plan))[1]
        active = sum(row["active_parameters"] for row in made)
        whole = sum(row["parameters"] for row in made)
        if not rows:
            rows.append(("dense", f"{whole:,}", *_told(before, before), "", "", ""))
        errors = [f"{sum(row[k] for row in made) / len(made):.3f}" for k in ERRORS]
        cells = (*_told(after, before), *errors, after.against(naive))
        rows.append((f"routed, {share:.1%}", f"{active:,}", *cells))
        rows.append((f"for all tokens, {share:.1%}", "", *_told(naive, before), "", "", ""))
    header = ("network", "active", "loss", "KL", "error", "held out", "KL over for all tokens")
    table(f"Experts, {model.name}: 8 a layer", header, rows)


def _told(own: Quality, original: Quality) -> tuple[str, str]:
    loss = own.estimate("loss")
    return str(loss), "" if own is original else str(own.estimate("kl"))


if __name__ == "__main__":
    main(sys.argv[1:2] or ("demo",), sys.argv[2:] or ("ranks", "experts"))
