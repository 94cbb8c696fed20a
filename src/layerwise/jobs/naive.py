"""The naive plan: what a user would do without a planner, at the same size."""

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from layerwise.core.checkpoint import Checkpoint
from layerwise.core.data import windows
from layerwise.core.network import Network, forward_arguments, open_network
from layerwise.core.plan import Plan, describe
from layerwise.core.quality import Quality, measure_quality
from layerwise.export import TARGETS
from layerwise.jobs.bits import plan_bits
from layerwise.jobs.depth import assemble_depth
from layerwise.jobs.request import Request
from layerwise.jobs.session import Budget, Progress, load_tokenizer, silent, texts_of
from layerwise.jobs.solve import needs_of, solve
from layerwise.jobs.stock import logits_of


def build_naive(
    model: str | Path,
    plan: Plan,
    folder: Path,
    original: nn.Module,
    batches: Sequence[Any],
    dtype: str,
    device: str,
    progress: Progress,
) -> tuple[str, Quality, int]:
    """What a user would do without a planner, at the same size: its name, quality and bytes."""
    if plan.wiring:
        return naive_depth(model, plan, original, batches, dtype, device)
    return naive_bits(model, plan, folder, original, batches, dtype, device, progress)


def naive_depth(
    model: str | Path,
    plan: Plan,
    original: nn.Module,
    batches: Sequence[Any],
    dtype: str,
    device: str,
) -> tuple[str, Quality, int]:
    """The best of: last k dropped, last k but the final one, the median of 5 random choices."""
    network = open_network(model, device=device, dtype=dtype)
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
            device=device,
            dtype=dtype,
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
    dtype: str,
    device: str,
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
        device=device,
    )
    network = open_network(model, device=device)
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
    data = needs_of(plan.edits)
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
