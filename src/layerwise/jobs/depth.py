"""Plans of depth: which layers stay, which of their parts, and which are merged."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch

from layerwise.core.absent import unstored
from layerwise.core.adapters import nbytes_of
from layerwise.core.errors import LayerwiseError
from layerwise.core.fan import fan_out
from layerwise.core.lockstep import walk
from layerwise.core.method import find
from layerwise.core.network import Network
from layerwise.core.open import open_network, rewired
from layerwise.core.plan import Plan
from layerwise.core.reader import samples_of
from layerwise.core.search import Space
from layerwise.core.stack import Wiring
from layerwise.core.stats import Scores
from layerwise.core.stops import hidden
from layerwise.core.visits import each_once, entries_of
from layerwise.export import TARGETS
from layerwise.jobs.fates import depth_rows, own_bytes
from layerwise.jobs.request import Planned, Request, identity
from layerwise.jobs.scoring import counting, make_scores, trials_for
from layerwise.jobs.session import Budget, Progress, load_reader, texts_of
from layerwise.jobs.units import (
    able_to_go,
    layer_bytes,
    room_in,
    units_of,
    visited,
    wiring_without,
)


def plan_depth(request: Request, network: Network, progress: Progress) -> Planned:
    """Which units stay: by a score, by a search on the measured loss, merged, or tied."""
    count = units_to_drop(request.budget, network, request.parts)
    name = request.score or ("part_influence" if request.parts else "greedy")
    method = find(name)
    if bool(request.parts) != ("part_cosine" in method.needs) and method.family != "search":
        raise LayerwiseError(
            "--parts",
            allowed="with --score part_influence or greedy; other scores are of layers",
            found=f"{'+'.join(request.parts) or 'none'} with --score {name}",
            fix="choose another --score, or say which parts may go: --parts attention",
        )
    if method.family == "stack" and count:
        return merged(request, network, name, count, progress)
    open_ = able_to_go(network, request.keep, request.parts)
    most = most_that_can_go(network, open_, request.parts)
    if count > most:
        raise LayerwiseError(
            "budget",
            allowed=f"at most {most} {'parts' if request.parts else 'layers'} left out: those that "
            "keep the shape of their input and are not pinned by --keep, one of a stack stays",
            found=count,
            fix="raise the budget or unpin layers",
        )
    scores = None
    if count == 0:
        gone: Collection[str] = ()
    elif method.family == "search":
        gone = search_depth(request, network, name, count, open_, progress)
    else:
        span = {"span": count} if "span" in find(name, "score").options else {}
        merged_ = dict(request.options(method.name)) | span
        asked = request._replace(settings={**request.settings, method.name: merged_})
        scores = make_scores(asked, network, name, progress)
        gone = least_important(network, scores, count, open_, request.parts)
    return assemble_depth(request, network, wiring_without(network, gone), scores)


def most_that_can_go(network: Network, open_: Collection[str], parts: Sequence[str] = ()) -> int:
    """How many of them can go if one unit of every stack stays."""
    return sum(
        min(room_in(stack, parts), sum(key.startswith(f"{stack.name}/") for key in open_))
        for stack in network.stacks
    )


def least_important(
    network: Network, scores: Scores, count: int, open_: Collection[str], parts: Sequence[str] = ()
) -> list[str]:
    """The units that go: the least important of all stacks, or a span that `drop` chooses."""
    if scores.unit == "span":
        inside = {f"{network.stack.name}/{i}" for i in range(len(network.stack.layers))}
        fitting = {
            k: v for k, v in scores.values.items() if k in inside and _span(k, count) <= set(open_)
        }
        chosen = Scores(fitting, "span", scores.origin)
        wiring = find("drop", "stack").bind({"count": count})(network.stack, chosen)
        kept = {visit.layer for visit in wiring}
        return [layer.key for layer in network.stack.layers if layer.index not in kept]
    room = {stack.name: room_in(stack, parts) for stack in network.stacks}
    gone: list[str] = []
    for key in sorted(open_, key=lambda k: (scores.values[k], k)):
        name = key.partition("/")[0]
        if len(gone) < count and room[name]:
            room[name] -= 1
            gone.append(key)
    return gone


def _span(key: str, count: int) -> set[str]:
    stack, _, first = key.partition("/")
    return {f"{stack}/{i}" for i in range(int(first), int(first) + count)}


def merged(
    request: Request, network: Network, name: str, count: int, progress: Progress
) -> Planned:
    """The plan in which a method merges or ties so many layers of the longest stack.

    By a budget of bytes a method that ties takes the fewest with which the result fits.
    """
    stack, method = network.stack, find(name, "stack")
    if "count" not in method.options:
        raise LayerwiseError(
            f"--score {name}",
            allowed="a method that chooses layers",
            found="one that is told which",
            fix="write the order into the plan, or choose --score laco or tie",
        )
    if not 0 < count < len(stack.layers) or request.keep:
        raise LayerwiseError(
            f"--score {name}",
            allowed=f"1 to {len(stack.layers) - 1} layers that go, and no --keep",
            found=f"{count}, and --keep {' '.join(request.keep) or 'nothing'}",
            fix="raise the budget; name layers that stay in a plan written by hand",
        )
    given: dict[str, Any] = {}
    if "similarity" in method.given:
        tick = counting(progress, "merging layers", 4 * len(stack.layers))
        given["similarity"] = similarity_to(request, network, tick)

    def planned(number: int) -> Planned:
        choose = method.bind({**request.options(method.name), "count": number}, **given)
        order = entries_of(choose(stack, Scores({}, "layer", "")))
        return assemble_depth(request, network, {stack.name: order}, None)

    if request.budget.depth is not None or given:
        return planned(count)
    limit, least = most_bytes(request.budget, network), 0
    for number in range(1, len(stack.layers)):
        found = planned(number)
        if found.nbytes <= limit:
            return found
        least = min(least or found.nbytes, found.nbytes)
    raise LayerwiseError(
        "budget",
        allowed=f"at least --bytes {least} for what --score {name} shares",
        found=limit,
        fix="raise it, choose a smaller rank, or --target compact, which stores it once",
    )


def similarity_to(
    request: Request, network: Network, tick: Callable[[], None]
) -> Callable[[Wiring], float]:
    """Order -> mean cosine over documents of what the longest stack returns in it and as it is.

    Before any norm behind the stack, of all tokens of a document as one vector.
    """
    name = network.stack.name
    texts = texts_of(request.data)._replace(length=128)
    batches = samples_of(load_reader(network), texts, "select", 8)
    original = last_states(network, batches, name)

    def similarity(wiring: Wiring) -> float:
        order = {name: entries_of(wiring)}
        kind = request.dtype
        edited = open_network(request.model, wiring=order, device=request.device, dtype=kind)
        found = last_states(edited, batches, name)
        tick()
        cosines = [torch.cosine_similarity(a, b, 0) for a, b in zip(original, found, strict=True)]
        return float(torch.stack(cosines).mean().nan_to_num(-1.0))

    return similarity


def last_states(network: Network, batches: Sequence[Any], stack: str) -> list[torch.Tensor]:
    """What the last layer of a stack returns for each batch, flat, with one layer in memory."""
    last = next(s for s in network.stacks if s.name == stack).layers[-1]
    found: list[torch.Tensor] = []
    with torch.no_grad():
        for stop in walk(network, batches):
            if stop.kind == "leave" and stop.layer.path == last.path:
                lanes = sorted(stop.lanes, key=lambda lane: lane.batch)
                found = [hidden(lane.output).float().flatten().cpu() for lane in lanes]
    return found


def assemble_depth(
    request: Request, network: Network, wiring: Mapping[str, list[Any]], scores: Scores | None
) -> Planned:
    """The plan of an order that shortens the network."""
    sizes, runs = layer_bytes(network), visited(network, wiring)
    plan = Plan(
        model=identity(network),
        target=request.target,  # type: ignore[arg-type]
        budget={} if request.parts else request.budget.as_dict(),
        data=request.data,
        wiring=dict(wiring),
        fixed=request.keep,
        export=request.options(request.target),
    )
    shortened = rewired(network, wiring) if wiring else network
    target = TARGETS[request.target]
    nbytes = network.checkpoint.nbytes - sum(sizes.values())
    nbytes += sum(sizes[key] for key in (set(runs) if target.once else runs))
    nbytes += sum(map(nbytes_of, shortened.adapters.values())) if target.once else 0
    if target.once and all(map(each_once, wiring.values())):
        nbytes -= network.stored.dtype.itemsize * sum(
            matrix.size
            for layer in shortened.layers()
            for matrix in unstored(layer, shortened.visits.get(layer.path))
        )
    if target.rest is not None:
        size = network.stored.dtype.itemsize
        nbytes = target.rest(shortened, plan.export)
        nbytes += sum(target.nbytes(m, (), size) for la in shortened.layers() for m in la.matrices)
    own = own_bytes(shortened)
    rows = depth_rows(network, wiring, request.parts, scores, sizes, runs, own)
    return Planned(plan, rows, nbytes, {}, None, scores, network.checkpoint.nbytes)


def units_to_drop(budget: Budget, network: Network, parts: Sequence[str] = ()) -> int:
    """How many units must go so that the largest of those that stay still fit.

    Raises:
        LayerwiseError: one layer alone exceeds the budget, or one of bytes is to be met by parts.
    """
    depth, what = len(units_of(network, parts)), "parts" if parts else "layers"
    if budget.depth is not None:
        if not 1 <= budget.depth <= depth:
            raise LayerwiseError(
                "--depth", allowed=f"1 to {depth} {what}", found=budget.depth, fix="choose within"
            )
        return depth - budget.depth
    if parts:
        raise LayerwiseError(
            "--parts",
            allowed="a budget by --depth; --allow bits,part weighs parts by their bytes",
            found=", ".join(f"--{k} {v}" for k, v in budget.as_dict().items()),
            fix="say how many of them stay, such as --depth 75%",
        )
    whole, limit = network.checkpoint.nbytes, most_bytes(budget, network)
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


def most_bytes(budget: Budget, network: Network) -> int:
    """How many bytes a result may take."""
    share = (budget.size or 1.0) * network.checkpoint.nbytes
    return budget.bytes if budget.bytes is not None else int(share)


def search_depth(
    request: Request,
    network: Network,
    name: str,
    count: int,
    open_: Sequence[str],
    progress: Progress,
) -> tuple[str, ...]:
    """Search the units to leave out on the measured loss of the select split."""
    trials = trials_for(request, network)
    keys = list(open_)
    total = sum(len(keys) - i for i in range(count)) + 1
    tick = counting(progress, "searching parts" if request.parts else "searching layers", total)

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
