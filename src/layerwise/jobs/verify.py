"""Verify: the original, the edited and the naive model, measured the same way."""

import json
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from layerwise.core.checkpoint import Checkpoint, read_header, read_tensor
from layerwise.core.data import Texts, samples_of, windows
from layerwise.core.errors import LayerwiseError
from layerwise.core.network import (
    Network,
    choose_device,
    find_folder,
    forward_arguments,
    model_class,
    open_network,
    read_config,
)
from layerwise.core.plan import Plan, read_plan
from layerwise.core.quality import Estimate, Quality, measure_quality
from layerwise.core.weight import Weight
from layerwise.jobs.apply import CHECK, label, layer_row
from layerwise.jobs.measure import agrees_cached, peak_memory, speeds
from layerwise.jobs.plan import Request, assemble_depth, layer_bytes, plan_bits
from layerwise.jobs.session import Budget, Progress, load_tokenizer, silent, texts_of
from layerwise.jobs.solve import needs_data, solve
from layerwise.export import TARGETS


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


class Verified(NamedTuple):
    """The compared models, the layers of the plan, the checks and what follows from them."""

    rows: list[dict[str, Any]]
    layers: list[dict[str, Any]]
    checks: list[dict[str, Any]]
    ratio: dict[str, Any] | None
    verdict: str
    warnings: list[str]


def load_stock(folder: Path, dtype: str, device: torch.device) -> nn.Module:
    """The model as stock transformers loads it."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder)
    kind = model_class(config)
    module = kind.from_pretrained(folder, dtype=getattr(torch, dtype))
    return module.to(device).eval()


def logits_of(module: nn.Module) -> Callable[[Any], Tensor]:
    """Batch -> logits, without a cache."""
    device = next(module.parameters()).device

    def run(batch: Any) -> Tensor:
        inputs = {k: v.to(device) for k, v in batch.items()}
        return module(**forward_arguments(module, inputs)).logits

    return run


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
        Rows for the original, the plan and the naive plan, with intervals over documents.

    Raises:
        LayerwiseError: the folder holds no plan, or stock transformers cannot load it.
    """
    plan = read_plan(folder / "plan.yaml")
    tokenizer = load_tokenizer(model)
    texts = Texts(settings.data or plan.data.source, plan.data.seed, 0, settings.length)
    batches = samples_of(tokenizer, texts, "evaluate", settings.documents)
    device = choose_device(settings.device)
    progress("loading models", 0, 3)
    original = load_stock(find_folder(model), settings.dtype, device)
    edited = load_stock(folder, settings.dtype, device)
    progress("evaluating", 1, 3)
    before = measure_quality(batches, logits_of(original))
    after = measure_quality(batches, logits_of(edited), logits_of(original))
    rows = [
        quality_row("original", before, None, Checkpoint(find_folder(model)).nbytes, "as it is"),
        quality_row("plan", after, before, Checkpoint(folder).nbytes, describe(plan)),
    ]
    checks = [*reload_checks(folder, edited, settings), *decode_checks(edited, batches)]
    if plan.wiring:
        checks.append(rebuild_check(model, plan, edited, batches[0], settings))
    ratio, warnings = None, []
    if settings.naive:
        progress("building the naive plan", 2, 3)
        name, naive, nbytes = build_naive(model, plan, folder, original, batches, settings, progress)
        rows.append(quality_row("naive", naive, before, nbytes, name))
        ratio = {"field": "kl", "value": list(after.against(naive, "kl"))}
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


def describe(plan: Plan) -> str:
    """A plan in a few words."""
    if plan.wiring:
        return "; ".join(f"{len(order)} layers of {name}" for name, order in plan.wiring.items())
    counts: dict[str, int] = {}
    for edit in plan.edits:
        counts[label(edit.chain)] = counts.get(label(edit.chain), 0) + 1
    return ", ".join(f"{n}x {what}" for what, n in sorted(counts.items(), key=lambda i: -i[1]))


# -- checks ---------------------------------------------------------------------------------


def reload_checks(folder: Path, edited: nn.Module, settings: Settings) -> list[dict[str, Any]]:
    """The reloaded model against the logits that were computed while it was written."""
    path = folder / CHECK
    if not path.exists():
        return []
    held = {name: read_tensor(info) for name, info in read_header(path).items()}
    with torch.no_grad():
        got = logits_of(edited)({"input_ids": held["ids"]})[:, -held["logits"].shape[1] :].cpu()
    top = held["logits"].abs().max().item()
    off = (got.float() - held["logits"]).abs().max().item() / max(top, 1e-30)
    packed = "quantization_config" in json.loads((folder / "config.json").read_text())
    limit = 1e-3 if packed else 1e-4
    return [
        {
            "name": "stock transformers gives the logits of the model that was written",
            "ok": off <= limit,
            "found": f"largest difference {off:.1e} of the largest logit, allowed {limit:.0e}",
        }
    ]


def decode_checks(edited: nn.Module, batches: Sequence[Any]) -> list[dict[str, Any]]:
    """Cached against uncached greedy decoding."""
    same, total = agrees_cached(edited, batches[0]["input_ids"][:, :32])
    return [
        {
            "name": "cached equals uncached greedy decoding",
            "ok": same == total,
            "found": f"{same} of {total} tokens",
        }
    ]


def rebuild_check(
    model: str | Path, plan: Plan, edited: nn.Module, batch: Any, settings: Settings
) -> dict[str, Any]:
    """The stock rebuild against the original with its list of layers reordered in memory."""
    original = load_stock(find_folder(model), settings.dtype, choose_device(settings.device))
    network = open_network(original)
    for stack in network.stacks:
        if stack.name in plan.wiring:
            order = [v if isinstance(v, int) else v["layer"] for v in plan.wiring[stack.name]]
            parent, _, leaf = stack.container.rpartition(".")
            layers = original.get_submodule(stack.container)
            kept = nn.ModuleList([layers[i] for i in order])  # type: ignore[index]
            setattr(original.get_submodule(parent), leaf, kept)
    with torch.no_grad():
        wanted, got = logits_of(original)(batch), logits_of(edited)(batch)
    off = ((got - wanted).abs().max() / wanted.abs().max()).item()
    found = f"largest difference {off:.1e} of the largest logit, allowed 1e-04"
    return {
        "name": "the stock rebuild computes what the edited stack computes",
        "ok": off <= 1e-4,
        "found": found if off <= 1e-4 else f"{found}; the folder needs custom code",
    }


# -- the naive plan --------------------------------------------------------------------------


def build_naive(
    model: str | Path,
    plan: Plan,
    folder: Path,
    original: nn.Module,
    batches: Sequence[Any],
    settings: Settings,
    progress: Progress,
) -> tuple[str, Quality, int]:
    """What a user would do without a planner, at the same size: its name, quality and bytes."""
    if plan.wiring:
        return naive_depth(model, plan, original, batches, settings)
    return naive_bits(model, plan, folder, original, batches, settings, progress)


def naive_depth(
    model: str | Path,
    plan: Plan,
    original: nn.Module,
    batches: Sequence[Any],
    settings: Settings,
) -> tuple[str, Quality, int]:
    """The best of: last k dropped, last k but the final one, the median of 5 random choices."""
    network = open_network(model, device=settings.device, dtype=settings.dtype)
    depth = len(network.stack.layers)
    count = depth - len(next(iter(plan.wiring.values())))
    generator = torch.Generator().manual_seed(plan.data.seed)
    drawn = [
        sorted(torch.randperm(depth, generator=generator)[: depth - count].tolist())
        for _ in range(5)
    ]
    tails = [list(range(depth - count)), [*range(depth - count - 1), depth - 1]]

    def quality(kept: list[int]) -> Quality:
        wired = open_network(
            model,
            wiring={network.stack.name: kept},
            device=settings.device,
            dtype=settings.dtype,
        ).load()
        return measure_quality(batches, logits_of(wired.module), logits_of(original))

    random = sorted((quality(kept) for kept in drawn), key=lambda q: q.estimate("loss").value)
    found = [
        (f"last {count} dropped", quality(tails[0])),
        (f"last {count} but the final one dropped", quality(tails[1])),
        (f"{count} at random dropped, median of 5", random[2]),
    ]
    name, best = min(found, key=lambda item: item[1].estimate("loss").value)
    request = Request(model, Budget(depth=depth - count), target="hf")
    planned = assemble_depth(request, network, tails[0], None)
    return f"best naive: {name}", best, planned.nbytes


def naive_bits(
    model: str | Path,
    plan: Plan,
    folder: Path,
    original: nn.Module,
    batches: Sequence[Any],
    settings: Settings,
    progress: Progress,
) -> tuple[str, Quality, int]:
    """The same solver, one option everywhere, the largest that fits, the rest in order."""
    steps = [edit.chain[-1] for edit in plan.edits if edit.chain]
    rest = {k: v for k, v in steps[0].options.items() if k not in ("bits", "group")}
    widths = sorted({s.options.get("group", 128) for s in steps})
    request = Request(
        model,
        Budget(bytes=Checkpoint(folder).nbytes),
        target=plan.target,
        method=steps[0].method,
        allocator="uniform",
        data=plan.data,
        keep=plan.fixed,
        settings={steps[0].method: rest, "menu": {"group": widths}},
        device=settings.device,
    )
    network = open_network(model, device=settings.device)
    planned = plan_bits(request, network, TARGETS[plan.target], silent)
    dense = solved_in_memory(model, network, planned.plan, progress)

    def run(batch: Any) -> Tensor:
        inputs = {k: v.to(next(original.parameters()).device) for k, v in batch.items()}
        return functional_call(
            original, dense, (), forward_arguments(original, inputs), strict=False
        ).logits

    quality = measure_quality(batches, run, logits_of(original))
    return f"uniform: {describe(planned.plan)}", quality, planned.nbytes


def solved_in_memory(
    model: str | Path, network: Network, plan: Plan, progress: Progress
) -> dict[str, Tensor]:
    """Solve a plan and give every edited parameter in its dense form, in float32."""
    data = needs_data(plan.edits)
    batches = windows(load_tokenizer(model), texts_of(plan.data), "calibrate") if data else []
    folder = Path(tempfile.mkdtemp(prefix="layerwise-naive-"))
    try:
        journal = solve(network, plan.edits, batches, folder, {}, progress)
        dense: dict[str, Tensor] = {}
        for layer in network.layers():
            records = journal.read(layer.key) if layer.key in journal else {}
            tensors = network.fetch(layer) if records else {}
            for matrix in layer.matrices:
                if matrix.key in records:
                    name = f"{layer.path}.{matrix.parameter}"
                    if name not in dense:
                        dense[name] = tensors[matrix.parameter].float().to(network.device)
                    view = matrix.view(dense[name])
                    view.copy_(records[matrix.key].dense().float().reshape(view.shape))
        return dense
    finally:
        shutil.rmtree(folder)


# -- the report ------------------------------------------------------------------------------


def layer_rows(model: str | Path, plan: Plan, folder: Path) -> list[dict[str, Any]]:
    """What each layer of the original got."""
    network = open_network(model)
    sizes = layer_bytes(network)
    report = json.loads((folder / "report.json").read_text()) if (folder / "report.json").exists() else {}
    errors = {row["layer"]: row for row in report.get("rows", [])}
    kept = plan.wiring.get(network.stack.name)
    order = None if kept is None else [v if isinstance(v, int) else v["layer"] for v in kept]
    rows = []
    for layer in network.stack.layers:
        gone = order is not None and layer.index not in order
        row = layer_row(layer, plan, {})
        groups = {k.split("/", 2)[2]: v for k, v in row["groups"].items()}
        known = errors.get(layer.key, {}) if order is None else {}
        packed = known.get("bytes")
        rows.append(
            {
                "layer": layer.key,
                "groups": groups,
                "dropped": gone,
                "bytes": 0 if gone else packed if packed else sizes[layer.index],
                "original_bytes": sizes[layer.index],
                "error": known.get("error"),
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
