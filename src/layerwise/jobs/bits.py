"""Plans of bits: a chain of methods per fusion group, exact bytes within the budget."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from layerwise.core.damage import Choice, Damage, Menu, Option, cost, predict_damage
from layerwise.core.errors import LayerwiseError
from layerwise.core.method import find
from layerwise.core.network import Network
from layerwise.core.plan import Edit, Plan, Step, label, selects
from layerwise.core.stack import Group, Matrix
from layerwise.core.stats import Scores
from layerwise.core.target import Refuses, Target, refusals
from layerwise.jobs.request import Planned, Request, identity
from layerwise.jobs.scoring import make_scores
from layerwise.jobs.session import Budget, Progress
from layerwise.jobs.solve import run_chain


def plan_bits(request: Request, network: Network, target: Target, progress: Progress) -> Planned:
    """A chain per fusion group, exact bytes within the budget."""
    menus = make_menus(request, network, target)
    groups = {g.key: g for stack in network.stacks for g in stack.groups()}
    limit = bytes_for(request.budget, network, menus, groups)
    allocator = find(request.allocator, "allocate")
    scores = None
    if allocator.name == "uniform":
        values = {g: (0.0,) * len(m.options) for g, m in menus.items()}
        damage = Damage(values, dict.fromkeys(menus, 0.0))
    else:
        scores = make_scores(request, network, request.score or "sensitivity", progress)
        errors = option_errors(network, menus, groups, progress)
        owner = {g.key: g.matrices[0].layer for g in groups.values()}
        damage = predict_damage(scores, errors, owner)
    choice = allocator.bind(request.options(allocator.name))(damage, menus, limit)
    return assemble(request, network, menus, damage, choice, scores)


def make_menus(request: Request, network: Network, target: Target) -> dict[str, Menu]:
    """Options of every fusion group that the target can hold, with exact bytes."""
    options = request.options("menu")
    bits = options.get("bits", [2, 3, 4, 5, 6, 8])
    widths = options.get("group", [32, 128])
    chains: list[tuple[Step, ...]] = [()]
    for b in bits if isinstance(bits, list) else [bits]:
        for g in widths if isinstance(widths, list) else [widths]:
            chains.append(chain_of(request, {"bits": b, "group": g}))
    itemsize = network.stored.dtype.itemsize
    refuses = refusals(target, network)
    menus = {}
    for stack in network.stacks:
        for group in stack.groups():
            held = [c for c in chains if _held(group, c, refuses, request.keep)]
            priced = [
                Option(c, sum(target.nbytes(m, c, itemsize) for m in group.matrices), label(c))
                for c in held
            ]
            ordered = sorted(priced, key=lambda o: (bool(o.chain), -o.bytes))
            menus[group.key] = Menu(group.key, tuple(ordered))
    return menus


def chain_of(request: Request, grid: Mapping[str, int]) -> tuple[Step, ...]:
    """The steps of a method such as `qep+gptq`, with the grid for those that have one."""
    steps = []
    for name in request.method.split("+"):
        found = find(name, "weight")
        own = {key: value for key, value in grid.items() if key in found.options}
        steps.append(Step(name, request.options(found.name) | (own if "bits" in own else {})))
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
    budget: Budget, network: Network, menus: Mapping[str, Menu], groups: Mapping[str, Group]
) -> int:
    """The budget in bytes of the allocatable matrices.

    Raises:
        LayerwiseError: it is below what the smallest options need; the reachable value is shown.
    """
    whole = network.checkpoint.nbytes
    allocatable = sum(menu.options[0].bytes for menu in menus.values())
    outside = whole - allocatable
    weights = sum(groups[g].size for g, menu in menus.items() if len(menu.options) > 1)
    pinned = sum(menu.options[0].bytes for menu in menus.values() if len(menu.options) == 1)
    least = sum(min(o.bytes for o in menu.options) for menu in menus.values())
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
            fix="raise it, unpin what --keep pins, or allow smaller options with --set menu.bits",
        )
    return limit


def option_errors(
    network: Network, menus: Mapping[str, Menu], groups: Mapping[str, Group], progress: Progress
) -> dict[str, tuple[float, ...]]:
    """Relative squared error of every option, with its grid rounded to nearest."""
    errors: dict[str, tuple[float, ...]] = {}
    layers = network.layers()
    for done, layer in enumerate(layers, 1):
        tensors = network.fetch(layer)
        for key in dict.fromkeys(m.fusion for m in layer.matrices):
            found = []
            for option in menus[key].options:
                found.append(_error(groups[key].matrices, tensors, option.chain))
            errors[key] = tuple(found)
        progress("pricing options", done, len(layers))
    return errors


def _error(
    matrices: Sequence[Matrix], tensors: Mapping[str, Tensor], chain: tuple[Step, ...]
) -> float:
    if not chain:
        return 0.0
    known = find("rtn").options
    nearest = tuple(
        Step("rtn", {k: v for k, v in step.options.items() if k in known})
        for step in chain[-1:]  # the steps before the solver round nothing
    )
    above = below = 0.0
    for matrix in matrices:
        weight = matrix.view(tensors[matrix.parameter])
        dense = run_chain(weight, {}, nearest).dense()
        above += (dense.float() - weight.float()).square().sum().item()
        below += weight.float().square().sum().item()
    return above / max(below, 1e-300)


def assemble(
    request: Request,
    network: Network,
    menus: Mapping[str, Menu],
    damage: Damage,
    choice: Choice,
    scores: Scores | None,
) -> Planned:
    """The plan of a choice, and its table."""
    edits, rows = [], []
    for group, menu in menus.items():
        option = menu.options[choice[group]]
        believed = damage.values[group][choice[group]]
        stack, layer, _ = group.split("/", 2)
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
            for matrix in _members(network, group):
                edits.append(Edit(matrix.key, option.chain))
            edits[-1] = Edit(edits[-1].select, option.chain, option.bytes, believed)
    plan = Plan(
        model=identity(network),
        target=request.target,  # type: ignore[arg-type]
        budget=request.budget.as_dict(),
        data=request.data,
        edits=tuple(edits),
        fixed=request.keep,
    )
    whole = network.checkpoint.nbytes
    outside = whole - sum(m.options[0].bytes for m in menus.values())
    open_ = {group: menu for group, menu in menus.items() if len(menu.options) > 1}
    weights = sum(m.size for group in open_ for m in _members(network, group))
    bits = 8 * cost(open_, choice) / weights if weights else None
    total = cost(menus, choice) + outside
    return Planned(plan, rows, total, menus, damage, scores, whole, bits)


def _members(network: Network, group: str) -> list[Matrix]:
    return [m for stack in network.stacks for m in stack.matrices() if m.fusion == group]
