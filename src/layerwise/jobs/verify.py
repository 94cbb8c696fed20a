"""Verify: the original, the edited and the naive model, measured the same way."""

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from layerwise.core.checkpoint import Checkpoint
from layerwise.core.data import Texts
from layerwise.core.machine import available_memory
from layerwise.core.network import Network, choose_device, find_folder, open_network
from layerwise.core.plan import Plan, chain_for, describe, label, read_plan
from layerwise.core.quality import Estimate, Quality, measure_quality
from layerwise.core.reader import samples_of
from layerwise.export import TARGETS
from layerwise.export.compressed_tensors import unpack
from layerwise.jobs.checks import decode_checks, rebuild_check, reload_checks
from layerwise.jobs.depth import layer_bytes
from layerwise.jobs.forecast import memory_of_models
from layerwise.jobs.measure import peak_memory, speeds
from layerwise.jobs.naive import Contest, build_naive, naive_streamed
from layerwise.jobs.session import Progress, load_reader, silent
from layerwise.jobs.stock import answers_of, load_stock, streamed


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
    plan = read_plan(folder / "plan.yaml")
    network = open_network(model)
    reader = load_reader(network)
    texts = Texts(settings.data or plan.data.source, plan.data.seed, 0, settings.length)
    batches = samples_of(reader, texts, "evaluate", settings.documents)
    device = choose_device(settings.device)
    room = available_memory()
    needed = sum(memory_of_models(network, 3 if settings.naive else 2).values())
    if settings.streamed or 0 < room < needed:
        return _verify_streamed(model, folder, plan, network, batches, settings, progress)
    progress("loading models", 0, 3)
    original = load_stock(find_folder(model), settings.dtype, device)
    edited = load_stock(folder, settings.dtype, device)
    progress("evaluating", 1, 3)
    before = measure_quality(batches, answers_of(original))
    after = measure_quality(batches, answers_of(edited), answers_of(original))
    rows = [
        quality_row("original", before, None, Checkpoint(find_folder(model)).nbytes, "as it is"),
        quality_row("plan", after, before, Checkpoint(folder).nbytes, describe(plan)),
    ]
    checks = [*reload_checks(folder, edited), *decode_checks(edited, batches)]
    if plan.wiring:
        checks += rebuild_check(original, network, plan, edited, batches[0])
    ratio, warnings = None, []
    if settings.naive:
        progress("building the naive plan", 2, 3)
        size = Checkpoint(folder).nbytes
        contest = Contest(model, plan, size, original, batches, settings.dtype, settings.device)
        naive = build_naive(contest, progress)
        if naive is None:
            warnings.append("nothing to compare with: no naive plan has this size")
        else:
            rows.append(quality_row("naive", naive.quality, before, naive.nbytes, naive.what))
            ratio = {"field": "kl", "value": list(after.against(naive.quality, "kl"))}
    else:
        warnings.append("no naive plan was built (--no-naive)")
    _speeds(rows, original, edited, batches, settings)
    if settings.memory:
        rows[0]["memory"] = peak_memory(find_folder(model), settings.dtype)
        rows[1]["memory"] = peak_memory(folder, settings.dtype)
    rows[1]["cached"] = all(c["ok"] for c in checks if c["name"].startswith("cached"))
    warnings += [f"{c['name']}: {c['found']}" for c in checks if not c["ok"]]
    progress("evaluating", 3, 3)
    layers = layer_rows(model, plan, folder)
    return Verified(rows, layers, checks, ratio, verdict(ratio, checks), warnings)


def _verify_streamed(
    model: str | Path,
    folder: Path,
    plan: Plan,
    network: Network,
    batches: Sequence[Any],
    settings: Settings,
    progress: Progress,
) -> Verified:
    """Quality alone, with a layer of each model in memory."""

    def opened(wiring: Mapping[str, Any]) -> Network:
        return open_network(model, wiring=wiring, device=settings.device).widened()

    held = Checkpoint(folder)
    packed = any(name.endswith(".weight_packed") for name in held.tensors)
    dense = None if packed else open_network(folder, device=settings.device).widened()
    records = partial(unpack, held, edits=plan.edits) if packed else lambda layer: {}
    progress("evaluating layer by layer", 0, 3)
    with streamed(opened({}), batches) as answers:
        before = measure_quality(batches, answers)
    progress("evaluating layer by layer", 1, 3)
    with (
        streamed(opened({}), batches) as original,
        streamed(dense or opened(plan.wiring), batches, records) as edited,
    ):
        after = measure_quality(batches, edited, original)
    rows = [
        quality_row("original", before, None, Checkpoint(find_folder(model)).nbytes, "as it is"),
        quality_row("plan", after, before, held.nbytes, describe(plan)),
    ]
    progress("evaluating layer by layer", 2, 3)
    ratio = None
    warnings = ["streamed: speed, memory, decoding and the stock reload were not measured"]
    contest = Contest(
        model, plan, held.nbytes, network.module, batches, settings.dtype, settings.device
    )
    naive = naive_streamed(contest, progress) if settings.naive else None
    if naive is None:
        warnings.append("not compared with a naive plan")
    else:
        rows.append(quality_row("naive", naive.quality, before, naive.nbytes, naive.what))
        ratio = {"field": "kl", "value": list(after.against(naive.quality, "kl"))}
    progress("evaluating layer by layer", 3, 3)
    return Verified(rows, layer_rows(model, plan, folder), [], ratio, verdict(ratio, []), warnings)


def _speeds(
    rows: list[dict[str, Any]],
    original: nn.Module,
    edited: nn.Module,
    batches: Sequence[Any],
    settings: Settings,
) -> None:
    if settings.speed:
        found = speeds([original, edited], batches)
        for row, (prefill, decode) in zip(rows, found, strict=False):
            row["prefill"], row["decode"] = prefill, decode


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


def layer_rows(model: str | Path, plan: Plan, folder: Path) -> list[dict[str, Any]]:
    """What each layer of the original got; a layer that runs twice counts twice."""
    original = open_network(model)
    edited = open_network(model, wiring=plan.wiring) if plan.wiring else original
    report = folder / "report.json"
    known = json.loads(report.read_text()).get("rows", []) if report.exists() else []
    errors = {row["layer"]: row.get("error") for row in known}
    nbytes, itemsize = TARGETS[plan.target].nbytes, original.stored.dtype.itemsize
    rows = []
    sizes = layer_bytes(original)
    for layer in original.layers():
        size = sizes[layer.key]
        visits = [
            new for new in edited.layers() if edited.origins.get(new.path, new.path) == layer.path
        ]
        chains = {m: chain_for(plan.edits, m) for m in (visits[0].matrices if visits else ())}
        saved = sum(m.size * itemsize - nbytes(m, chain, itemsize) for m, chain in chains.items())
        rows.append(
            {
                "layer": layer.key,
                "groups": {m.fusion.split("/", 2)[2]: label(c) for m, c in chains.items()},
                "dropped": not visits,
                "bytes": (size - saved) * len(visits),
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
