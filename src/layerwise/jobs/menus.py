"""Menus: the chains that every group may take in a target, what they cost, and how far they are
off."""

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any, get_args

import torch
from torch import Tensor

from layerwise.core.chain import kind_left, nearest, squared_errors, weights_left
from layerwise.core.damage import Menu, Option
from layerwise.core.method import find
from layerwise.core.network import Network
from layerwise.core.plan import Step, label
from layerwise.core.select import selects
from layerwise.core.stack import Group, Matrix
from layerwise.core.target import Refuses, Target, refusals
from layerwise.core.weight import Packed
from layerwise.jobs.request import Request
from layerwise.jobs.session import Progress

#: what a menu offers of the options that a chain has
AXES: dict[str, list[Any]] = {
    "bits": [2, 3, 4, 5, 6, 8],
    "group": [32, 128],
    "share": [i / 20 for i in range(1, 20)],
}
#: weights of a matrix on which an encoder is priced that searches for its scales
PRICED = 1 << 17


def units(network: Network, target: Target) -> list[Group]:
    """What gets an option of its own: fusion groups, or parameters where the format allows it.

    The experts of a layer that lie in one parameter share an option there. Matrices that the
    format holds alike share one over the whole network.
    """
    groups = [group for stack in network.stacks for group in stack.groups()]
    if target.fused:
        same = [g for g in groups if any(target.alike(m, ()) is not None for m in g.matrices)]
        shared = tuple(m for group in same for m in group.matrices)
        joined = {same[0].key: Group(same[0].key, shared)} if same else {}
        return [joined.get(group.key, group) for group in groups if group not in same[1:]]
    alone: dict[tuple[str, str], list[Matrix]] = {}
    for matrix in (m for group in groups for m in group.matrices):
        alone.setdefault((matrix.layer, matrix.parameter), []).append(matrix)
    return [Group(own[0].key, tuple(own)) for own in alone.values()]


def make_menus(request: Request, network: Network, target: Target) -> dict[str, Menu]:
    """Options of every fusion group that the target can hold, with exact bytes."""
    chains: list[tuple[Step, ...]] = [()]
    for method in (request.method or target.method).split(","):
        found = (chain_of(request, method, grid) for grid in grids_of(request, method, target))
        chains += [chain for chain in found if chain not in chains]
    refuses = refusals(target, network)
    dtype = network.stored.dtype
    menus = {}
    for group in units(network, target):
        held = [c for c in chains if _held(group, c, refuses, request.keep)]
        priced = [_option(group, chain, target, dtype) for chain in held]
        ordered = sorted(priced, key=lambda o: (bool(o.chain), -o.bytes, -o.weights))
        menus[group.key] = Menu(group.key, tuple(ordered))
    return menus


def _option(group: Group, chain: tuple[Step, ...], target: Target, dtype: torch.dtype) -> Option:
    nbytes = sum(target.nbytes(m, chain, dtype.itemsize) for m in group.matrices)
    weights = sum(weights_left(chain, m.shape) for m in group.matrices)
    return Option(chain, nbytes, label(chain), weights)


def worth_it(menus: Mapping[str, Menu]) -> dict[str, Menu]:
    """Menus without options that take no fewer bytes, and no fewer weights, than as it is."""

    def less(option: Option, whole: Option) -> bool:
        return option.bytes < whole.bytes or option.weights < whole.weights

    return {
        group: Menu(
            group, (menu.options[0], *(o for o in menu.options if less(o, menu.options[0])))
        )
        for group, menu in menus.items()
    }


def grids_of(request: Request, method: str, target: Target) -> list[dict[str, Any]]:
    """Every combination of the values that a menu offers of a chain's options."""
    asked, named = request.options("menu"), types_of(method, target)
    if named:
        return [{"type": kind} for kind in listed(asked.get("type", named))]
    steps = [find(name, "weight") for name in method.split("+")]
    axes: dict[str, list[Any]] = {}
    for name, usual in AXES.items():
        own = [step.options[name] for step in steps if name in step.options]
        if own:
            offered = [list(get_args(p.annotation)) for p in own if get_args(p.annotation)]
            axes[name] = listed(asked.get(name, offered[0] if offered else usual))
    if "share" in axes and request.budget.sparsity is not None and "share" not in asked:
        axes["share"] = sorted({*axes["share"], round(1 - request.budget.sparsity, 9)})
    return [dict(zip(axes, values, strict=True)) for values in product(*axes.values())]


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
    """The steps of a method such as `qep+gptq`, each with what it knows of the grid."""
    steps = []
    for name in method.split("+"):
        found = find(name, "weight")
        own = {key: value for key, value in grid.items() if key in found.options}
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


def option_errors(
    network: Network, menus: Mapping[str, Menu], groups: Mapping[str, Group], progress: Progress
) -> dict[str, tuple[float, ...]]:
    """Squared error of every option without statistics, relative to the weights.

    Relative to those of the whole fusion group, which is what sensitivities are measured on.
    """
    layers = network.layers()
    inside: dict[str, dict[str, list[Matrix]]] = {layer.key: {} for layer in layers}
    for group in groups.values():
        for matrix in group.matrices:
            inside[matrix.layer].setdefault(group.key, []).append(matrix)
    above = {key: [0.0] * len(menus[key].options) for key in groups}
    below = dict.fromkeys(groups, 0.0)
    for done, layer in enumerate(layers, 1):
        tensors = network.fetch(layer)
        norms: dict[str, float] = {}
        for matrix in layer.matrices:
            weight = matrix.view(tensors[matrix.parameter]).float()
            norms[matrix.fusion] = norms.get(matrix.fusion, 0.0) + weight.square().sum().item()
        for key, matrices in inside[layer.key].items():
            below[key] += sum(norms[f] for f in {m.fusion for m in matrices})
            found = _errors(matrices, tensors, menus[key])
            above[key] = [a + b for a, b in zip(above[key], found, strict=True)]
        progress("pricing options", done, len(layers))
    return {key: tuple(a / max(below[key], 1e-300) for a in above[key]) for key in groups}


def _errors(matrices: Sequence[Matrix], tensors: Mapping[str, Tensor], menu: Menu) -> list[float]:
    plain = [nearest(option.chain) for option in menu.options]
    searched = [bool(chain) and kind_left(chain[-1]) is Packed for chain in plain]
    above = [0.0] * len(plain)
    for matrix in matrices:
        weight = matrix.view(tensors[matrix.parameter])
        for some in {*searched}:
            part = weight[:: max(1, matrix.size // PRICED)] if some else weight
            numbers = [i for i, slow in enumerate(searched) if slow == some]
            found = squared_errors(part, [plain[i] for i in numbers])
            for i, error in zip(numbers, found, strict=True):
                above[i] += error * len(weight) / len(part)
    return above
