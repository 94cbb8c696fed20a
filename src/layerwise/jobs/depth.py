"""Plans of depth: which layers stay."""

from collections.abc import Collection, Sequence
from typing import Any

import torch

from layerwise.core.errors import LayerwiseError
from layerwise.core.fan import fan_out
from layerwise.core.method import find
from layerwise.core.network import Network
from layerwise.core.open import rewired
from layerwise.core.plan import Plan
from layerwise.core.search import Space
from layerwise.core.select import selects
from layerwise.core.stack import Layer
from layerwise.core.stats import Scores
from layerwise.export import TARGETS
from layerwise.jobs.request import Planned, Request, identity
from layerwise.jobs.scoring import counting, make_scores, trials_for
from layerwise.jobs.session import Budget, Progress


def plan_depth(request: Request, network: Network, progress: Progress) -> Planned:
    """Which layers stay: by a score and `drop`, or by a search on the measured loss."""
    count = layers_to_drop(request.budget, network)
    name = request.score or "greedy"
    open_ = able_to_go(network, request.keep)
    if count > most_that_can_go(network, open_):
        raise LayerwiseError(
            "budget",
            allowed=f"at most {most_that_can_go(network, open_)} layers left out: those that keep "
            "the shape of their input and are not pinned by --keep, one of a stack stays",
            found=count,
            fix="raise the budget or unpin layers",
        )
    scores = None
    if count == 0:
        gone: Collection[str] = ()
    elif name == "greedy" or find(name).family == "search":
        gone = search_depth(request, network, name, count, open_, progress)
    else:
        span = {"span": count} if "span" in find(name, "score").options else {}
        merged = dict(request.options(find(name).name)) | span
        asked = request._replace(settings={**request.settings, find(name).name: merged})
        scores = make_scores(asked, network, name, progress)
        gone = least_important(network, scores, count, open_)
    return assemble_depth(request, network, gone, scores)


def able_to_go(network: Network, keep: Collection[str] = ()) -> list[Layer]:
    """The layers that can be left out.

    They keep the shape of their input, no selector pins them, and the architecture can be built
    without them, which is tried where the layers of a stack differ.
    """
    return [
        layer
        for stack in network.stacks
        for layer in stack.layers
        if layer.keeps_shape
        and not any(selects(pattern, matrix) for pattern in keep for matrix in layer.matrices)
        and (len({_kind(other) for other in stack.layers}) == 1 or _can_go(network, layer))
    ]


def _kind(layer: Layer) -> tuple[Any, ...]:
    return tuple((name, p.shape) for name, p in layer.module.named_parameters())


def _can_go(network: Network, layer: Layer) -> bool:
    try:
        rewired(network, wiring_without(network, [layer.key]))
    except LayerwiseError:
        return False
    return True


def most_that_can_go(network: Network, open_: Collection[Layer]) -> int:
    """How many of them can go if one layer of every stack stays."""
    return sum(
        min(len(stack.layers) - 1, sum(layer.stack == stack.name for layer in open_))
        for stack in network.stacks
    )


def least_important(
    network: Network, scores: Scores, count: int, open_: Collection[Layer]
) -> list[str]:
    """The layers that `drop` leaves out: the least important of all stacks, or a span of one."""
    keys = {layer.key for layer in open_}
    if scores.unit == "span":
        inside = {f"{network.stack.name}/{i}" for i in range(len(network.stack.layers))}
        fitting = {
            k: v for k, v in scores.values.items() if k in inside and _span(k, count) <= keys
        }
        chosen = Scores(fitting, "span", scores.origin)
        wiring = find("drop", "stack").bind({"count": count})(network.stack, chosen)
        return _left_out(network, {network.stack.name: [v.layer for v in wiring]})
    room = {stack.name: len(stack.layers) - 1 for stack in network.stacks}
    gone: list[str] = []
    for key in sorted(keys, key=lambda k: (scores.values[k], k)):
        name = key.partition("/")[0]
        if len(gone) < count and room[name]:
            room[name] -= 1
            gone.append(key)
    return gone


def _span(key: str, count: int) -> set[str]:
    stack, _, first = key.partition("/")
    return {f"{stack}/{i}" for i in range(int(first), int(first) + count)}


def _left_out(network: Network, kept: dict[str, list[int]]) -> list[str]:
    return [
        layer.key
        for stack in network.stacks
        for layer in stack.layers
        if stack.name in kept and layer.index not in kept[stack.name]
    ]


def wiring_without(network: Network, gone: Collection[str]) -> dict[str, list[int]]:
    """The layers that stay, of every stack that loses one."""
    kept = {s.name: [la.index for la in s.layers if la.key not in gone] for s in network.stacks}
    return {s.name: kept[s.name] for s in network.stacks if len(kept[s.name]) < len(s.layers)}


def assemble_depth(
    request: Request, network: Network, gone: Collection[str], scores: Scores | None
) -> Planned:
    """The plan that leaves these layers out."""
    sizes = layer_bytes(network)
    rows = [
        {
            "layer": layer.key,
            "option": "dropped" if layer.key in gone else "as is",
            "bytes": 0 if layer.key in gone else sizes[layer.key],
            "importance": scores.values.get(layer.key) if scores else None,
        }
        for layer in network.layers()
    ]
    plan = Plan(
        model=identity(network),
        target=request.target,  # type: ignore[arg-type]
        budget=request.budget.as_dict(),
        data=request.data,
        wiring=wiring_without(network, gone),
        fixed=request.keep,
        export=request.options(request.target),
    )
    nbytes = network.checkpoint.nbytes - sum(sizes[key] for key in gone)
    target = TARGETS[request.target]
    if target.rest is not None:
        kept, size = rewired(network, plan.wiring), network.stored.dtype.itemsize
        nbytes = target.rest(kept, plan.export)
        nbytes += sum(target.nbytes(m, (), size) for la in kept.layers() for m in la.matrices)
    return Planned(plan, rows, nbytes, {}, None, scores, network.checkpoint.nbytes)


def layer_bytes(network: Network) -> dict[str, int]:
    """Stored bytes of every layer."""
    infos = network.stored.checkpoint.tensors
    return {
        layer.key: sum(
            infos[stored].nbytes
            for stored, name in network.stored.owner.items()
            if name.startswith(f"{layer.path}.")
        )
        for layer in network.layers()
    }


def layers_to_drop(budget: Budget, network: Network) -> int:
    """How many layers must go so that the largest of those that stay still fit.

    Raises:
        LayerwiseError: one layer alone exceeds the budget.
    """
    depth = len(network.layers())
    if budget.depth is not None:
        if not 1 <= budget.depth <= depth:
            raise LayerwiseError(
                "--depth", allowed=f"1 to {depth} layers", found=budget.depth, fix="choose within"
            )
        return depth - budget.depth
    whole = network.checkpoint.nbytes
    limit = budget.bytes if budget.bytes is not None else int((budget.size or 1.0) * whole)
    sizes = sorted(layer_bytes(network).values())
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
    request: Request,
    network: Network,
    name: str,
    count: int,
    open_: Collection[Layer],
    progress: Progress,
) -> tuple[str, ...]:
    """Search the layers to leave out on the measured loss of the select split."""
    trials = trials_for(request, network)
    keys = [layer.key for layer in open_]
    total = sum(len(keys) - i for i in range(count)) + 1
    tick = counting(progress, "searching layers", total)

    def evaluate(candidates: Sequence[tuple[str, ...]]) -> list[float]:
        return fan_out(trials.without, candidates, request.engine, tick)

    def moves(gone: tuple[str, ...]) -> list[tuple[str, ...]]:
        ahead = [tuple(k for k in keys if k in gone or k == key) for key in keys if key not in gone]
        return [move for move in ahead if all(wiring_without(network, move).values())]

    space = Space((), moves, lambda gone: len(gone) == count)
    method = find(name, "search")
    options = {k: v for k, v in request.options(method.name).items() if k != "limit"}
    limit = int(request.options(method.name).get("limit", 10_000))
    found = method.bind(options, generator=torch.Generator().manual_seed(request.data.seed))
    return found(space, evaluate, limit).state
