"""One size for dense checkpoints: fewer layers, fewer channels and fewer heads, chosen together."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from layerwise.core.errors import LayerwiseError
from layerwise.core.find_widths import find_widths
from layerwise.core.network import Network
from layerwise.core.open import rewired
from layerwise.core.plan import Plan
from layerwise.core.select import selects
from layerwise.core.width import Width
from layerwise.jobs.contest import Contest, contest_on
from layerwise.jobs.fates import experts_told
from layerwise.jobs.fewer import able_experts, best_saliency, saliencies
from layerwise.jobs.joint import MOST
from layerwise.jobs.leaving import layers_alone, tried
from layerwise.jobs.narrow import Candidate, Dense, levels
from layerwise.jobs.request import Planned, Request
from layerwise.jobs.session import Progress
from layerwise.jobs.timed import CLOSE, Clock
from layerwise.jobs.units import able_to_go, wiring_without

#: shares of a width at which it is measured what its units are worth; between them it is a line
SHARES = (0.75, 0.5, 0.25)
#: plans that are solved and measured
SOLVED = 8


def plan_dense(request: Request, network: Network, progress: Progress) -> Planned:
    """Layers that go and widths of those that stay, with the least KL at a size or a speed.

    What layers and single widths cost is measured; sums of these say which plans are worth more.
    The best few are solved on a little text and measured on the select split, and so are those
    that take only layers or only one width. The best of all these is taken; for a speed, of those
    that have it when they are timed.

    Raises:
        LayerwiseError: nothing that may go gets as small, or as fast.
    """
    contest = contest_on(request, network)
    dense = _dense(request, network, contest, progress)
    sets: dict[tuple[str, ...], float] = {(): 0.0}
    if "layer" in request.allow:
        sets = _layer_sets(request, network, progress)
    clock = Clock(dense, contest.batches) if request.budget.speed else None
    fits = _fitting(dense, clock.times(list(sets)) if clock else None)
    found = [c for gone in sets for c in dense.candidates(gone, fits)]
    if not found:
        raise _impossible(dense, list(sets))
    curves = _curves(dense, contest, progress)
    depth = len(network.layers())

    def predicted(candidate: Candidate) -> float:
        left = 1 - len(candidate.gone) / depth
        worth = (curves[w.name](candidate.units[w.name]) for w in dense.widths)
        return sets[candidate.gone] + left * sum(worth)

    chosen = _shortlist(dense, found, predicted)
    rows, plans = [], []
    for number, candidate in enumerate(chosen, 1):
        plans.append(dense.plan(candidate))
        row = {
            "plan": dense.words(candidate),
            "layers left out": len(candidate.gone),
            "bytes": dense.nbytes(candidate),
            "predicted": predicted(candidate),
            "expected": contest.roughly(plans[-1]).estimate("kl").value,
        }
        rows.append(row | {"speed": clock.speed(candidate) if clock else None, "chosen": False})
        progress("solving plans", number, len(chosen))
    able = _fast_enough(request, rows)
    best = min(able, key=lambda i: rows[i]["expected"])
    rows[best]["chosen"] = True
    return _planned(dense, chosen[best], plans[best], rows)


def _dense(request: Request, network: Network, contest: Contest, progress: Progress) -> Dense:
    """What the budget may take of every layer, and which experts it takes first.

    Raises:
        LayerwiseError: it may take experts, and there are none.
    """
    found = find_widths(network) if "width" in request.allow else []
    experts = able_experts(network) if "expert" in request.allow else []
    if "expert" in request.allow and not experts:
        raise LayerwiseError(
            f"--allow expert for {type(network.module).__name__}",
            allowed="a mixture of experts that can change places, as many in every such layer",
            found="none, as far as shorter axes and trials in one layer tell",
            fix="allow width or layer",
        )
    widths = [w for w in (*found, *experts) if not _pinned(request, network, w)]
    dense = Dense(request, network, widths)
    alone = replace(dense, widths=[w for w in widths if not w.read])
    if not alone.widths:
        return dense
    nearest = {w.name: min(levels(w), key=lambda n, w=w: abs(n - w.units / 2)) for w in widths}
    fitting = alone.candidates((), _fitting(alone, None))
    sample = next((c for c in fitting if c != alone.whole), Candidate((), nearest))
    scores = saliencies(request, network, progress)
    return replace(dense, saliency=best_saliency(alone, scores, sample, contest, progress))


def _fitting(
    dense: Dense, time: Callable[[Candidate], float] | None
) -> Callable[[Candidate], bool]:
    """Whether a candidate is within the budget: of bytes, of products, or of predicted time."""
    budget, whole = dense.request.budget, dense.network.checkpoint.nbytes
    if time is not None:
        speed = budget.speed or 1.0
        return lambda candidate: time(candidate) * speed <= 1
    if budget.flops is not None:
        most = budget.flops * dense.products(dense.whole)
        return lambda candidate: dense.products(candidate) <= most
    limit = budget.bytes if budget.bytes is not None else int((budget.size or 1.0) * whole)
    return lambda candidate: dense.nbytes(candidate) <= limit


def _fast_enough(request: Request, rows: Sequence[Mapping[str, Any]]) -> list[int]:
    """The plans that are as fast as was asked for."""
    asked = request.budget.speed
    able = [i for i, row in enumerate(rows) if not asked or row["speed"] >= CLOSE * asked]
    if not able:
        fastest = max(row["speed"] for row in rows)
        raise LayerwiseError(
            "budget",
            allowed=f"a speed that was measured here, at most --speed {fastest:.2f}x",
            found=f"--speed {asked}x",
            fix="lower it, allow more with --allow width,layer, or time it on an idle machine",
        )
    return able


def _pinned(request: Request, network: Network, width: Width) -> bool:
    held = [m for la in network.layers() for m in la.matrices if width.holding(la.key, m.parameter)]
    return any(selects(pattern, matrix) for pattern in request.keep for matrix in held)


def _layer_sets(
    request: Request, network: Network, progress: Progress
) -> dict[tuple[str, ...], float]:
    """For every number of layers those that cost least together, and their measured KL.

    One after the other, the layer with the least KL alone and beside its neighbours that went.
    """
    able = able_to_go(network, request.keep)
    alone, pairs = layers_alone(able, request, network, progress)
    sets: list[tuple[str, ...]] = [()]
    for _ in range(int(MOST * len(network.layers()))):
        now = set(sets[-1])
        open_ = [key for key in able if key not in now]
        if not open_:
            break
        more = {
            key: alone[key]
            + sum(v for pair, v in pairs.items() if key in pair and now & {*pair} - {key})
            for key in open_
        }
        sets.append((*sets[-1], min(open_, key=lambda key: more[key])))
    shorter = [gone for gone in sets if _can_go(network, gone)]
    tasks = [({}, gone) for gone in shorter]
    return dict(
        zip(shorter, tried(request, network, tasks, "leaving layers out", progress), strict=True)
    )


def _can_go(network: Network, gone: Sequence[str]) -> bool:
    try:
        rewired(network, wiring_without(network, gone))
    except LayerwiseError:
        return False
    return True


def _curves(dense: Dense, contest: Contest, progress: Progress) -> dict[str, Any]:
    """What every width costs by the units that stay, the others as they are."""
    full = {width.name: width.units for width in dense.widths}
    found: dict[str, Any] = {}
    total = len(SHARES) * len(full)
    for width in dense.widths:
        points = {width.units: 0.0}
        for share in SHARES:
            units = min(levels(width), key=lambda n: abs(n - share * width.units))
            if units not in points:
                plan = dense.plan(Candidate((), full | {width.name: units}))
                points[units] = contest.roughly(plan).estimate("kl").value
            progress("measuring widths", len(found) * len(SHARES) + len(points) - 1, total)
        found[width.name] = _line(points)
    return found


def _line(points: Mapping[int, float]) -> Any:
    """Between measured points, straight lines; beyond the last one as steep as before it."""
    at = sorted(points, reverse=True)

    def value(units: int) -> float:
        if len(at) == 1:
            return 0.0
        below = next((i for i in range(1, len(at)) if at[i] <= units), len(at) - 1)
        high, low = at[below - 1], at[below]
        slope = (points[low] - points[high]) / (high - low)
        return points[high] + slope * (high - units)

    return value


def _shortlist(dense: Dense, found: Sequence[Candidate], predicted: Any) -> list[Candidate]:
    """The plans that are worth solving: the best few, and the best that take one thing alone."""
    ordered = sorted(found, key=predicted)
    chosen = ordered[:SOLVED]
    full = {w.name: w.units for w in dense.widths}
    for name in ("", *full):
        kept = {n: units for n, units in full.items() if n != name}
        alone = (c for c in ordered if kept.items() <= c.units.items() and not (name and c.gone))
        best = next(alone, None)
        if best is not None and best not in chosen:
            chosen.append(best)
    return chosen


def _planned(
    dense: Dense, candidate: Candidate, plan: Plan, rows: Sequence[Mapping[str, Any]]
) -> Planned:
    words = dense.words(candidate._replace(gone=()))
    layers = [
        {
            "layer": layer.key,
            "option": "left out"
            if layer.key in candidate.gone
            else "; ".join([words, *experts_told(plan, layer.key)]),
            "bytes": dense.layer_bytes(layer, candidate),
            "importance": None,
            "damage": None,
        }
        for layer in dense.network.layers()
    ]
    nbytes, whole = dense.nbytes(candidate), dense.network.checkpoint.nbytes
    note = f"experts by {dense.saliency.origin}" if plan.units else ""
    return Planned(plan, layers, nbytes, {}, None, None, whole, note=note, edge=rows)


def _impossible(dense: Dense, sets: Sequence[tuple[str, ...]]) -> LayerwiseError:
    least = {w.name: levels(w)[-1] for w in dense.widths}
    smallest = [Candidate(gone, least) for gone in sets]
    whole, nbytes = dense.network.checkpoint.nbytes, min(map(dense.nbytes, smallest))
    products = min(map(dense.products, smallest)) / dense.products(dense.whole)
    asked = dense.request.budget.as_dict()
    reachable = f"at least --bytes {nbytes} (--size {100 * nbytes / whole:.1f}%)"
    reachable = f"at least --flops {100 * products:.1f}%" if "flops" in asked else reachable
    if "speed" in asked:
        reachable = "a speed that the smallest network has here, as far as its parts were timed"
    return LayerwiseError(
        "budget",
        allowed=reachable,
        found=", ".join(f"--{k} {v}" for k, v in asked.items()),
        fix="relax it, allow more with --allow width,expert,layer, unpin what --keep pins, or "
        "choose --target compressed-tensors for fewer bits",
    )
