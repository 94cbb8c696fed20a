"""One budget for bits and layers: fewer bits here, a layer less there, whatever costs least."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

from layerwise.core.damage import Choice, Damage, Menu, Option, staying
from layerwise.core.errors import LayerwiseError
from layerwise.core.fan import fan_out
from layerwise.core.method import find
from layerwise.core.network import Network
from layerwise.core.open import rewired
from layerwise.core.plan import Step
from layerwise.core.target import Target
from layerwise.jobs.bits import assemble, bytes_for, make_menus, outside_of, predicted, units
from layerwise.jobs.gain import solver_gain
from layerwise.jobs.request import Planned, Request
from layerwise.jobs.scoring import counting, trials_for
from layerwise.jobs.session import Progress
from layerwise.jobs.solve import nearest
from layerwise.jobs.units import able_to_go, layer_bytes, wiring_without

#: the largest share of the layers that a joint plan leaves out
MOST = 0.5


def plan_joint(request: Request, network: Network, target: Target, progress: Progress) -> Planned:
    """Bits for every group and a number of layers that go, chosen together.

    For every number of layers the exact least predicted damage within the budget is found; these
    plans, the edge between fewer layers and fewer bits, are then measured on the select split,
    and the best of them is taken.
    """
    allocator = find(request.allocator, "allocate")
    if "gone" not in allocator.options:
        raise LayerwiseError(
            f"--allocator {request.allocator}",
            allowed="one that weighs layers against bits: knapsack",
            found=allocator.name,
            fix="leave --allocator or --allow out",
        )
    groups = {g.key: g for g in units(network, target)}
    sizes = bytes_beside(request, network, target)
    menus = _with_layers(make_menus(request, network, target), groups, sizes)
    limit = bytes_for(request, network, menus, groups, target)
    inner = {g: menu for g, menu in menus.items() if g in groups}
    scores, plain = predicted(request, network, inner, groups, progress)
    trials = trials_for(request, network)
    plain = _and_layers(plain, list(sizes), partial(_losses, request, trials.chains, progress))
    damage = _solved(plain, inner, request, network)
    options = request.options(allocator.name)
    wanted = options.get("gone", -1)
    counts = range(int(MOST * len(network.layers())) + 1) if wanted < 0 else [wanted]
    found: list[Choice] = []
    for count in counts:
        try:
            found.append(allocator.bind(options | {"gone": count})(damage, menus, limit))
        except LayerwiseError:
            continue
    if not found:
        found.append(allocator.bind(options)(damage, menus, limit))
    rows = _weighed(request, trials.chains, menus, (plain, damage), found, progress)
    best = min(range(len(found)), key=lambda i: rows[i]["expected"])
    rows[best]["chosen"] = True
    planned = assemble(request, network, target, menus, damage, found[best], scores)
    return planned._replace(edge=rows)


def bytes_beside(request: Request, network: Network, target: Target) -> dict[str, int]:
    """Bytes of every layer that can go which belong to no matrix of it."""
    size, stored = network.stored.dtype.itemsize, layer_bytes(network)
    layers = {layer.key: layer for layer in network.layers()}
    able = able_to_go(network, request.keep)
    if target.rest is None:
        plain = {k: sum(target.nbytes(m, (), size) for m in layers[k].matrices) for k in able}
        return {key: stored[key] - plain[key] for key in able}
    kinds: dict[Any, int] = {}
    whole = outside_of(request, network, target)
    for key in able:
        kind = tuple(layers[key].shapes.items())
        if kind not in kinds:
            fewer = rewired(network, wiring_without(network, [key]))
            kinds[kind] = whole - outside_of(request, fewer, target)
    return {key: kinds[tuple(layers[key].shapes.items())] for key in able}


def _with_layers(
    menus: Mapping[str, Menu], groups: Mapping[str, Any], sizes: Mapping[str, int]
) -> dict[str, Menu]:
    """The menus of all groups, those of a layer that can go behind its own."""
    found: dict[str, Menu] = {}
    for group, menu in menus.items():
        layer = groups[group].matrices[0].layer
        if layer in sizes and layer not in found:
            stays, goes = Option((), sizes[layer], "stays"), Option((), 0, "left out", gone=True)
            found[layer] = Menu(layer, (stays, goes))
        found[group] = menu._replace(inside=layer) if layer in sizes else menu
    return found


def _losses(
    request: Request, kl: Any, progress: Progress, gone: Sequence[Collection[str]]
) -> list[float]:
    """KL without some layers, for each of several sets of them."""
    tick = counting(progress, "leaving layers out", len(gone))
    return [kl for kl, _ in fan_out(partial(_without, kl), gone, request.engine, tick)]


def _without(kl: Any, gone: Collection[str]) -> tuple[float, float]:
    return kl({}, gone)


def _and_layers(damage: Damage, layers: Sequence[str], losses: Any) -> Damage:
    """The damage of layers that go, and of neighbours that go together."""
    pairs = list(pairwise(layers))
    found = losses([*((layer,) for layer in layers), *pairs])
    alone = dict(zip(layers, found, strict=False))
    both = dict(zip(pairs, found[len(layers) :], strict=True))
    return replace(
        damage,
        values={**damage.values, **{layer: (0.0, kl) for layer, kl in alone.items()}},
        importance={**damage.importance, **alone},
        pairs={(a, b): kl - alone[a] - alone[b] for (a, b), kl in both.items()},
    )


def _solved(
    damage: Damage, menus: Mapping[str, Menu], request: Request, network: Network
) -> Damage:
    """The damage of options as they are solved, not just rounded."""
    chains = {o.label: o.chain for menu in menus.values() for o in menu.options if o.chain}
    gain = solver_gain(request, network, chains)
    values = {
        g: tuple(
            v * gain.get(o.label, 1.0) for v, o in zip(damage.values[g], menu.options, strict=True)
        )
        for g, menu in menus.items()
    }
    return replace(damage, values={**damage.values, **values})


def _weighed(
    request: Request,
    kl: Any,
    menus: Mapping[str, Menu],
    damages: tuple[Damage, Damage],
    choices: Sequence[Choice],
    progress: Progress,
) -> list[dict[str, Any]]:
    """A row per choice: the layers that go, the damage predicted, measured and expected.

    Measured is the choice with matrices just rounded. What that is beside its own prediction is
    expected of the choice with matrices solved, too.
    """
    tick = counting(progress, "measuring plans", len(choices))
    tasks = [(_chains(menus, choice), _gone(menus, choice)) for choice in choices]
    found = fan_out(partial(_both, kl), tasks, request.engine, tick)
    rows = []
    for choice, (_, gone), (measured, _) in zip(choices, tasks, found, strict=True):
        plain, solved = (total(menus, damage, choice) for damage in damages)
        rows.append(
            {
                "layers left out": len(gone),
                "predicted": solved,
                "rounded, predicted": plain,
                "rounded, measured": measured,
                "expected": solved * measured / max(plain, 1e-12),
                "chosen": False,
            }
        )
    return rows


def _both(kl: Any, task: tuple[Mapping[str, tuple[Step, ...]], Sequence[str]]) -> Any:
    return kl(*task)


def _gone(menus: Mapping[str, Menu], choice: Choice) -> list[str]:
    return [g for g in staying(menus, choice) if menus[g].options[choice[g]].gone]


def _chains(menus: Mapping[str, Menu], choice: Choice) -> dict[str, tuple[Step, ...]]:
    chosen = {g: menus[g].options[choice[g]].chain for g in staying(menus, choice)}
    return {g: nearest(chain) for g, chain in chosen.items() if chain}


def total(menus: Mapping[str, Menu], damage: Damage, choice: Choice) -> float:
    """The predicted damage of a choice, pairs included."""
    gone = set(_gone(menus, choice))
    alone = sum(damage.values[g][choice[g]] for g in staying(menus, choice))
    return alone + sum(v for pair, v in damage.pairs.items() if gone.issuperset(pair))
