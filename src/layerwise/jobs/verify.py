"""Verify: the original, the edited and the naive model, measured the same way."""

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from layerwise.core.absent import unstored
from layerwise.core.checkpoint import Checkpoint
from layerwise.core.data import Texts
from layerwise.core.fold import load_folds
from layerwise.core.machine import available_memory
from layerwise.core.network import Network
from layerwise.core.open import choose_device, open_network
from layerwise.core.plan import Plan, chains_of, describe, read_plan
from layerwise.core.quality import Estimate, Quality, measure_quality
from layerwise.core.reader import samples_of
from layerwise.core.task import answer, token_rows
from layerwise.core.visits import each_once
from layerwise.export import TARGETS
from layerwise.export._gguf_file import FILE, GgufFile
from layerwise.export.compressed_tensors import packed_records
from layerwise.jobs.checks import decode_checks, rebuild_check, reload_checks
from layerwise.jobs.contest import Contest
from layerwise.jobs.engine import engine_checks, in_llama, off_of
from layerwise.jobs.fates import labels_of, own_bytes
from layerwise.jobs.forecast import memory_of_models
from layerwise.jobs.measure import peak_memory, speeds
from layerwise.jobs.naive import build_naive
from layerwise.jobs.session import Progress, load_reader, silent
from layerwise.jobs.solve import put_outside
from layerwise.jobs.stock import answers_of, compute_packed, load_stock, streamed
from layerwise.jobs.units import layer_bytes

#: documents on which llama.cpp is compared with our own dequantized model
CHECKED = 8


class Settings(NamedTuple):
    """How thorough a verification is."""

    documents: int = 64
    length: int = 512
    naive: bool = True
    speed: bool = True
    memory: bool = True
    device: str = "auto"
    dtype: str = "float32"
    data: str = ""
    streamed: bool = False


class Verified(NamedTuple):
    """The compared models, the layers of the plan, the checks and what follows from them."""

    rows: list[dict[str, Any]]
    layers: list[dict[str, Any]]
    checks: list[dict[str, Any]]
    ratio: dict[str, Any] | None
    verdict: str
    warnings: list[str]


class Case(NamedTuple):
    """An original, a folder that was made of it, and the documents both are asked about."""

    model: str | Path
    folder: Path
    plan: Plan
    network: Network
    batches: Sequence[Any]
    settings: Settings
    before: Checkpoint
    after: Checkpoint | GgufFile

    @property
    def contest(self) -> Contest:
        """What a naive plan has to be measured on."""
        how = self.settings.dtype, self.settings.device
        folds = load_folds(self.folder)
        return Contest(self.model, self.plan, self.after.nbytes, self.batches, *how, folds)


def verify(
    model: str | Path,
    folder: Path,
    settings: Settings = Settings(),
    progress: Progress = silent,
) -> Verified:
    """Compare an edited checkpoint with its original and with a naive plan of the same size.

    Args:
        model: the original.
        folder: what `apply` wrote.
        settings: documents, their length, and what to leave out.
        progress: called with what is done, how far, and out of how much.

    Returns:
        Rows for the original, the plan and the naive plan, with intervals over documents. Models
        that do not fit in memory are streamed, and what needs them whole is left out and said.

    Raises:
        LayerwiseError: the folder holds no plan, or stock transformers cannot load it.
    """
    plan, network = read_plan(folder / "plan.yaml"), open_network(model)
    packed = TARGETS[plan.target].engine == "llama.cpp"
    held = GgufFile(folder / FILE) if packed else Checkpoint(folder)
    texts = Texts(settings.data or plan.data.source, plan.data.seed, 0, settings.length)
    batches = samples_of(load_reader(network), texts, "evaluate", settings.documents)
    case = Case(model, folder, plan, network, batches, settings, network.checkpoint, held)
    room, needed = available_memory(), sum(memory_of_models(network, 2).values())
    measured = _streamed if settings.streamed or 0 < room < needed else _resident
    measured = _in_llama if packed else measured
    progress("evaluating", 0, 2)
    rows, qualities, checks, warnings = measured(case)
    progress("evaluating", 1, 2)
    if bound := plan.budget.get("kl"):
        kl = qualities[1].estimate("kl")
        checks.append({"name": f"KL of at most {bound:g}", "found": str(kl), "ok": kl.low <= bound})
    naive = build_naive(case.contest, progress) if settings.naive else None
    ratio = None
    if naive is not None:
        rows.append(quality_row("naive", naive.quality, qualities[0], naive.nbytes, naive.what))
        ratio = {"field": "kl", "value": list(qualities[1].against(naive.quality, "kl"))}
    elif settings.naive:
        warnings.append("nothing to compare with: no naive plan has this size")
    else:
        warnings.append("no naive plan was built (--no-naive)")
    progress("evaluating", 2, 2)
    return Verified(rows, layer_rows(case), checks, ratio, verdict(ratio, checks), warnings)


#: rows, the quality of both models, checks, and warnings
Measured = tuple[list[dict[str, Any]], tuple[Quality, Quality], list[dict[str, Any]], list[str]]


def _resident(case: Case) -> Measured:
    """Both models as stock transformers loads them: quality, checks, speed, memory."""
    settings, device = case.settings, choose_device(case.settings.device)
    folders = case.before.folder, case.folder
    original, edited = (load_stock(folder, settings.dtype, device) for folder in folders)
    before, after = measure_quality(case.batches, answers_of(original), answers_of(edited))
    rows = _both(case, before, after)
    checks = [*reload_checks(case.folder, edited), *decode_checks(edited, case.batches)]
    if case.plan.wiring:
        checks += rebuild_check(original, case.network, case.plan, edited, case.batches[0])
    if settings.speed:
        packed = compute_packed(edited, case.folder, case.network)
        rows[1]["what"] += f"; {packed}" if packed.count else ""
        found = speeds([original, edited], case.batches)
        for row, (prefill, decode) in zip(rows, found, strict=True):
            row["prefill"], row["decode"] = prefill, decode
    if settings.memory:
        for row, folder in zip(rows, folders, strict=True):
            row["memory"] = peak_memory(folder, settings.dtype)
    rows[1]["cached"] = all(c["ok"] for c in checks if c["name"].startswith("cached"))
    failed = [f"{c['name']}: {c['found']}" for c in checks if not c["ok"]]
    return rows, (before, after), checks, failed


def _in_llama(case: Case) -> Measured:
    """Our dequantized model, with a layer in memory, and the file itself run by llama.cpp."""
    contest, held, batches = case.contest, case.after, case.batches
    assert isinstance(held, GgufFile)
    edited = contest.opened(case.plan.wiring, contest.folds)
    ours: list[Tensor] = []
    put_outside(edited, held.outside(edited))

    def read(output: Any, batch: Any) -> Tensor:
        if len(ours) < CHECKED:
            ours.append(token_rows(output, batch))
        return answer(output, batch)

    with (
        streamed(contest.opened(), batches) as original,
        streamed(edited, batches, partial(held.records, edited), read) as answers,
        in_llama(held.path, batches, embeds=edited.task == "embed") as theirs,
    ):
        before, after, there = measure_quality(batches, original, answers, theirs)
    checks = engine_checks(held.path, batches[:CHECKED], ours, off=off_of(edited))
    rows = _both(case, before, after)
    rows.append(quality_row("llama.cpp", there, before, held.nbytes, "the plan, in llama.cpp"))
    said = ["decoding speed and memory were not measured: they are llama.cpp's"]
    failed = [f"{c['name']}: {c['found']}" for c in checks if not c["ok"]]
    return rows, (before, after), checks, [*said, *failed]


def _streamed(case: Case) -> Measured:
    """Quality alone, with a layer of each model in memory."""
    contest, held = case.contest, case.after
    assert isinstance(held, Checkpoint)
    packed = any(name.endswith(".weight_scale") for name in held.tensors)
    own = contest._replace(model=case.folder)
    edited = contest.opened(case.plan.wiring, contest.folds) if packed else own.opened()
    read = partial(packed_records, held, edited, edits=case.plan.edits)
    records = read if packed else lambda layer: {}
    before, after = contest.qualities(edited, records)
    said = "streamed: speed, memory, decoding and the stock reload were not measured"
    return _both(case, before, after), (before, after), [], [said]


def _both(case: Case, before: Quality, after: Quality) -> list[dict[str, Any]]:
    what = describe(case.plan)
    return [
        quality_row("original", before, None, case.before.nbytes, "as it is"),
        quality_row("plan", after, before, case.after.nbytes, what),
    ]


def quality_row(
    name: str, quality: Quality, original: Quality | None, nbytes: int, what: str
) -> dict[str, Any]:
    """One compared model."""
    loss = quality.estimate("loss")
    return {
        "name": name,
        "what": what,
        "bytes": nbytes,
        "loss": list(loss),
        "perplexity": [float(torch.tensor(x).exp()) for x in loss],
        "rise": list(quality.rise(original)) if original else None,
        "kl": list(quality.estimate("kl")) if original else None,
        "agree": list(quality.estimate("agree")) if original else None,
        "prefill": None,
        "decode": None,
        "memory": None,
        "cached": None,
    }


def layer_rows(case: Case) -> list[dict[str, Any]]:
    """What each layer of the original got; a layer that runs twice counts twice."""
    plan, original = case.plan, case.network
    edited = open_network(case.model, wiring=plan.wiring) if plan.wiring else original
    report = case.folder / "report.json"
    known = json.loads(report.read_text()).get("rows", []) if report.exists() else []
    errors = {row["layer"]: row.get("error") for row in known if "layer" in row}
    itemsize, rows = original.stored.dtype.itemsize, []
    target, chain_of = TARGETS[plan.target], chains_of(plan.edits)
    sizes, own = layer_bytes(original), own_bytes(edited)
    spares = target.once and all(map(each_once, plan.wiring.values()))
    narrow = layer_bytes(open_network(case.folder)) if plan.widths or plan.units else {}
    for layer in original.layers():
        size = sizes[layer.key]
        visits = [
            new for new in edited.layers() if edited.origins.get(new.path, new.path) == layer.path
        ]
        labels = labels_of(edited, visits[0], plan) if visits else {}
        gone = unstored(visits[0], edited.visits.get(visits[0].path)) if visits and spares else []
        kept = sum(target.nbytes(m, chain_of(m), itemsize) for m in labels if m not in gone)
        saved = sum(m.size for m in labels) * itemsize - kept
        rows.append(
            {
                "layer": layer.key,
                "groups": {m.fusion.split("/", 2)[2]: text for m, text in labels.items()},
                "dropped": not visits and layer.key not in own,
                "bytes": sum(narrow[new.key] for new in visits)
                if narrow
                else (size - saved) * (min(1, len(visits)) if target.once else len(visits))
                + own.get(layer.key, 0) * target.once,
                "original_bytes": size,
                "error": errors.get(visits[0].key) if visits else None,
            }
        )
    return rows


def verdict(ratio: Mapping[str, Any] | None, checks: Sequence[Mapping[str, Any]]) -> str:
    """One sentence: whether the plan beats the naive one, and whether the result is sound."""
    failed = [c["name"] for c in checks if not c["ok"]]
    sound = "all checks passed" if not failed else f"NOT sound, failed: {', '.join(failed)}"
    if ratio is None:
        return f"Not compared with a naive plan; {sound}."
    found = Estimate(*ratio["value"])
    if found.high < 1:
        words = f"The plan's KL is {found.value:.2f} of the naive plan's at the same size"
    elif found.low > 1:
        words = f"The naive plan is BETTER: the plan's KL is {found.value:.2f} of its"
    else:
        words = f"The plan is no better than the naive one: its KL is {found.value:.2f} of it"
    return f"{words} (95% interval {found.low:.2f} to {found.high:.2f}); {sound}."
