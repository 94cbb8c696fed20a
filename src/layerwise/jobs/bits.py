"""Plans of weights: a chain of methods per fusion group, exact costs within the budget."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from layerwise.core.chain import kind_left
from layerwise.core.damage import (
    Choice,
    Damage,
    Menu,
    Option,
    cost,
    left_out,
    predict_damage,
    staying,
)
from layerwise.core.errors import LayerwiseError
from layerwise.core.method import find
from layerwise.core.network import Network
from layerwise.core.plan import Edit, Plan, Step
from layerwise.core.stack import Group
from layerwise.core.stats import Scores
from layerwise.core.target import Target
from layerwise.core.weight import Sparse
from layerwise.jobs.edits import search_edits
from layerwise.jobs.gain import as_solved
from layerwise.jobs.menus import make_menus, option_errors, units, worth_it
from layerwise.jobs.request import Planned, Request, identity
from layerwise.jobs.scoring import make_scores
from layerwise.jobs.session import Progress
from layerwise.jobs.units import layer_bytes, places_in, unmistakable, wiring_without


def plan_bits(
    request: Request,
    network: Network,
    target: Target,
    progress: Progress,
    scores: Scores | None = None,
) -> Planned:
    """A chain per fusion group, exact costs within the budget; scores may be known already.

    Raises:
        LayerwiseError: the budget cannot be met.
    """
    menus, groups = make_menus(request, network, target), {g.key: g for g in units(network, target)}
    if request.score and find(request.score).family == "search":
        limit = limit_for(request, network, menus, groups, target)
        found = search_edits(request, network, in_unit(menus, request), limit, progress)
        planned = assemble(request, network, target, menus, None, found.choice, None)
        return planned._replace(note=str(found))
    menus = worth_it(menus)
    limit = limit_for(request, network, menus, groups, target)
    offer = priced(request, network, target, menus, groups, progress, scores)
    choice = chosen(request, offer, limit)
    return assemble(request, network, target, offer.menus, offer.damage, choice, offer.scores)


class Offer(NamedTuple):
    """What every group may get, what that is believed to cost in nats, and the scores behind it."""

    menus: Mapping[str, Menu]
    damage: Damage
    scores: Scores | None


def priced(
    request: Request,
    network: Network,
    target: Target,
    menus: Mapping[str, Menu],
    groups: Mapping[str, Group],
    progress: Progress,
    scores: Scores | None = None,
) -> Offer:
    """Menus with the damage of every option."""
    allocator = find(request.allocator, "allocate")
    name = request.score or ("sensitivity" if "scores" in allocator.needs else "")
    if scores is None and name and allocator.needs:
        scores = scores_of(request, network, target, progress)
    errors = None if allocator.needs else {g: (0.0,) * len(m.options) for g, m in menus.items()}
    damage = predicted(network, menus, groups, scores, progress, errors)
    if errors is None and not of_one_kind(menus):
        damage = as_solved(damage, menus, request, network)
    return Offer(menus, damage, scores)


def of_one_kind(menus: Mapping[str, Menu]) -> bool:
    """Whether all options leave the same kind of record, so that errors before solving compare."""
    return len({kind_left(o.chain[-1]) for o in options_of(menus)}) <= 1


def chosen(request: Request, offer: Offer, limit: int) -> Choice:
    """What the allocator takes of an offer within a limit, in the unit of the budget."""
    allocator = find(request.allocator, "allocate")
    choose = allocator.bind(request.options(allocator.name))
    return choose(offer.damage, in_unit(offer.menus, request), limit)


def options_of(menus: Mapping[str, Menu]) -> Iterator[Option]:
    """All options that change something."""
    return (option for menu in menus.values() for option in menu.options if option.chain)


def scores_of(request: Request, network: Network, target: Target, progress: Progress) -> Scores:
    """The scores that a request names, or sensitivities."""
    name = request.score or "sensitivity"
    return make_scores(with_trial(request, name, target), network, name, progress)


def predicted(
    network: Network,
    menus: Mapping[str, Menu],
    groups: Mapping[str, Group],
    scores: Scores | None,
    progress: Progress,
    errors: Mapping[str, tuple[float, ...]] | None = None,
) -> Damage:
    """The damage of every option of some groups, by scores and by errors, which may be known."""
    errors = option_errors(network, menus, groups, progress) if errors is None else errors
    first = {g.key: g.matrices[0] for g in groups.values()}
    scores = _of_groups(scores, groups) if scores else None
    known = scores.values if scores else {}
    owner = {k: m.layer if m.layer in known else m.fusion for k, m in first.items()}
    return predict_damage(scores, errors, owner)


def _of_groups(scores: Scores, groups: Mapping[str, Group]) -> Scores:
    """Scores in nats of groups that lie in several fusion groups: what these cost together."""
    values, trial = dict(scores.values), dict(scores.trial)
    for key, group in groups.items():
        own = list({m.fusion for m in group.matrices})
        if scores.nats and len(own) > 1 and values.keys() >= {*own}:
            values[key] = sum(values[f] for f in own)
            trial[key] = sum(trial[f] for f in own) / len(own)
    return replace(scores, values=values, trial=trial)


def with_trial(request: Request, name: str, target: Target) -> Request:
    """The request with zeros as the trial of its score, where its first method leaves zeros.

    What the user named stays, and so does what the score itself takes.
    """
    first = (request.method or target.method).partition(",")[0].rpartition("+")[2]
    score = find(name, "score")
    own = request.options(score.name)
    if "trial" not in score.options or "trial" in own or kind_left(Step(first)) is not Sparse:
        return request
    settings = {**request.settings, score.name: {**own, "trial": "magnitude"}}
    return request._replace(settings=settings)


def in_unit(menus: Mapping[str, Menu], request: Request) -> Mapping[str, Menu]:
    """Menus as an allocator sees them: sizes in the unit of the budget, bytes or weights."""
    if request.budget.sparsity is None:
        return menus
    return {
        group: Menu(group, tuple(option._replace(bytes=option.weights) for option in menu.options))
        for group, menu in menus.items()
    }


def outside_of(request: Request, network: Network, target: Target) -> int:
    """Bytes of the result beside the allocatable matrices."""
    if target.rest is not None:
        return target.rest(network, request.options(target.name))
    matrices = (m for stack in network.stacks for m in stack.matrices())
    size = network.stored.dtype.itemsize
    return network.stored.nbytes - sum(target.nbytes(m, (), size) for m in matrices)


def limit_for(
    request: Request,
    network: Network,
    menus: Mapping[str, Menu],
    groups: Mapping[str, Group],
    target: Target,
) -> int:
    """The budget of the allocatable matrices: in bytes, or in weights that are not zero.

    Raises:
        LayerwiseError: it is below what the smallest options need; the reachable value is shown.
    """
    budget, whole = request.budget, network.checkpoint.nbytes
    counted = in_unit(menus, request)
    held = sum(menu.options[0].bytes for g, menu in menus.items() if g not in groups)
    outside = outside_of(request, network, target) - held
    weights = sum(group.size for g, group in groups.items() if len(menus[g].options) > 1)
    pinned = held + sum(counted[g].options[0].bytes for g in groups if len(menus[g].options) == 1)
    least = least_bytes(counted)
    if budget.sparsity is not None:
        limit = weights + pinned - math.ceil(budget.sparsity * weights - 1e-6)
        most = math.floor(1000 * (1 - (least - pinned) / max(weights, 1))) / 10
        reachable = f"--sparsity {most}%"
    elif budget.bits is not None:
        limit = int(budget.bits * weights / 8) + pinned
        reachable = f"--bits {8 * (least - pinned) / max(weights, 1):.3f}"
    else:
        total = budget.bytes if budget.bytes is not None else int((budget.size or 1.0) * whole)
        limit = total - outside
        reachable = f"--bytes {least + outside} (--size {100 * (least + outside) / whole:.1f}%)"
    if least > limit:
        raise LayerwiseError(
            "budget",
            allowed=f"at {'most' if budget.sparsity else 'least'} {reachable}",
            found=", ".join(f"--{k} {v}" for k, v in budget.as_dict().items()),
            fix=f"{'lower' if budget.sparsity else 'raise'} it, unpin what --keep pins, allow "
            "smaller options with --set menu.bits or menu.share, or layers to go with "
            "--allow bits,layer",
        )
    return limit


def left_with_parts(network: Network, gone: Sequence[str]) -> int:
    """Bytes beside the matrices of layers that go because all of their parts do."""
    found, stored = 0, layer_bytes(network)
    for layer in network.layers():
        if layer.parts and all(f"{layer.key}/{part.name}" in gone for part in layer.parts):
            inside = sum(matrix.size for matrix in layer.matrices)
            found += stored[layer.key] - inside * network.stored.dtype.itemsize
    return found


def least_bytes(menus: Mapping[str, Menu]) -> int:
    """Bytes of the smallest choice, in which one unit stays."""
    inside: dict[str, int] = {}
    units: list[int] = []
    for menu in reversed(list(menus.values())):  # a unit comes before what it holds
        stays = [o.bytes for o in menu.options if not o.gone]
        size = min(stays) + inside.pop(menu.group, 0)
        if len(stays) < len(menu.options):
            units.append(size)
        else:
            inside[menu.inside] = inside.get(menu.inside, 0) + size
    return inside.get("", 0) + min(units, default=0)


def assemble(
    request: Request,
    network: Network,
    target: Target,
    menus: Mapping[str, Menu],
    damage: Damage | None,
    choice: Choice,
    scores: Scores | None,
) -> Planned:
    """The plan of a choice, and its table."""
    edits, rows = [], []
    members = {group.key: group.matrices for group in units(network, target)}
    there = staying(menus, choice)
    gone = left_out(menus, choice)
    wiring = wiring_without(network, gone)
    places = places_in(network, wiring)
    for group in there:
        option = menus[group].options[choice[group]]
        believed = damage.values[group][choice[group]] if damage else None
        stack, layer = group.split("/")[:2]
        rows.append(
            {
                "layer": f"{stack}/{layer}",
                "group": group,
                "option": option.label,
                "bytes": option.bytes,
                "importance": damage.importance.get(group) if damage else None,
                "damage": believed,
            }
        )
        if option.chain:
            for matrix in members[group]:
                place = places.get(matrix.layer, matrix.layer)
                edits.append(Edit(place + matrix.key.removeprefix(matrix.layer), option.chain))
            edits[-1] = Edit(edits[-1].select, option.chain, option.bytes, believed)
    plan = Plan(
        model=identity(network),
        target=request.target,  # type: ignore[arg-type]
        budget=request.budget.as_dict(),
        data=request.data,
        wiring=wiring,
        rewrites=request.rewrites,
        edits=unmistakable(edits, network, places),
        fixed=request.keep,
        export=request.options(target.name) if target.types else {},
    )
    whole = network.checkpoint.nbytes
    held = {g for g in menus if g not in members}
    outside = outside_of(request, network, target) - sum(menus[g].options[0].bytes for g in held)
    open_ = {g for g, menu in menus.items() if len(menu.options) > 1 and g not in held}
    weights = sum(m.size for group in open_ for m in members[group])
    taken = [(g, menus[g].options[choice[g]]) for g in there if g in open_]
    bits = 8 * sum(option.bytes for _, option in taken) / weights if weights else None
    left = sum(option.weights for _, option in taken)
    zeros = 1 - left / weights if weights and not gone else 0.0
    total = cost(menus, choice) + outside - left_with_parts(network, gone)
    return Planned(plan, rows, total, menus, damage, scores, whole, bits, zeros)
