"""Finding the widths of a network by trying.

A whole number of the configuration is changed in a model without weights: where axes of the layers'
parameters, and nothing else, become shorter by the same share, they hold its units. They are its
units indeed if they can change places in all these axes and the layer still computes the same, and
if a unit that is zero in all of them is one that is not read. So what was fused, and what groups of
heads share, needs no table. The matrix whose inputs are the units reads them: those that it does
not read can be taken out of the layer. Every reader, and each kind of layer, is a place by itself.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import product, takewhile
from typing import NamedTuple

import torch
from torch import Tensor

from layerwise.core.errors import LayerwiseError
from layerwise.core.fold import Fold
from layerwise.core.lockstep import walk
from layerwise.core.network import Network
from layerwise.core.shaping import changed_axes, fields_shaping, shapes_stored, told_by_shapes
from layerwise.core.stack import Layer, Matrix
from layerwise.core.task import example_inputs
from layerwise.core.trial import Trial
from layerwise.core.width import Cut, Place, Width, narrowed_config

#: what may be left of a change that was taken back
KEPT = 1e-3


class Untried(NamedTuple):
    """A place that is to be tried: layers of one kind, their reader, and how units may lie."""

    layers: tuple[str, ...]
    reader: str
    ways: Sequence[Mapping[str, Cut]]


class Candidate(NamedTuple):
    """Fields with their values, what is to be said besides, and the places that are to be tried."""

    fields: Mapping[str, int]
    fixed: Mapping[str, int]
    units: int
    places: tuple[Untried, ...]


def find_widths(network: Network) -> list[Width]:
    """The widths of a network, each with one reader in every place.

    The network runs up to the last layer that is the first of its kind, on a short input.
    """
    candidates = list(_candidates(network))
    batch = example_inputs(network.module)
    tried: set[str] = set()
    todo = _first_of_their_kind(candidates)
    for stop in walk(network, [batch]) if todo else ():
        key = network.original_key(stop.layer)
        if stop.kind != "enter" or key not in todo - tried:
            continue
        trial = Trial(stop.layer, stop.lanes[0].args, stop.lanes[0].kwargs)
        passed = (_tried(trial, key, candidate) for candidate in candidates)
        candidates = [candidate for candidate in passed if candidate is not None]
        tried.add(key)
        todo = _first_of_their_kind(candidates)
        if todo <= tried:
            break
    found = [
        Width(
            c.fields,
            c.units,
            tuple(Place(p.layers, p.ways[0], p.reader) for p in c.places),
            c.fixed,
        )
        for c in candidates
        if _first_of_their_kind([c]) <= tried
    ]
    return without_overlap(found)


def _first_of_their_kind(candidates: Sequence[Candidate]) -> set[str]:
    return {place.layers[0] for candidate in candidates for place in candidate.places}


def readers(network: Network, width: Width) -> Iterator[tuple[Place, Matrix]]:
    """The matrices that read the units of a width, each with its place."""
    for layer in network.layers():
        for place in width.inside(network.original_key(layer)):
            yield from ((place, m) for m in layer.matrices if m.parameter == place.reader)


def widths_named(network: Network, values: Mapping[str, int]) -> list[tuple[Width, int]]:
    """The widths that some fields set, and how many units are to be left of each.

    Raises:
        LayerwiseError: a field sets none, or fields of one width shrink by different shares.
    """
    found, open_ = [], dict(values)
    widths = find_widths(network)
    for width in widths:
        known = (*width.fields, *width.fixed)
        own = {name: open_.pop(name) for name in known if name in open_}
        units = own.get(width.name, 0) * width.units // width.fields[width.name]
        if own and not (0 < units <= width.units and width.values(units) == own):
            raise LayerwiseError(
                "plan, widths",
                allowed=f"all of {', '.join(known)}, made smaller by the same share",
                found=own,
                fix=f"write for instance {width.values(max(1, width.units // 2))}",
            )
        found += [(width, units)] if own else []
    if open_:
        raise LayerwiseError(
            f"plan, widths {min(open_)}",
            allowed=", ".join(name for w in widths for name in w.fields) or "none here",
            found=open_[min(open_)],
            fix="name fields of the configuration that layers of this network shrink with",
        )
    return found


def _candidates(network: Network) -> Iterator[Candidate]:
    """Fields that make layers narrower, one by one or two together, and how it may be cut.

    Fields without a value are given the one that they stand for: the size of a head would change
    with the number of heads.
    """
    kind, config = type(network.model), network.model.config
    before = shapes_stored(kind, config)
    inside = tuple(f"{layer.path}." for layer in network.layers())
    told = told_by_shapes(kind, config, before)
    settled = narrowed_config(config, {path: value for path, (value, _) in told.items()})
    alone: dict[str, int] = {}

    def shaped(fields: dict[str, int]) -> dict[str, int]:
        changed = changed_axes(kind, settled, before, fields)
        return changed if changed and all(name.startswith(inside) for name in changed) else {}

    def cut(fields: dict[str, int], changed: dict[str, int]) -> Iterator[Candidate]:
        fixed = {p: v for p, (v, names) in told.items() if names & {*changed} and p not in fields}
        yield from _cut(network, fields, fixed, changed)

    for path, value in fields_shaping(settled, before):
        changed = shaped({path: value})
        if changed:
            alone[path] = value
            yield from cut({path: value}, changed)
    for (one, large), (other, small) in product(alone.items(), repeat=2):
        if one != other and large % small == 0 and (large > small or one < other):
            both = {one: large, other: small}
            changed = shaped(both)
            yield from cut(both, changed) if changed else ()


def _cut(
    network: Network,
    fields: Mapping[str, int],
    fixed: Mapping[str, int],
    changed: Mapping[str, int],
) -> Iterator[Candidate]:
    """Places in which layers may hold the units of some fields."""
    units = math.gcd(*fields.values())
    kinds: dict[tuple[str, tuple[tuple[str, tuple[int, int]], ...]], dict[str, None]] = {}
    for layer in network.layers():
        axes = axes_in(layer, changed)
        held = _by_reader(layer, axes) if axes else {}
        if held is None or any(size % units for _, size in axes.values()):
            return
        for reader, own in held.items():
            layers = kinds.setdefault((reader, tuple(own.items())), {})
            layers[network.original_key(layer)] = None
    places = (Untried((*layers,), r, _ways(dict(own), units)) for (r, own), layers in kinds.items())
    if kinds:
        yield Candidate(fields, fixed, units, (*places,))


def _by_reader(
    layer: Layer, axes: Mapping[str, tuple[int, int]]
) -> dict[str, dict[str, tuple[int, int]]] | None:
    """The axes of a layer by the matrix that reads their units; none if that cannot be told.

    Of several readers it is the one whose name begins most alike.
    """
    found: dict[str, dict[str, tuple[int, int]]] = {}
    for m in layer.matrices:
        plain = len(layer.shapes[m.parameter]) == (2 if m.expert is None else 3)
        if plain and m.parameter in axes and axes[m.parameter][0] == (-2 if m.transposed else -1):
            found[m.parameter] = {}
    for name, axis in axes.items():
        alike = {reader: _alike(reader, name) for reader in found}
        best = [reader for reader, depth in alike.items() if depth == max(alike.values())]
        if name not in found and len(best) != 1:
            return None
        found[name if name in found else best[0]][name] = axis
    return found


def _alike(one: str, other: str) -> int:
    """How many parts of two dotted names are the same, from the first on."""
    pairs = zip(one.split("."), other.split("."), strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def _ways(axes: Mapping[str, tuple[int, int]], units: int) -> list[Mapping[str, Cut]]:
    """Ways in which some axes may hold their units."""
    sizes = {size for _, size in axes.values()}
    shapes = {size: _pieces(size // units, min(sizes) // units) for size in sizes}
    ways: list[Mapping[str, Cut]] = []
    for chosen in product(*shapes.values()):
        pieces = dict(zip(shapes, chosen, strict=True))
        ways.append({name: Cut(axis, pieces[size]) for name, (axis, size) in axes.items()})
    return ways


def axes_in(layer: Layer, changed: Mapping[str, int]) -> dict[str, tuple[int, int]]:
    """The axes of a layer that change and their lengths, by the names of tensors in it."""
    shapes = {name: tensor.shape for name, tensor in layer.module.state_dict().items()}
    own = {n.removeprefix(f"{layer.path}."): axis for n, axis in changed.items()}
    return {n: (axis, shapes[n][axis]) for n, axis in own.items() if n in shapes}


def _pieces(each: int, least: int) -> list[tuple[int, ...]]:
    """How the entries of a unit may lie: side by side, or in pieces as they are fused.

    Example:
        >>> _pieces(8, 2)
        [(8,), (2, 2, 2, 2), (4, 2, 2)]
    """
    found: list[tuple[int, ...]] = [(each,)]
    if each % least == 0 and each > least:
        found.append((least,) * (each // least))
    if each > 3 * least:
        found.append((each - 2 * least, least, least))
    return found


def _tried(trial: Trial, layer: str, candidate: Candidate) -> Candidate | None:
    """The candidate with its places in a layer as they are; none if there is another.

    Units of a place are what its fields count if they can change places.
    """
    places: list[Untried] = []
    for place in candidate.places:
        if place.layers[0] == layer:
            own = [c for c in place.ways if _holds(trial, place.reader, c, candidate.units)][:1]
            if not own:
                return None
            place = place._replace(ways=own)
        places.append(place)
    return candidate._replace(places=(*places,))


def _holds(trial: Trial, reader: str, cuts: Mapping[str, Cut], units: int) -> bool:
    """Whether units change places in a layer, and one that is zero is one that is not read."""
    own = {name: cut for name, cut in cuts.items() if name in trial.tensors}
    stacks = {trial.tensors[name].shape[:-2] for name in own}
    if reader not in trial.matrices or len(cuts[reader].pieces) != 1 or len(stacks) != 1:
        return False
    turned = torch.arange(units).roll(1)
    turns = {n: (c.fold(turned, units),) for n, c in own.items()}
    zeros = {n: (Fold(c.axis, _last_zero(c, units)),) for n, c in own.items()}
    moved, unread = (trial.run({reader: f[reader]}) for f in (turns, zeros))
    change, lost = moved.away(trial.before), unread.away(trial.before)
    same = change and trial.run(turns).away(trial.before) <= KEPT * change
    return bool(same and trial.run(zeros).away(unread) <= KEPT * lost)


def _last_zero(cut: Cut, units: int) -> Tensor:
    """Factors along an axis that make the last unit zero."""
    found = torch.ones(units * sum(cut.pieces))
    found[cut.entries(torch.tensor([units - 1]), units)] = 0.0
    return found


def without_overlap(widths: Sequence[Width]) -> list[Width]:
    """Widths that share no axis of a layer with one before them; those of more units first."""
    found: list[Width] = []
    taken: set[tuple[str, str, int]] = set()
    for width in sorted(widths, key=lambda w: -w.units):
        own = {
            (layer, name, cut.axis)
            for place in width.places
            for layer in place.layers
            for name, cut in place.cuts.items()
        }
        if not own & taken:
            found.append(width)
            taken |= own
    return found
