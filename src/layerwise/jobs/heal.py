"""Heal: train an edited folder on what its original answers, and write it again."""

import os
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from msgspec import convert, structs

from layerwise.core.errors import LayerwiseError, refusing
from layerwise.core.index import ADAPTERS
from layerwise.core.journal import Journal
from layerwise.core.machine import check_memory
from layerwise.core.network import Network
from layerwise.core.open import open_network
from layerwise.core.plan import Heal, Plan, check_model, read_plan, settings
from layerwise.core.reader import samples_of, windows
from layerwise.core.visits import FOLDED, parse_wiring, read_folded
from layerwise.export import TARGETS
from layerwise.export._writer import Finished, dense_tensors, write_folder
from layerwise.jobs.apply import Applied, apply_plan, beside, job_of, note_answer, own_batch
from layerwise.jobs.checks import must_be_sound, too_large
from layerwise.jobs.experts import convert_folder
from layerwise.jobs.forecast import memory_to_heal
from layerwise.jobs.request import Request
from layerwise.jobs.session import Progress, check_new, load_reader, silent, texts_of
from layerwise.train import Healed, heal, heal_layers

#: documents of the select part on which the best step is chosen
HELD = 16


def how_to_heal(steps: int, pairs: Sequence[str]) -> Heal:
    """The settings of `--steps` and `--set heal.option=value`.

    Raises:
        LayerwiseError: there is no such option, or no such value of it.

    Example:
        >>> how_to_heal(100, ["heal.rank=4"]).rank
        4
    """
    given = settings(pairs)
    known = [name for name in Heal.__struct_fields__ if name != "steps"]
    with refusing(
        "--set",
        allowed=", ".join(f"heal.{name}" for name in known),
        fix="write for instance heal.rank=8",
    ):
        if set(given) - {"heal"}:
            raise ValueError(f"{min(set(given) - {'heal'})}.*")
        return convert({"steps": steps, **given.get("heal", {})}, Heal)


def asked_to_heal(steps: int, pairs: Sequence[str]) -> tuple[Heal | None, list[str]]:
    """What `--heal` and `--set heal.option=value` ask for, and the settings of all else.

    Example:
        >>> asked_to_heal(0, ["gptq.bits=3"])
        (None, ['gptq.bits=3'])
    """
    mine = [pair for pair in pairs if pair.startswith("heal.")]
    others = [pair for pair in pairs if pair not in mine]
    return how_to_heal(steps, mine) if steps or mine else None, others


def check_healable(where: str, target: str, edits: object = (), before: str = "") -> None:
    """Only weights that are not rounded, of fewer layers, parts or units, can be healed.

    Raises:
        LayerwiseError: matrices are edited, or trained already (`before` says to what).
    """
    rounded = edits or (target in TARGETS and TARGETS[target].method)
    if before or rounded:
        raise LayerwiseError(
            where,
            allowed="a folder with fewer layers, parts or units, whose weights are not rounded",
            found=before or "rounded weights",
            fix="heal once, after layers are left out and before matrices are rounded",
        )


def check_asked(where: str, request: Request) -> None:
    """Refuse a request whose plan could not be healed, before it is made."""
    edits = () if request.narrows else request.method
    check_healable(where, request.target, edits)


def to_be_healed(plan: Plan, how: Heal, where: str = "--heal") -> Plan:
    """The plan with healing, if what it makes can be healed."""
    before = "one that was healed before" if plan.heal else "experts" if plan.experts else ""
    rounded = () if plan.widths else plan.edits  # what these leave at zero is cut out
    check_healable(where, plan.target, rounded, before)
    return structs.replace(plan, heal=how)


def trained(
    teacher: Network,
    student: Network,
    plan: Plan,
    how: Heal,
    journal: Journal | None = None,
    progress: Progress = silent,
) -> Healed:
    """What healing makes of the network of a plan, on the data of that plan."""
    texts = texts_of(plan.data)._replace(samples=how.samples, length=how.length)
    reader = load_reader(teacher)
    batches = windows(reader, texts, "calibrate", how.batch)
    held = samples_of(reader, texts, "select", HELD)
    options = {"seed": plan.data.seed, "progress": partial(progress, "healing")}
    if how.mode == "layers":
        deep = {stack.name: len(stack.layers) for stack in teacher.stacks}
        wirings = {name: parse_wiring(o, deep[name], "wiring") for name, o in plan.wiring.items()}
        orders = {name: [visit.layer for visit in order] for name, order in wirings.items()}
        return heal_layers(teacher, student, orders, batches, held, how, journal=journal, **options)
    file = journal.folder / "course.safetensors" if journal else None
    return heal(teacher.load(), student.load(), batches, held, how, file=file, **options)


def heal_folder(
    model: str | Path,
    folder: Path,
    out: Path,
    how: Heal,
    *,
    device: str = "auto",
    progress: Progress = silent,
) -> tuple[int, list[dict[str, Any]]]:
    """Heal what `apply` wrote; the journal lies beside `out` until that is complete.

    Args:
        model: the original.
        folder: the edited network; its plan says on which data.
        out: the folder to write; its plan says how it was healed.
        how: what is trained, steps, rate and when to stop.
        device: where to compute.
        progress: called with what is done, how far, and out of how much.

    Returns:
        The bytes of all tensors, and rows: the KL of the select part after so many steps, or the
        relative error of every layer on it, before and after.

    Raises:
        LayerwiseError: the folder holds rounded weights, was healed before, or is of another
            original; or `out` exists.
    """
    check_new(out)
    plan = read_plan(folder / "plan.yaml")
    original = open_network(model, device=device, dtype="float32")
    check_model(plan, original.checkpoint.structure, original.checkpoint.weights)
    healing = to_be_healed(plan, how, f"heal {folder}")
    check_memory(memory_to_heal(original, how))
    edited = open_network(folder, device=device, dtype="float32")
    part, journal_folder = beside(out, "part"), beside(out, "journal")
    job = job_of(original, healing, []) | {"edited": edited.checkpoint.weights}
    with Journal(journal_folder, job) as journal:
        found = trained(original, edited, plan, how, journal, progress)
        if part.exists():
            shutil.rmtree(part)
        nbytes = write_healed(edited, found, part)
        healing.save(part / "plan.yaml")
        batch = own_batch(edited, plan)
        note_answer(open_network(part, dtype="float32"), batch, part)
        _ = too_large(edited) or must_be_sound(part, edited, batch)
        os.replace(part, out)
        journal.remove()
    return nbytes, found.rows


def write_healed(edited: Network, found: Healed, part: Path) -> int:
    """The folder of a network once more, with other parameters; every stored layer once."""
    folder = edited.checkpoint.folder
    orders = zip(read_folded(folder), edited.orders, strict=False)
    plain = {name: list(range(depth)) for name, (depth, _) in orders}
    stored = open_network(folder, wiring=plain or None)
    made: dict[str, Any] = {}
    for layer in edited.layers():
        origin = edited.origins.get(layer.path, layer.path)
        own = {n: t for n, t in found.tensors.items() if n.startswith(f"{layer.path}.")}
        made |= {f"{origin}.{n.removeprefix(f'{layer.path}.')}": t for n, t in own.items()}

    def layers() -> Any:
        for layer in stored.layers():
            tensors = stored.fetch(layer)
            healed = {n: made.get(f"{layer.path}.{n}", t).to(t) for n, t in tensors.items()}
            yield Finished(layer, healed, {})

    nbytes = write_folder(stored, part, layers(), dense_tensors)
    for name in (FOLDED, ADAPTERS):
        if (folder / name).exists():
            shutil.copy(folder / name, part / name)
    return nbytes + sum(info.nbytes for info in edited.checkpoint.adapters.values())


def apply_healed(
    model: str | Path,
    plan: Plan,
    out: Path,
    *,
    device: str = "auto",
    progress: Progress = silent,
    **options: Any,
) -> Applied:
    """Apply a plan with the options of `apply_plan`, and heal what came of it if it says so."""
    if plan.experts:
        nbytes, rows = convert_folder(model, out, plan, device=device, progress=progress)
        return Applied(out, nbytes, rows, [])
    bare = structs.replace(plan, heal=None)
    if plan.heal:
        to_be_healed(bare, plan.heal, "plan, heal")
    edited = beside(out, "edited") if plan.heal else out
    check_new(out)
    if plan.heal is None or not edited.exists():
        applied = apply_plan(model, bare, edited, device=device, progress=progress, **options)
        if plan.heal is None:
            return applied
    nbytes, rows = heal_folder(model, edited, out, plan.heal, device=device, progress=progress)
    shutil.rmtree(edited)
    return Applied(out, nbytes, rows, [])
