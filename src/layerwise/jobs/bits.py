"""Plans of bits: a chain of methods per fusion group, exact bytes within the budget."""

from collections.abc import Mapping, Sequence
from typing import Any, get_args

from torch import Tensor

from layerwise.core.damage import Choice, Damage, Menu, Option, cost, predict_damage, staying
from layerwise.core.errors import LayerwiseError
from layerwise.core.method import find
from layerwise.core.network import Network
from layerwise.core.plan import Edit, Plan, Step, label
from layerwise.core.select import selects
from layerwise.core.stack import Group, Matrix
from layerwise.core.stats import Scores
from layerwise.core.target import Refuses, Target, refusals
from layerwise.jobs.request import Planned, Request, identity
from layerwise.jobs.scoring import make_scores
from layerwise.jobs.session import Progress
from layerwise.jobs.solve import nearest, run_chain
from layerwise.jobs.units import wiring_without

#: weights of a matrix on which an encoder is priced that searches for its scales
PRICED = 1 << 17


def plan_bits(request: Request, network: Network, target: Target, progress: Progress) -> Planned:
    """A chain per fusion group, exact bytes within the budget."""
    menus = make_menus(request, network, target)
    groups = {g.key: g for g in units(network, target)}
    limit = bytes_for(request, network, menus, groups, target)
    allocator = find(request.allocator, "allocate")
    scores = None
    if allocator.name == "uniform":
        values = {g: (0.0,) * len(m.options) for g, m in menus.items()}
        damage = Damage(values, dict.fromkeys(menus, 0.0))
    else:
        scores, damage = predicted(request, network, menus, groups, progress)
    choice = allocator.bind(request.options(allocator.name))(damage, menus, limit)
    return assemble(request, network, target, menus, damage, choice, scores)


def predicted(
    request: Request,
    network: Network,
    menus: Mapping[str, Menu],
    groups: Mapping[str, Group],
    progress: Progress,
) -> tuple[Scores, Damage]:
    """What the scores say of every group, and the damage of its options."""
    scores = make_scores(request, network, request.score or "sensitivity", progress)
    errors = option_errors(network, menus, groups, progress)
    first = {g.key: g.matrices[0] for g in groups.values()}
    owner = {k: m.layer if m.layer in scores.values else m.fusion for k, m in first.items()}
    return scores, predict_damage(scores, errors, owner)


def units(network: Network, target: Target) -> list[Group]:
    """What gets an option of its own: fusion groups, or matrices where the format allows it."""
    groups = [group for stack in network.stacks for group in stack.groups()]
    if target.fused:
        return groups
    return [Group(m.key, (m,)) for group in groups for m in group.matrices]


def outside_of(request: Request, network: Network, target: Target) -> int:
    """Bytes of the result beside the allocatable matrices."""
    if target.rest is not None:
        return target.rest(network, request.options(target.name))
    matrices = (m for stack in network.stacks for m in stack.matrices())
    size = network.stored.dtype.itemsize
    return network.stored.nbytes - sum(target.nbytes(m, (), size) for m in matrices)


def make_menus(request: Request, network: Network, target: Target) -> dict[str, Menu]:
    """Options of every fusion group that the target can hold, with exact bytes."""
    options = request.options("menu")
    bits = options.get("bits", [2, 3, 4, 5, 6, 8])
    widths = options.get("group", [32, 128])
    chains: list[tuple[Step, ...]] = [()]
    for method in (request.method or target.method).split(","):
        named = types_of(method, target)
        if named:
            axes: list[dict[str, Any]] = [{"type": t} for t in listed(options.get("type", named))]
        else:
            axes = [{"bits": b, "group": g} for b in listed(bits) for g in listed(widths)]
        chains += [chain_of(request, method, axis) for axis in axes]
    itemsize = network.stored.dtype.itemsize
    refuses = refusals(target, network)
    menus = {}
    for group in units(network, target):
        held = [c for c in chains if _held(group, c, refuses, request.keep)]
        priced = [
            Option(c, sum(target.nbytes(m, c, itemsize) for m in group.matrices), label(c))
            for c in held
        ]
        ordered = sorted(priced, key=lambda o: (bool(o.chain), -o.bytes))
        menus[group.key] = Menu(group.key, tuple(ordered))
    return menus


def types_of(method: str, target: Target) -> list[str]:
    """The types that a chain can round to; none where it is chosen by bits and groups."""
    for name in method.split("+"):
        option = find(name, "weight").options.get("type")
        if option is not None:
            return list(target.types or get_args(option.annotation))
    return []


def listed(value: Any) -> list[Any]:
    """A value, or several, as a list."""
    return value if isinstance(value, list) else [value]


def chain_of(request: Request, method: str, grid: Mapping[str, Any]) -> tuple[Step, ...]:
    """The steps of a method such as `qep+gptq`, with the grid for those that have one."""
    steps = []
    for name in method.split("+"):
        found = find(name, "weight")
        own = dict(grid) if grid.keys() <= found.options.keys() else {}
        steps.append(Step(name, request.options(found.name) | own))
    return tuple(steps)


def _held(group: Group, chain: tuple[Step, ...], refuses: Refuses, keep: Sequence[str]) -> bool:
    """Whether every matrix of a group may take a chain."""
    return not chain or not any(
        any(selects(pattern, matrix) for pattern in keep)
        or matrix.role == "router"
        or refuses(matrix, chain)
        for matrix in group.matrices
    )


def bytes_for(
    request: Request,
    network: Network,
    menus: Mapping[str, Menu],
    groups: Mapping[str, Group],
    target: Target,
) -> int:
    """The budget in bytes of the allocatable matrices.

    Raises:
        LayerwiseError: it is below what the smallest options need; the reachable value is shown.
    """
    budget, whole = request.budget, network.checkpoint.nbytes
    held = sum(menu.options[0].bytes for g, menu in menus.items() if g not in groups)
    outside = outside_of(request, network, target) - held
    weights = sum(group.size for g, group in groups.items() if len(menus[g].options) > 1)
    pinned = held + sum(menus[g].options[0].bytes for g in groups if len(menus[g].options) == 1)
    least = least_bytes(menus)
    if budget.bits is not None:
        limit = int(budget.bits * weights / 8) + pinned
        reachable = f"--bits {8 * (least - pinned) / max(weights, 1):.3f}"
    else:
        total = budget.bytes if budget.bytes is not None else int((budget.size or 1.0) * whole)
        limit = total - outside
        reachable = f"--bytes {least + outside} (--size {100 * (least + outside) / whole:.1f}%)"
    if least > limit:
        raise LayerwiseError(
            "budget",
            allowed=f"at least {reachable}",
            found=", ".join(f"--{k} {v}" for k, v in budget.as_dict().items()),
            fix="raise it, unpin what --keep pins, allow smaller options with --set menu.bits, or "
            "let layers go as well with --allow bits,layer",
        )
    return limit


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


def option_errors(
    network: Network, menus: Mapping[str, Menu], groups: Mapping[str, Group], progress: Progress
) -> dict[str, tuple[float, ...]]:
    """Squared error of every option, with its grid rounded to nearest, relative to the weights.

    Relative to those of the whole fusion group, which is what sensitivities are measured on.
    """
    errors: dict[str, tuple[float, ...]] = {}
    layers = network.layers()
    inside: dict[str, list[Group]] = {layer.key: [] for layer in layers}
    for group in groups.values():
        inside[group.matrices[0].layer].append(group)
    for done, layer in enumerate(layers, 1):
        tensors = network.fetch(layer)
        norms: dict[str, float] = {}
        for matrix in layer.matrices:
            weight = matrix.view(tensors[matrix.parameter]).float()
            norms[matrix.fusion] = norms.get(matrix.fusion, 0.0) + weight.square().sum().item()
        for group in inside[layer.key]:
            below = norms[group.matrices[0].fusion]
            errors[group.key] = tuple(
                _error(group.matrices, tensors, option.chain) / max(below, 1e-300)
                for option in menus[group.key].options
            )
        progress("pricing options", done, len(layers))
    return errors


def _error(
    matrices: Sequence[Matrix], tensors: Mapping[str, Tensor], chain: tuple[Step, ...]
) -> float:
    if not chain:
        return 0.0
    plain = nearest(chain)
    above = 0.0
    for matrix in matrices:
        weight = matrix.view(tensors[matrix.parameter])
        some = weight if plain != chain else weight[:: max(1, matrix.size // PRICED)]
        error = run_chain(some, {}, plain).dense().float() - some.float()
        above += error.square().sum().item() * len(weight) / len(some)
    return above


def assemble(
    request: Request,
    network: Network,
    target: Target,
    menus: Mapping[str, Menu],
    damage: Damage,
    choice: Choice,
    scores: Scores | None,
) -> Planned:
    """The plan of a choice, and its table."""
    edits, rows = [], []
    members = {group.key: group.matrices for group in units(network, target)}
    there = staying(menus, choice)
    gone = {g for g in there if menus[g].options[choice[g]].gone}
    wiring = wiring_without(network, gone)
    places = {
        f"{name}/{layer}": f"{name}/{place}"
        for name, order in wiring.items()
        for place, layer in enumerate(order)
    }
    for group in there:
        option = menus[group].options[choice[group]]
        believed = damage.values[group][choice[group]]
        stack, layer = group.split("/")[:2]
        rows.append(
            {
                "layer": f"{stack}/{layer}",
                "group": group,
                "option": option.label,
                "bytes": option.bytes,
                "importance": damage.importance.get(group),
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
        edits=tuple(edits),
        fixed=request.keep,
        export=request.options(target.name) if target.types else {},
    )
    whole = network.checkpoint.nbytes
    held = {g for g in menus if g not in members}
    outside = outside_of(request, network, target) - sum(menus[g].options[0].bytes for g in held)
    open_ = [g for g, menu in menus.items() if len(menu.options) > 1 and g not in held]
    weights = sum(m.size for group in open_ for m in members[group])
    taken = sum(menus[g].options[choice[g]].bytes for g in open_ if g in there)
    total = cost(menus, choice) + outside
    bits = 8 * taken / weights if weights else None
    return Planned(plan, rows, total, menus, damage, scores, whole, bits)
