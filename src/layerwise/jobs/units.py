"""What a plan of depth may leave out: whole layers, or parts of them; and the order that remains.

A unit is named by its key, `decoder/3` or `decoder/3/attention`.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from layerwise.core.errors import LayerwiseError
from layerwise.core.network import Network
from layerwise.core.open import rewired
from layerwise.core.plan import Edit, Plan, chains_of
from layerwise.core.select import selects
from layerwise.core.stack import Layer, Stack, Visit, Wiring, plain_wiring
from layerwise.core.visits import parse_wiring


def part_names(network: Network) -> tuple[str, ...]:
    """The names of the parts that layers have."""
    return tuple({part.name: None for layer in network.layers() for part in layer.parts})


def units_of(network: Network, parts: Sequence[str] = ()) -> list[str]:
    """The keys of all layers in network order, or those of all their parts of some names.

    Raises:
        LayerwiseError: no layer has a part of that name.
    """
    layers, known = network.layers(), part_names(network)
    for name in parts:
        if name not in known:
            raise LayerwiseError(
                "--parts",
                allowed=f"{', '.join(known)}, or several with + between them",
                found=name,
                fix="name parts of this network",
            )
    if not parts:
        return [layer.key for layer in layers]
    return [f"{la.key}/{p.name}" for la in layers for p in la.parts if p.name in parts]


def able_to_go(
    network: Network, keep: Collection[str] = (), parts: Sequence[str] = ()
) -> list[str]:
    """The units that can be left out.

    Their layers keep the shape of their input, no selector pins them, and the architecture can be
    built without them, which is tried for the layers of a stack that differ.
    """
    whole = [
        layer
        for stack in network.stacks
        for layer in stack.layers
        if layer.keeps_shape and (parts or _of_one_kind(stack) or _can_go(network, layer))
    ]
    pinned = {
        key
        for layer in whole
        for matrix in layer.matrices
        if any(selects(pattern, matrix) for pattern in keep)
        for key in (layer.key, f"{layer.key}/{matrix.part}")
    }
    keys = {layer.key for layer in whole}
    units = units_of(network, parts)
    return [u for u in units if u not in pinned and (u.rpartition("/")[0] if parts else u) in keys]


def _of_one_kind(stack: Stack) -> bool:
    return all(layer.shapes == stack.layers[0].shapes for layer in stack.layers)


def _can_go(network: Network, layer: Layer) -> bool:
    try:
        rewired(network, wiring_without(network, [layer.key]))
    except LayerwiseError:
        return False
    return True


def room_in(stack: Stack, parts: Sequence[str] = ()) -> int:
    """How many units of a stack can go if one layer, or one part of one, is to stay."""
    return len(stack.layers if not parts else [p for la in stack.layers for p in la.parts]) - 1


def wiring_without(network: Network, gone: Collection[str]) -> dict[str, list[Any]]:
    """The order of every stack that loses a unit; empty where nothing of it would stay."""
    found: dict[str, list[Any]] = {}
    for stack in network.stacks:
        entries = [_entry(layer, gone) for layer in stack.layers]
        if entries != list(range(len(entries))):
            found[stack.name] = [entry for entry in entries if entry is not None]
    return found


def _entry(layer: Layer, gone: Collection[str]) -> Any:
    kept = [p.name for p in layer.parts if f"{layer.key}/{p.name}" not in gone]
    if layer.key in gone or (layer.parts and not kept):
        return None
    return layer.index if len(kept) == len(layer.parts) else {"layer": layer.index, "parts": kept}


def orders(network: Network, wiring: Mapping[str, Sequence[Any]]) -> dict[str, Wiring]:
    """The order of every stack by its name; every layer once where none is given."""
    found = {}
    for stack in network.stacks:
        entries, depth = wiring.get(stack.name), len(stack.layers)
        found[stack.name] = (
            parse_wiring(entries, depth, "wiring") if entries else plain_wiring(depth)
        )
    return found


def left_out(network: Network, plan: Plan) -> tuple[list[str], tuple[str, ...]] | None:
    """The units that a plan leaves out and, if these are parts, their names.

    There is no answer for orders that do more than shorten the network.
    """
    found: dict[str, Visit] = {}
    for name, wiring in orders(network, plan.wiring).items():
        numbers = [visit.layer for visit in wiring]
        if numbers != sorted(set(numbers)) or any(v.parallel is not None for v in wiring):
            return None
        found |= {f"{name}/{visit.layer}": visit for visit in wiring}
    visits = {layer.key: found.get(layer.key) for layer in network.layers()}
    if all(visit is None or visit.parts is None for visit in visits.values()):
        return [key for key, visit in visits.items() if visit is None], ()
    gone = [
        f"{layer.key}/{part.name}"
        for layer in network.layers()
        for part in layer.parts
        if not _runs(visits[layer.key], part.name)
    ]
    return gone, tuple(dict.fromkeys(key.rpartition("/")[2] for key in gone))


def _runs(visit: Visit | None, part: str) -> bool:
    return visit is not None and (visit.parts is None or part in visit.parts)


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


def visited(network: Network, wiring: Mapping[str, Sequence[Any]]) -> list[str]:
    """The keys of the layers that run in an order, as often as they do."""
    found = orders(network, wiring).items()
    return [f"{name}/{visit.layer}" for name, order in found for visit in order]


def places_in(network: Network, wiring: Mapping[str, Sequence[Any]]) -> dict[str, str]:
    """For the key of every layer that an order keeps, its key in that order."""
    return {
        f"{name}/{visit.layer}": f"{name}/{place}"
        for name, order in orders(network, wiring).items()
        for place, visit in enumerate(order)
    }


def unmistakable(
    edits: Sequence[Edit], network: Network, places: Mapping[str, str]
) -> tuple[Edit, ...]:
    """Edits of single matrices, so that each also is the last to name its own.

    Selectors know a matrix by its own name, too, which may be what another one's role is called:
    a router `gate` that stays as it is, beside the `gate` of shared experts.
    """
    own = {edit.select: edit for edit in edits}
    inside: dict[str, list[Edit]] = {}
    for edit in edits:
        inside.setdefault(edit.select.rpartition("/")[0], []).append(edit)
    chain_of = {layer: chains_of(held) for layer, held in inside.items()}
    last: dict[str, Edit] = {}
    for matrix in (m for layer in network.layers() for m in layer.matrices):
        placed = replace(matrix, layer=places.get(matrix.layer, matrix.layer))
        meant = own.get(placed.key, Edit(placed.key, ()))
        if chain_of.get(placed.layer, chains_of(()))(placed) != meant.chain:
            last[placed.key] = meant
    return (*(edit for edit in edits if edit.select not in last), *last.values())
