"""What sharing costs: tied stacks by rank, and experts by how many a token runs."""

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
from layerwise.jobs.experts import convert_folder, sliced
from layerwise.jobs.naive import Contest, naive_depth
from layerwise.jobs.request import identity
from layerwise.jobs.session import load_reader, texts_of
from layerwise.jobs.units import layer_bytes, visited

DOCUMENTS, LENGTH = 16, 256
RANKS = (0, 4, 16, 48, 80, 112, 144, 256)


def main(names: Sequence[str] = ("demo", "second")) -> None:
    """Print a table of ranks and one of experts for each model."""
    for model in (model for model in models() if model.name in names):
        spec = DataSpec(model.data, samples=16)
        plan = Plan(identity(open_network(model.folder)), target="compact", data=spec)
        contest = Contest(model.folder, plan, 0, ())
        texts = texts_of(spec)._replace(length=LENGTH)
        batches = samples_of(load_reader(contest.opened()), texts, "evaluate", DOCUMENTS)
        contest = contest._replace(batches=batches)
        _ranks(model, contest)
        _experts(model, contest)


def _ranks(model: Model, contest: Contest) -> None:
    """Half as many layers, by what is shared and by rank, and the best naive drop of that size."""
    plain = open_network(model.folder)
    name, depth, sizes = plain.stack.name, len(plain.stack.layers), layer_bytes(plain)
    rows: list[tuple[Any, ...]] = []
    for pick in ("mean", "step", "lower"):
        for rank in RANKS if pick == "mean" else (0, 48):
            choose = find("tie", "stack").bind({"count": depth // 2, "pick": pick, "rank": rank})
            wiring = {name: entries_of(choose(plain.stack, Scores({}, "layer", "")))}
            edited = open_network(model.folder, wiring=wiring, dtype="float32")
            nbytes = plain.checkpoint.nbytes - sum(sizes.values())
            nbytes += sum(sizes[key] for key in set(visited(plain, wiring)))
            nbytes += sum(map(nbytes_of, edited.adapters.values()))
            before, after = contest.qualities(edited)
            naive: Any = ("", "")
            if nbytes < plain.checkpoint.nbytes:
                plan = Plan(contest.plan.model, target="compact", wiring=wiring)
                other = naive_depth(contest._replace(plan=plan, nbytes=nbytes))
                if other is not None:
                    against = after.against(other.quality)
                    naive = other.quality.estimate("kl"), against
            rows.append((pick, rank, f"{nbytes:,}", *_told(after, before), *naive))
    header = ("shared", "rank", "bytes", "loss", "KL", "KL of the best naive drop", "over it")
    title = f"Sharing, {model.name}: {depth} layers tied to {depth // 2}"
    table(title, header, rows)


def _experts(model: Model, contest: Contest) -> None:
    """Experts, and the largest neurons alone, by the share of parameters that runs."""
    rows: list[tuple[Any, ...]] = []
    for share in (0.875, 0.75, 0.5):
        how = Experts(active=share)
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "experts"
            plan = Plan(contest.plan.model, target="compact", data=contest.plan.data, experts=how)
            made = convert_folder(model.folder, out, plan)[1]
            edited = open_network(out, dtype="float32")
            before, after = contest.qualities(edited)
        naive = contest.qualities(sliced(contest.opened(), share))[1]
        active = sum(row["active_parameters"] for row in made)
        whole = sum(row["parameters"] for row in made)
        held = sum(row["error_held_out"] for row in made) / len(made)
        seen = sum(row["error"] for row in made) / len(made)
        if not rows:
            rows.append(("dense", f"{whole:,}", *_told(before, before), "", "", ""))
        cells = f"{seen:.3f}", f"{held:.3f}", after.against(naive)
        rows.append((f"experts, {share:.1%}", f"{active:,}", *_told(after, before), *cells))
        kept = f"largest neurons, {share:.1%}"
        rows.append((kept, f"{int(share * whole):,}", *_told(naive, before), "", "", ""))
    header = ("network", "active", "loss", "KL", "error", "held out", "KL over the neurons'")
    table(f"Experts, {model.name}: 8 a layer", header, rows)


def _told(own: Quality, original: Quality) -> tuple[str, str]:
    loss = own.estimate("loss")
    return str(loss), "" if own is original else str(own.estimate("kl"))


if __name__ == "__main__":
    main(sys.argv[1:] or ("demo",))
