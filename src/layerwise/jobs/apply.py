"""Apply a plan: solve, write under a temporary name, give the folder its name when complete."""

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor

from layerwise.core.absent import silenced, unstored
from layerwise.core.errors import LayerwiseError, first_few
from layerwise.core.fan import Engine
from layerwise.core.find_experts import without_experts
from layerwise.core.fold import save_folds
from layerwise.core.journal import Journal
from layerwise.core.lockstep import walk
from layerwise.core.machine import check_disk, check_memory
from layerwise.core.method import find
from layerwise.core.network import Network
from layerwise.core.open import open_network, unrolled, widened
from layerwise.core.plan import Plan, chains_of, label
from layerwise.core.reader import windows
from layerwise.core.shards import write_safetensors
from layerwise.core.stack import Layer
from layerwise.core.stops import Batch
from layerwise.core.target import as_read, stored_dense
from layerwise.core.task import config_value, example_inputs, token_rows
from layerwise.core.visits import each_once, folded
from layerwise.core.weight import Weight
from layerwise.export import TARGETS
from layerwise.export._writer import Finished
from layerwise.jobs.admit import check_plan
from layerwise.jobs.checks import CHECK, CHECKED, must_be_sound, out_of_place, too_large
from layerwise.jobs.engine import must_run
from layerwise.jobs.fates import experts_told, labels_of
from layerwise.jobs.forecast import disk_to_apply, memory_to_rewrite, memory_to_solve
from layerwise.jobs.imatrix import given_by
from layerwise.jobs.rewrite import as_rewritten, must_keep, rewrite
from layerwise.jobs.session import Progress, check_new, load_reader, silent, texts_of
from layerwise.jobs.solve import needs_of, put_outside, solve
from layerwise.jobs.stock import streamed


class Applied(NamedTuple):
    """What came of applying a plan: the folder, its bytes, a row per layer, and any warnings.

    `rewrites` says of every layer what was folded into it, and what could not be.
    """

    folder: Path
    nbytes: int
    rows: list[dict[str, Any]]
    warnings: list[str]
    rewrites: Sequence[dict[str, Any]] = ()


def apply_plan(
    model: str | Path,
    plan: Plan,
    out: Path,
    *,
    device: str = "auto",
    dtype: str = "auto",
    other_weights: bool = False,
    check: bool = True,
    engine: Engine = Engine(),
    progress: Progress = silent,
) -> Applied:
    """Apply a plan to a checkpoint and write the result.

    The journal lies beside `out` until the folder is complete; a job that was stopped goes on
    from it and ends with the same bytes.

    Args:
        model: the checkpoint that the plan was made for.
        plan: what every layer gets.
        out: the folder to write; it must not exist.
        device: where to compute.
        dtype: in which type to compute.
        other_weights: allow weights that differ from those the plan was made for.
        check: reload the result by stock transformers before it gets its name.
        engine: where matrices are solved.
        progress: called with what is done, how far, and out of how much.

    Raises:
        LayerwiseError: the plan is for another model, names nothing, cannot be held by its
            target, does not fit in memory or on disk, or `out` exists; or the result computes
            something else when stock transformers loads it.
    """
    check_new(out)
    trained = plan.heal or plan.experts
    if trained:
        raise LayerwiseError(
            "plan, heal and experts",
            allowed="a plan without, for `layerwise.jobs.apply.apply_plan`",
            found=f"{trained.steps} steps",
            fix="call `layerwise.apply_plan`",
        )
    plain = opened_for(model, plan, device=device, dtype=dtype)
    target = check_plan(plain, plan, other_weights)
    network = target.folded(plain)
    given = given_by(network, plan.export.get("imatrix", ""))
    needs = [] if given else needs_of(plan.edits)
    asked = needs or plan.rewrites
    batches = windows(load_reader(network), texts_of(plan.data), "calibrate") if asked else []
    part, journal_folder = beside(out, "part"), beside(out, "journal")
    rewriting = memory_to_rewrite(network, plan.rewrites)
    check_memory(memory_to_solve(network, batches, needs) | rewriting)
    if not journal_folder.exists():
        check_disk(out.parent, disk_to_apply(as_rewritten(network, plan.rewrites), plan))
    batch = own_batch(network, plan)
    if network is not plain:
        must_keep(plain, network, batch, f"target {plan.target}", "use --target hf")
    with Journal(journal_folder, job_of(network, plan, batches, given)) as journal:
        done = rewrite(network, plan, batches, journal, progress)
        network = done.network
        outside = target.outside(network, plan.export)
        put_outside(network, outside)
        solver = solve(network, plan.edits, batches, journal, progress, engine, given)
        if part.exists():
            shutil.rmtree(part)
        rounded = partial(stored_dense, network.stored.dtype)
        records = solver.finished if target.by_bits else lambda la: rounded(solver.finished(la))
        read = partial(as_read, target, network.stored.dtype)
        layers = passing(network, records, batch, part / CHECK, progress, outside, read)
        export = find(plan.target, "export").bind(
            plan.export, network=network, layers=layers, outside=outside
        )
        nbytes = export(network.stack, plan, part)
        if target.engine == "layerwise" and not all(map(each_once, plan.wiring.values())):
            note_answer(open_network(model, wiring=plan.wiring, dtype="float32"), batch, part)
        plan.save(part / "plan.yaml")
        save_folds(part, done.folds)
        made = solver.reports
        rows = [layer_row(network, la, plan, made.get(la.key, {})) for la in network.layers()]
        unseen = [key for report in made.values() for key in report["unseen"]]
        warnings = [without_data(unseen)] if unseen else []
        if check:
            sound = must_run if target.engine == "llama.cpp" else must_be_sound
            warnings += too_large(network) or [
                *sound(part, network, batch),
                *out_of_place(network),
            ]
        os.replace(part, out)
        journal.remove()
    return Applied(out, nbytes, rows, warnings, done.rows)


def opened_for(model: str | Path, plan: Plan, device: str = "auto", dtype: str = "auto") -> Network:
    """The network whose layers are written: in the plan's order, or each once beside it.

    An order in which every layer runs once at most is kept, so that edits are solved in it.
    """
    if plan.target not in TARGETS or not TARGETS[plan.target].once:
        ordered = open_network(model, wiring=plan.wiring, device=device, dtype=dtype)
        return without_experts(unrolled(ordered), plan.units)
    wiring = {
        name: order if each_once(order) else folded(order)[0] for name, order in plan.wiring.items()
    }
    return open_network(model, wiring=wiring, device=device, dtype=dtype)


def note_answer(network: Network, batch: Batch, folder: Path) -> None:
    """Keep what the network answers in its order, for whoever reloads the folder."""
    with streamed(network, [batch], read=token_rows) as answers:
        found = answers(batch).float().cpu().contiguous()
    write_safetensors(folder / CHECK, {**batch, CHECKED: found})


def job_of(
    network: Network,
    plan: Plan,
    batches: Sequence[Batch],
    given: Mapping[str, Mapping[str, Any]] = {},
) -> dict[str, Any]:
    """All that the bytes of a result depend on; a job that goes on must find it unchanged."""
    return {
        "plan": plan.to_yaml(),
        "weights": network.checkpoint.weights,
        "data": digest_of([*batches, *given.values()]),
        "device": str(network.device),
        "dtype": str(network.dtype),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def without_data(unseen: Sequence[str]) -> str:
    """A warning that names matrices which no token of the data came to."""
    return (
        f"no data came to {first_few(unseen)}: solved without statistics; give more or other data, "
        "or keep them with --keep"
    )


def own_batch(network: Network, plan: Plan) -> Batch:
    """A short input of the user's data, without labels; made up where the model reads none."""
    try:
        texts = texts_of(plan.data)._replace(samples=1, length=32)
        batch = windows(load_reader(network), texts, "calibrate")[0]
    except LayerwiseError:
        batch = example_inputs(network.module)
        pad = config_value(network.module.config, "pad_token_id")
        if "input_ids" in batch and isinstance(pad, int):  # which some models give no position
            batch["input_ids"].masked_fill_(batch["input_ids"] == pad, int(pad == 0))
    return {name: tensor for name, tensor in batch.items() if name != "labels"}


def digest_of(batches: Sequence[Batch]) -> str:
    """sha256 of the data that matrices are solved with."""
    found = hashlib.sha256()
    for batch in batches:
        for name, tensor in sorted(batch.items()):
            found.update(name.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def passing(
    network: Network,
    records: Callable[[Layer], Mapping[str, Weight]],
    batch: Batch,
    check: Path,
    progress: Progress = silent,
    outside: Mapping[str, Weight] = {},
    read: Callable[[Layer, Mapping[str, Weight]], Mapping[str, Weight]] = lambda layer, made: made,
) -> Iterator[Finished]:
    """Every layer once, on the way of one batch through the edited network.

    `read` makes of records what a reader makes of them. The batch and the answer to it are written
    to `check`, for whoever reloads the folder. It is held in float32: the weights as they are
    written, computed as a float32 reload computes.
    """
    wide = widened(network)
    put_outside(wide, outside)
    found: list[Tensor] = []
    made: dict[str, Mapping[str, Weight]] = {}
    total = len(network.layers())
    finish = lambda i, clean, output: found.append(token_rows(output, batch))  # noqa: E731
    for stop in walk(wide, [batch], finish=finish):
        layer = stop.layer
        if stop.kind != "enter":
            continue
        first = layer.key not in made
        made[layer.key] = records(layer)
        stop.substitute_all(read(layer, made[layer.key]))
        if first:
            yield _finished(network, layer, made[layer.key])
            progress("writing layers", len(made), total)
        made[layer.key] = {}
    write_safetensors(check, {**batch, CHECKED: found[0].float().cpu().contiguous()})


def _finished(network: Network, layer: Layer, records: Mapping[str, Weight]) -> Finished:
    """A layer as it is written; what its visit leaves out adds nothing in stock code."""
    tensors, visit = network.fetch(layer), network.visits.get(layer.path)
    if visit is None or visit.parts is None:
        return Finished(layer, tensors, records)
    zeros = silenced(layer, visit, tensors)
    own = {m.key for m in layer.matrices if zeros[m.parameter] is not tensors[m.parameter]}
    return Finished(layer, zeros, {key: made for key, made in records.items() if key not in own})


def beside(out: Path, what: str) -> Path:
    """A working folder next to the output, on the same file system."""
    return out.with_name(f".{out.name}.{what}")


def layer_row(network: Network, layer: Layer, plan: Plan, report: dict[str, Any]) -> dict[str, Any]:
    """What one layer got and what came true of it; `from` is its place in the original."""
    labels = labels_of(network, layer, plan)
    experts = experts_told(plan, network.original_key(layer))
    errors = list(report.get("errors", {}).values())
    return {
        "layer": layer.key,
        "from": network.origins.get(layer.path),
        "options": sorted({*labels.values(), *experts} - ({label(())} if experts else set())),
        "groups": {m.fusion: labels[m] for m in layer.matrices},
        "bytes": report.get("bytes"),
        "error": sum(errors) / len(errors) if errors else None,
        "seconds": report.get("seconds"),
    }


def preview(model: str | Path, plan: Plan, other_weights: bool = False) -> list[dict[str, Any]]:
    """What `apply_plan` would do: the checks of the plan, and a row per layer with exact bytes."""
    network = opened_for(model, plan)
    target = check_plan(network, plan, other_weights)
    size, rows, chain_of = network.stored.dtype.itemsize, [], chains_of(plan.edits)
    for layer in network.layers():
        gone = unstored(layer, network.visits.get(layer.path)) if target.once else []
        held = [m for m in layer.matrices if m not in gone]
        nbytes = sum(target.nbytes(m, chain_of(m), size) for m in held)
        rows.append(layer_row(network, layer, plan, {}) | {"bytes": nbytes})
    return rows
