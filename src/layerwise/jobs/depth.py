"""Plans of depth: which layers stay."""

from collections.abc import Sequence

import torch

from layerwise.core.errors import LayerwiseError
from layerwise.core.method import find
from layerwise.core.network import Network
from layerwise.core.plan import Plan
from layerwise.core.search import Space
from layerwise.core.stats import Scores
from layerwise.jobs.request import Planned, Request, identity
from layerwise.jobs.scoring import Trials, make_scores
from layerwise.jobs.session import Budget, Progress, load_reader, texts_of


def plan_depth(request: Request, network: Network, progress: Progress) -> Planned:
    """Which layers stay: by a score and `drop`, or by a search on the measured loss."""
    stack = network.stack
    count = layers_to_drop(request.budget, network)
    name = request.score or "greedy"
    if count == 0:
        kept = tuple(range(len(stack.layers)))
        scores = None
    elif name == "greedy" or find(name).family == "search":
        kept, scores = search_depth(request, network, name, count, progress), None
    else:
        span = {"span": count} if "span" in find(name, "score").options else {}
        merged = dict(request.options(find(name).name)) | span
        asked = request._replace(settings={**request.settings, find(name).name: merged})
        scores = make_scores(asked, network, name, progress)
        wiring = find("drop", "stack").bind({"count": count})(stack, scores)
        kept = tuple(visit.layer for visit in wiring)
    return assemble_depth(request, network, kept, scores)


def assemble_depth(
    request: Request, network: Network, kept: Sequence[int], scores: Scores | None
) -> Planned:
    """The plan that keeps these layers."""
    stack = network.stack
    sizes = layer_bytes(network)
    gone = [i for i in range(len(stack.layers)) if i not in kept]
    rows = [
        {
            "layer": layer.key,
            "option": "dropped" if layer.index in gone else "as is",
            "bytes": 0 if layer.index in gone else sizes[layer.index],
            "importance": scores.values.get(layer.key) if scores else None,
        }
        for layer in stack.layers
    ]
    plan = Plan(
        model=identity(network),
        target=request.target,  # type: ignore[arg-type]
        budget=request.budget.as_dict(),
        data=request.data,
        wiring={stack.name: list(kept)},
        fixed=request.keep,
    )
    nbytes = network.checkpoint.nbytes - sum(sizes[i] for i in gone)
    return Planned(plan, rows, nbytes, {}, None, scores, network.checkpoint.nbytes)


def layer_bytes(network: Network) -> list[int]:
    """Stored bytes of every layer of the first stack."""
    infos = network.stored.checkpoint.tensors
    return [
        sum(
            infos[stored].nbytes
            for stored, name in network.stored.owner.items()
            if name.startswith(f"{layer.path}.")
        )
        for layer in network.stack.layers
    ]


def layers_to_drop(budget: Budget, network: Network) -> int:
    """How many layers must go so that the largest of those that stay still fit.

    Raises:
        LayerwiseError: one layer alone exceeds the budget.
    """
    depth = len(network.stack.layers)
    if budget.depth is not None:
        if not 1 <= budget.depth <= depth:
            raise LayerwiseError(
                "--depth", allowed=f"1 to {depth} layers", found=budget.depth, fix="choose within"
            )
        return depth - budget.depth
    whole = network.checkpoint.nbytes
    limit = budget.bytes if budget.bytes is not None else int((budget.size or 1.0) * whole)
    sizes = sorted(layer_bytes(network))
    for count in range(depth):
        if whole - sum(sizes[:count]) <= limit:
            return count
    least = whole - sum(sizes[: depth - 1])
    raise LayerwiseError(
        "budget",
        allowed=f"at least --bytes {least} (--size {100 * least / whole:.1f}%), one layer alone",
        found=", ".join(f"--{k} {v}" for k, v in budget.as_dict().items()),
        fix="raise it, or choose --target compressed-tensors for fewer bits",
    )


def search_depth(
    request: Request, network: Network, name: str, count: int, progress: Progress
) -> tuple[int, ...]:
    """Search the layers to leave out on the measured loss of the select split."""
    trials = Trials(network, load_reader(network), texts_of(request.data))
    depth = len(network.stack.layers)
    total = sum(depth - i for i in range(count)) + 1
    done = iter(range(1, 1 << 60))

    def evaluate(gone: tuple[int, ...]) -> float:
        progress("searching layers", next(done), total)
        return trials.without(gone)

    def moves(gone: tuple[int, ...]) -> list[tuple[int, ...]]:
        return [tuple(sorted({*gone, i})) for i in range(depth) if i not in gone]

    space = Space((), moves, lambda gone: len(gone) == count)
    method = find(name, "search")
    options = {k: v for k, v in request.options(method.name).items() if k != "limit"}
    limit = int(request.options(method.name).get("limit", 10_000))
    found = method.bind(options, generator=torch.Generator().manual_seed(request.data.seed))
    trace = found(space, evaluate, limit)
    return tuple(i for i in range(depth) if i not in trace.state)
