"""One budget for bits, layers and parts: fewer bits here, a layer less there, as costs least."""

from collections.abc import Callable, Mapping
from functools import cache
from math import inf
from typing import Any

from layerwise.core.chain import nearest
from layerwise.core.damage import Choice, Damage, Menu, Option, left_out, staying, total
from layerwise.core.errors import LayerwiseError
from layerwise.core.method import find
from layerwise.core.network import Network
from layerwise.core.open import rewired
from layerwise.core.plan import Step
from layerwise.core.stack import Group, Matrix
from layerwise.core.target import Target
from layerwise.jobs.bits import (
    Offer,
    assemble,
    limit_for,
    of_one_kind,
    outside_of,
    predicted,
    scores_of,
)
from layerwise.jobs.contest import contest_on
from layerwise.jobs.gain import as_solved
from layerwise.jobs.leaving import Tried, as_measured, tried, with_leaving
from layerwise.jobs.menus import make_menus, units, worth_it
from layerwise.jobs.request import Planned, Request
from layerwise.jobs.session import Progress
from layerwise.jobs.units import (
    able_to_go,
    layer_bytes,
    part_names,
    units_of,
    wiring_without,
)

#: the largest share of the layers, or of the parts, that a joint plan leaves out
MOST = 0.5
#: plans that are solved at most; times that what they leave out together is measured
SOLVED, ROUNDS = 5, 4


def plan_joint(request: Request, network: Network, target: Target, progress: Progress) -> Planned:
    """Bits for every group and a number of layers that go, chosen together.

    For every number of layers the exact least predicted damage within the budget is found. What
    these plans leave out together is measured, and they are found anew, until none leaves out what
    was not measured. This edge between fewer layers and fewer bits is then measured on the select
    split with matrices just rounded, and the best plans once more, solved on a little text.
    """
    groups = {g.key: g for g in units(network, target)}
    menus = menus_with_layers(request, network, target, groups)
    limit = limit_for(request, network, menus, groups, target)
    plain, offer = priced_with_layers(request, network, target, menus, groups, progress)
    damage, allocator = offer.damage, find(request.allocator, "allocate")
    options = request.options(allocator.name)
    wanted = options.get("gone", -1)
    names = part_names(network) if "part" in request.allow else ()
    most = int(MOST * len(units_of(network, names)))
    counts = range(most + 1) if wanted < 0 else [wanted]
    alone = plain if of_one_kind(menus) else damage  # where all stay, the plan of bits alone

    def solutions(damage: Damage) -> list[Choice]:
        found: list[Choice] = []
        for count in counts:
            choose = allocator.bind(options | {"gone": count})
            try:
                found.append(choose(damage if count else alone, menus, limit))
            except LayerwiseError:
                continue
        return found or [allocator.bind(options)(damage, menus, limit)]

    found, seen = solutions(damage), {*damage.pairs}
    for _ in range(ROUNDS):
        sets = dict.fromkeys(tuple(left_out(menus, choice)) for choice in found)
        new = [gone for gone in sets if len(gone) > 1 and gone not in seen]
        if not new:
            break
        bare: list[Tried] = [({}, gone) for gone in new]
        together = tried(request, network, bare, "leaving more out", progress)
        for gone, kl in zip(new, together, strict=True):
            plain, damage = as_measured(plain, gone, kl), as_measured(damage, gone, kl)
        found, seen = solutions(damage), seen.union(new)
    tasks = [(_chains(menus, groups, choice), left_out(menus, choice)) for choice in found]
    measured = tried(request, network, tasks, "measuring plans", progress)
    what = "parts" if "part" in request.allow else "layers"
    damages = plain, damage
    rows = [_row(what, menus, damages, *each) for each in zip(found, measured, strict=True)]

    @cache
    def made(i: int) -> Planned:
        return assemble(request, network, target, menus, damage, found[i], offer.scores)

    best = _best(request, network, made, rows, progress) if len(found) > 1 else 0
    rows[best]["chosen"] = True
    return made(best)._replace(edge=rows)


def _best(
    request: Request,
    network: Network,
    made: Callable[[int], Planned],
    rows: list[dict[str, Any]],
    progress: Progress,
) -> int:
    """The best plan, by its number: those that promise most are solved on a little text and
    measured, until none promises more than the best of them has shown.
    """
    contest, shown = contest_on(request, network), dict[int, float]()
    for i in sorted(range(len(rows)), key=lambda i: rows[i]["expected"])[:SOLVED]:
        if rows[i]["expected"] >= min(shown.values(), default=inf):
            break
        progress("solving plans", len(shown), SOLVED)
        shown[i] = contest.roughly(made(i).plan).estimate("kl").value
        rows[i] |= {"expected": shown[i], "solved": True}
    return min(shown, key=lambda i: shown[i])


def menus_with_layers(
    request: Request, network: Network, target: Target, groups: Mapping[str, Group]
) -> dict[str, Menu]:
    """The menus of all groups, those of a layer or a part that can go behind its own.

    Raises:
        LayerwiseError: the allocator does not know units that go.
    """
    allocator = find(request.allocator, "allocate")
    if "gone" not in allocator.options:
        raise LayerwiseError(
            f"--allocator {request.allocator}",
            allowed="one that weighs layers against bits: knapsack",
            found=allocator.name,
            fix="leave --allocator or --allow out",
        )
    wide = [key for key, g in groups.items() if len({m.layer for m in g.matrices}) > 1]
    if wide:
        raise LayerwiseError(
            f"--allow {','.join(request.allow)} with target {target.name}",
            allowed="matrices whose options belong to one layer",
            found=f"{wide[0]}, which shares its option over all layers",
            fix="leave --allow out, or use another target",
        )
    menus = worth_it(make_menus(request, network, target))
    if "part" in request.allow:
        nothing = dict.fromkeys(parts_that_can_go(request, network), 0)
        return _with_units(menus, groups, nothing, lambda m: f"{m.layer}/{m.part}")
    sizes = bytes_beside(request, network, target)
    return _with_units(menus, groups, sizes, lambda m: m.layer)


def parts_that_can_go(request: Request, network: Network) -> list[str]:
    """The parts that can be left out and stored as nothing: no experts, which share a tensor."""
    shared = {
        f"{matrix.layer}/{matrix.part}"
        for layer in network.layers()
        for matrix in layer.matrices
        if matrix.expert is not None
    }
    return [
        part
        for part in able_to_go(network, request.keep, part_names(network))
        if part not in shared
    ]


def priced_with_layers(
    request: Request,
    network: Network,
    target: Target,
    menus: Mapping[str, Menu],
    groups: Mapping[str, Group],
    progress: Progress,
) -> tuple[Damage, Offer]:
    """The damage of every option just rounded, and the offer with that of options as solved."""
    inner = {g: menu for g, menu in menus.items() if g in groups}
    layers = [name for name in menus if name not in groups]
    scores = scores_of(request, network, target, progress)
    plain = predicted(network, inner, groups, scores, progress)
    plain = with_leaving(plain, layers, request, network, progress)
    return plain, Offer(menus, as_solved(plain, inner, request, network), scores)


def bytes_beside(request: Request, network: Network, target: Target) -> dict[str, int]:
    """Bytes of every layer that can go which belong to no matrix of it."""
    size, stored = network.stored.dtype.itemsize, layer_bytes(network)
    layers = {layer.key: layer for layer in network.layers()}
    able = able_to_go(network, request.keep)
    if target.rest is None:
        plain = {k: sum(target.nbytes(m, (), size) for m in layers[k].matrices) for k in able}
        return {key: stored[key] - plain[key] for key in able}
    found: dict[str, int] = {}
    kinds: dict[Any, int] = {}
    whole = outside_of(request, network, target)
    for key in able:
        kind = tuple(layers[key].shapes.items())
        if kind not in kinds:
            fewer = rewired(network, wiring_without(network, [key]))
            kinds[kind] = whole - outside_of(request, fewer, target)
        found[key] = kinds[kind]
    return found


def _with_units(
    menus: Mapping[str, Menu],
    groups: Mapping[str, Group],
    sizes: Mapping[str, int],
    unit_of: Callable[[Matrix], str],
) -> dict[str, Menu]:
    """The menus of groups, behind that of the unit they are in, which has `sizes` beside them."""
    found: dict[str, Menu] = {}
    for group, menu in menus.items():
        unit = unit_of(groups[group].matrices[0])
        if unit in sizes and unit not in found:
            stays, goes = Option((), sizes[unit], "stays"), Option((), 0, "left out", gone=True)
            found[unit] = Menu(unit, (stays, goes))
        found[group] = menu._replace(inside=unit) if unit in sizes else menu
    return found


def _row(
    what: str,
    menus: Mapping[str, Menu],
    damages: tuple[Damage, Damage],
    choice: Choice,
    measured: float,
) -> dict[str, Any]:
    """The layers that go in a choice, and its damage: predicted, measured and expected.

    Measured is the choice with matrices just rounded. What that is beside its own prediction is
    expected of the choice with matrices solved, too, until it is.
    """
    plain, solved = (total(damage, menus, choice) for damage in damages)
    return {
        f"{what} left out": len(left_out(menus, choice)),
        "predicted": solved,
        "rounded, predicted": plain,
        "rounded, measured": measured,
        "expected": solved * measured / max(plain, 1e-12),
        "solved": False,
        "chosen": False,
    }


def _chains(
    menus: Mapping[str, Menu], groups: Mapping[str, Group], choice: Choice
) -> dict[str, tuple[Step, ...]]:
    """What every matrix gets, without statistics."""
    chosen = {g: menus[g].options[choice[g]].chain for g in staying(menus, choice)}
    plain = {g: nearest(chain) for g, chain in chosen.items() if chain}
    return {m.key: chain for g, chain in plain.items() for m in groups[g].matrices}
