"""The naive plan: what a user would do without a planner, at the same size."""

import shutil
import tempfile
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from layerwise.core.errors import LayerwiseError
from layerwise.core.journal import Journal
from layerwise.core.network import Network, open_network
from layerwise.core.plan import Plan, chain_for, describe
from layerwise.core.quality import Quality, measure_quality
from layerwise.core.reader import windows
from layerwise.core.task import answer, forward_arguments
from layerwise.export import PACKED, TARGETS
from layerwise.jobs.bits import plan_bits
from layerwise.jobs.depth import able_to_go, assemble_depth, layers_to_drop, wiring_without
from layerwise.jobs.request import Planned, Request
from layerwise.jobs.session import Budget, Progress, load_reader, silent, texts_of
from layerwise.jobs.solve import needs_of, solve
from layerwise.jobs.stock import answers_of, streamed


class Contest(NamedTuple):
    """What the candidates are measured on, and how many bytes they may take."""

    model: str | Path
    plan: Plan
    nbytes: int
    original: nn.Module
    batches: Sequence[Any]
    dtype: str
    device: str


class Naive(NamedTuple):
    """A plan that nobody had to think about: what it is, its quality, its bytes."""

    what: str
    quality: Quality
    nbytes: int


def build_naive(contest: Contest, progress: Progress = silent) -> Naive | None:
    """What a user would do without a planner, at the same size.

    For a plan of both depth and bits it is the better one of the two alone. There is none for a
    plan that changes nothing, or where no single technique gets as small.
    """
    found = []
    if contest.plan.wiring:
        found.append(naive_depth(contest))
    if contest.plan.edits:
        found.append(naive_bits(contest, progress))
    built = [naive for naive in found if naive is not None]
    return min(built, key=lambda naive: naive.quality.estimate("kl").value, default=None)


def naive_depth(contest: Contest) -> Naive | None:
    """The best of: last k dropped, last k but the final one, the median of 5 random choices."""
    model, device = contest.model, contest.device
    network = open_network(model, device=device, dtype=contest.dtype)
    keys = [layer.key for layer in able_to_go(network, contest.plan.fixed)]
    count = len(network.layers()) - sum(
        len(contest.plan.wiring.get(stack.name, stack.layers)) for stack in network.stacks
    )
    if contest.plan.edits:
        try:
            count = layers_to_drop(Budget(bytes=contest.nbytes), network)
        except LayerwiseError:
            return None
    generator = torch.Generator().manual_seed(contest.plan.data.seed)
    orders = (torch.randperm(len(keys), generator=generator).tolist() for _ in range(1000))
    drawn = ([keys[i] for i in order[:count]] for order in orders)
    whole = (gone for gone in drawn if all(wiring_without(network, gone).values()))
    chosen = list(islice(whole, 5))
    tails = [keys[len(keys) - count :], keys[len(keys) - count - 1 : len(keys) - 1]]

    def quality(gone: list[str]) -> Quality:
        wiring = wiring_without(network, gone)
        wired = open_network(model, wiring=wiring, device=device, dtype=contest.dtype).load()
        return measure_quality(
            contest.batches, answers_of(wired.module), answers_of(contest.original)
        )

    random = sorted((quality(gone) for gone in chosen), key=lambda q: q.estimate("loss").value)
    found = [(f"{count} at random dropped, median of 5", random[len(random) // 2])]
    for name, gone in (
        ("last {} dropped", tails[0]),
        ("last {} but the final one dropped", tails[1]),
    ):
        if all(wiring_without(network, gone).values()):
            found.append((name.format(count), quality(gone)))
    name, best = min(found, key=lambda item: item[1].estimate("loss").value)
    request = Request(model, Budget(bytes=contest.nbytes), target="hf")
    planned = assemble_depth(request, network, tails[0], None)
    return Naive(f"best naive: {name}", best, planned.nbytes)


def naive_bits(contest: Contest, progress: Progress) -> Naive | None:
    """The same solver, one option everywhere, on the resident original."""
    network = open_network(contest.model, device=contest.device)
    planned = plan_uniform(contest, network)
    if planned is None:
        return None
    dense = solved_in_memory(contest.model, network, planned.plan, progress)
    original = contest.original

    def run(batch: Any) -> Tensor:
        inputs = {k: v.to(next(original.parameters()).device) for k, v in batch.items()}
        given = forward_arguments(original, inputs)
        return answer(functional_call(original, dense, (), given, strict=False), batch)

    quality = measure_quality(contest.batches, run, answers_of(original))
    return Naive(f"uniform: {describe(planned.plan)}", quality, planned.nbytes)


def naive_streamed(contest: Contest, progress: Progress) -> Naive | None:
    """The same as `naive_bits`, with one layer in memory; what is solved lies on disk."""
    network = open_network(contest.model, device=contest.device)
    planned = plan_uniform(contest, network) if contest.plan.edits else None
    if planned is None:
        return None
    edits, data = planned.plan.edits, needs_of(planned.plan.edits)
    texts = texts_of(planned.plan.data)
    batches = windows(load_reader(network), texts, "calibrate") if data else []
    with tempfile.TemporaryDirectory(prefix="layerwise-naive-") as folder:
        solver = solve(network, edits, batches, Journal(Path(folder), {}), progress)
        with (
            streamed(network.widened(), contest.batches) as original,
            streamed(network.widened(), contest.batches, solver.finished) as edited,
        ):
            quality = measure_quality(contest.batches, edited, original)
    return Naive(f"uniform: {describe(planned.plan)}", quality, planned.nbytes)


def plan_uniform(contest: Contest, network: Network) -> Planned | None:
    """One option everywhere, the largest that fits, the rest in order; none may get so small.

    A dense target stores no fewer bytes for fewer bits; there both plans are priced packed.
    """
    model, plan = contest.model, contest.plan
    target = TARGETS[plan.target] if TARGETS[plan.target].by_bits else PACKED
    steps = [edit.chain[-1] for edit in plan.edits if edit.chain]
    rest = {k: v for k, v in steps[0].options.items() if k not in ("bits", "group")}
    widths = sorted({s.options.get("group", 128) for s in steps})
    request = Request(
        model,
        Budget(bytes=contest.nbytes if target is not PACKED else packed_size(contest)),
        target=plan.target,
        method=steps[0].method,
        allocator="uniform",
        data=plan.data,
        keep=plan.fixed,
        settings={steps[0].method: rest, "menu": {"group": widths}},
        device=contest.device,
    )
    try:
        return plan_bits(request, network, target, silent)
    except LayerwiseError:
        return None


def packed_size(contest: Contest) -> int:
    """Bytes of the plan's result if its matrices were stored packed."""
    wired = open_network(contest.model, wiring=contest.plan.wiring)
    itemsize = wired.stored.dtype.itemsize
    matrices = [m for stack in wired.stacks for m in stack.matrices()]
    chains = {m.key: chain_for(contest.plan.edits, m) for m in matrices}
    saved = sum(m.size * itemsize - PACKED.nbytes(m, chains[m.key], itemsize) for m in matrices)
    return contest.nbytes - saved


def solved_in_memory(
    model: str | Path, network: Network, plan: Plan, progress: Progress
) -> dict[str, Tensor]:
    """Solve a plan and give every edited parameter in its dense form, in float32."""
    data = needs_of(plan.edits)
    batches = windows(load_reader(network), texts_of(plan.data), "calibrate") if data else []
    folder = Path(tempfile.mkdtemp(prefix="layerwise-naive-"))
    try:
        solver = solve(network, plan.edits, batches, Journal(folder, {}), progress)
        dense: dict[str, Tensor] = {}
        for layer in network.layers():
            records = solver.finished(layer)
            tensors = network.fetch(layer) if records else {}
            for matrix in layer.matrices:
                if matrix.key in records:
                    name = f"{layer.path}.{matrix.parameter}"
                    room = dense.get(name)
                    if room is None:
                        room = tensors[matrix.parameter].float().to(network.device)
                    dense[name] = matrix.put(records[matrix.key].dense(), room, room)
        return dense
    finally:
        shutil.rmtree(folder, ignore_errors=True)
