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
from layerwise.core.visits import FOLDED, read_folded
from layerwise.export import TARGETS
from layerwise.export._writer import Finished, dense_tensors, write_folder
from layerwise.jobs.apply import Applied, apply_plan, beside, job_of, note_answer, own_batch
from layerwise.jobs.checks import must_be_sound, too_large
from layerwise.jobs.experts import convert_folder
from layerwise.jobs.forecast import memory_of_models
from layerwise.jobs.session import Progress, check_new, load_reader, silent, texts_of
from layerwise.train.healing import Healed, heal

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


def trained(
    teacher: Network,
    student: Network,
    plan: Plan,
    how: Heal,
    file: Path | None = None,
    progress: Progress = silent,
) -> Healed:
    """What healing makes of a loaded network, on the data of its plan."""
    texts = texts_of(plan.data)._replace(samples=how.samples, length=how.length)
    reader = load_reader(teacher)
    batches = windows(reader, texts, "calibrate", how.batch)
    held = samples_of(reader, texts, "select", HELD)
    tick = partial(progress, "healing")
    return heal(teacher, student, batches, held, how, seed=plan.data.seed, file=file, progress=tick)


def heal_folder(
    model: str | Path,
    folder: Path,
    out: Path,
    how: Heal,
    *,
    device: str = "auto",
    progress: Progress = silent,
) -> tuple[int, list[tuple[int, float]]]:
    """Heal what `apply` wrote; the journal lies beside `out` until that is complete.

    Args:
        model: the original.
        folder: the edited network; its plan says on which data.
        out: the folder to write; its plan says how it was healed.
        how: steps, rank, rate and when to stop.
        device: where to compute.
        progress: called with what is done, how far, and out of how much.

    Returns:
        The bytes of all tensors, and the KL of the select part after so many steps.

    Raises:
        LayerwiseError: the folder holds rounded weights, was healed before, or is of another
            original; or `out` exists.
    """
    check_new(out)
    plan = read_plan(folder / "plan.yaml")
    original = open_network(model, device=device, dtype="float32")
    check_model(plan, original.checkpoint.structure, original.checkpoint.weights)
    what = "experts" if plan.experts else "rounded weights"
    if plan.edits or plan.heal or plan.experts or TARGETS[plan.target].method:
        raise LayerwiseError(
            f"heal {folder}",
            allowed="a folder with fewer layers or parts, whose weights are as they were",
            found="one that was healed before" if plan.heal else what,
            fix="heal once, after layers are left out and before matrices are rounded",
        )
    check_memory(memory_of_models(original, 3))
    edited = open_network(folder, device=device, dtype="float32")
    healing = structs.replace(plan, heal=how)
    part, journal_folder = beside(out, "part"), beside(out, "journal")
    job = job_of(original, healing, []) | {"edited": edited.checkpoint.weights}
    with Journal(journal_folder, job) as journal:
        file = journal_folder / "course.safetensors"
        found = trained(original.load(), edited.load(), plan, how, file, progress)
        if part.exists():
            shutil.rmtree(part)
        nbytes = write_healed(edited, found, part)
        healing.save(part / "plan.yaml")
        batch = own_batch(edited, plan)
        note_answer(open_network(part, dtype="float32"), batch, part)
        _ = too_large(edited) or must_be_sound(part, edited, batch)
        os.replace(part, out)
        journal.remove()
    return nbytes, found.history


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
    edited = beside(out, "edited") if plan.heal else out
    check_new(out)
    if plan.heal is None or not edited.exists():
        applied = apply_plan(model, bare, edited, device=device, progress=progress, **options)
        if plan.heal is None:
            return applied
    nbytes, history = heal_folder(model, edited, out, plan.heal, device=device, progress=progress)
    shutil.rmtree(edited)
    rows = [{"step": step, "kl": value} for step, value in history]
    return Applied(out, nbytes, rows, [])
