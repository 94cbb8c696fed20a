"""Apply a plan: solve, write under a temporary name, give the folder its name when complete."""

import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from layerwise.core.checkpoint import write_safetensors
from layerwise.core.errors import LayerwiseError
from layerwise.core.lockstep import walk
from layerwise.core.method import find
from layerwise.core.network import Network, open_network
from layerwise.core.plan import Plan, chain_for, check_model, check_selectors, label
from layerwise.core.reader import windows
from layerwise.core.stack import Layer
from layerwise.core.target import Target
from layerwise.core.task import answer, example_inputs
from layerwise.core.weight import Weight
from layerwise.export import TARGETS
from layerwise.export._writer import Records
from layerwise.jobs.session import Progress, load_reader, silent, texts_of
from layerwise.jobs.solve import needs_of, solve

#: an input and the answer computed while the folder was written, for whoever reloads it
CHECK = "layerwise.check"
CHECKED = "layerwise.answer"


class Applied(NamedTuple):
    """What came of applying a plan: the folder, its bytes, and a row per layer."""

    folder: Path
    nbytes: int
    rows: list[dict[str, Any]]


def apply_plan(
    model: str | Path,
    plan: Plan,
    out: Path,
    *,
    device: str = "auto",
    dtype: str = "auto",
    other_weights: bool = False,
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
        progress: called with what is done, how far, and out of how much.

    Raises:
        LayerwiseError: the plan is for another model, names nothing, cannot be held by its
            target, or `out` exists.
    """
    if out.exists():
        raise LayerwiseError(
            f"--out {out}",
            allowed="a new folder",
            found="one that exists",
            fix="choose another name or remove it",
        )
    network = open_network(model, wiring=plan.wiring, device=device, dtype=dtype)
    check_plan(network, plan, other_weights)
    reader = load_reader(network) if needs_of(plan.edits) else None
    batches = windows(reader, texts_of(plan.data), "calibrate") if reader else []
    part, journal_folder = beside(out, "part"), beside(out, "journal")
    job = {
        "plan": plan.to_yaml(),
        "weights": network.checkpoint.weights,
        "device": str(network.device),
        "dtype": str(network.dtype),
    }
    journal = solve(network, plan.edits, batches, journal_folder, job, progress)

    def records(layer: Layer) -> dict[str, Weight]:
        return journal.read(layer.key) if layer.key in journal else {}

    if part.exists():
        shutil.rmtree(part)
    export = find(plan.target, "export").bind(network=network, records=records)
    nbytes = export(network.stack, plan, part)
    plan.save(part / "plan.yaml")
    write_check(network, records, part / CHECK)
    rows = [
        layer_row(network, layer, plan, journal.lines.get(layer.key, {}).get("report", {}))
        for layer in network.layers()
    ]
    os.replace(part, out)
    shutil.rmtree(journal_folder)
    return Applied(out, nbytes, rows)


def write_check(network: Network, records: Records, path: Path) -> None:
    """The answer of the edited network to a fixed input, walked layer by layer from the records.

    Held in float32: the weights as they are written, computed as a float32 reload computes.
    """
    wide = network.widened()
    batch = example_inputs(wide.module)
    found: list[Tensor] = []
    stops = walk(wide, [batch], finish=lambda i, clean, out: found.append(answer(out, batch)))
    for stop in stops:
        if stop.kind == "enter":
            for key, record in records(stop.layer).items():
                matrix = next(m for m in stop.layer.matrices if m.key == key)
                stop.substitute(matrix, record.dense())
    write_safetensors(path, {**batch, CHECKED: found[0].float().cpu().contiguous()})


def beside(out: Path, what: str) -> Path:
    """A working folder next to the output, on the same file system."""
    return out.with_name(f".{out.name}.{what}")


def layer_row(network: Network, layer: Layer, plan: Plan, report: dict[str, Any]) -> dict[str, Any]:
    """What one layer got and what came true of it; `from` is its place in the original."""
    chains = {label(chain_for(plan.edits, m)): m for m in layer.matrices}
    errors = list(report.get("errors", {}).values())
    return {
        "layer": layer.key,
        "from": network.origins.get(layer.path),
        "options": sorted(chains),
        "groups": {m.fusion: label(chain_for(plan.edits, m)) for m in layer.matrices},
        "bytes": report.get("bytes"),
        "error": sum(errors) / len(errors) if errors else None,
        "seconds": report.get("seconds"),
    }


def check_plan(network: Network, plan: Plan, other_weights: bool) -> Target:
    """Everything that can be wrong with a plan, before anything is computed; gives its target."""
    check_model(plan, network.checkpoint.structure, network.checkpoint.weights, other_weights)
    check_selectors(plan, [m for stack in network.stacks for m in stack.matrices()])
    target = TARGETS[plan.target] if plan.target in TARGETS else _no_target(plan)
    check_target(network, plan, target)
    return target


def check_target(network: Network, plan: Plan, target: Target) -> None:
    """Refuse, before anything is computed, a plan that its target cannot hold."""
    for layer in network.layers():
        for matrix in layer.matrices:
            module = layer.module.get_submodule(matrix.parameter.rpartition(".")[0])
            why = target.refuses(matrix, module, chain_for(plan.edits, matrix))
            if why:
                raise LayerwiseError(
                    f"plan, {matrix.key}",
                    allowed=f"what target {target.name!r} can hold",
                    found=why,
                    fix="choose other options for it, keep it as it is, or use target hf",
                )


def _no_target(plan: Plan) -> Target:
    raise LayerwiseError(
        "plan, target", allowed=", ".join(TARGETS), found=plan.target, fix="choose one of these"
    )


def preview(model: str | Path, plan: Plan, other_weights: bool = False) -> list[dict[str, Any]]:
    """What `apply_plan` would do: the checks of the plan, and a row per layer with exact bytes."""
    network = open_network(model, wiring=plan.wiring)
    target = check_plan(network, plan, other_weights)
    size = network.stored.dtype.itemsize
    return [
        layer_row(network, layer, plan, {})
        | {"bytes": sum(target.nbytes(m, chain_for(plan.edits, m), size) for m in layer.matrices)}
        for layer in network.layers()
    ]
