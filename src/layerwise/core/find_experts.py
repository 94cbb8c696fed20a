"""Experts, found by trying as widths are: units that no matrix reads, of which a token runs a few.

Where axes of some layers, that of their experts' matrices among them, become shorter as one number
of the configuration does, they may hold the experts. They do if experts can change places in all
these axes, those of the router's rows and biases too, and the layer still computes the same.
"""

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch

from layerwise.core.errors import LayerwiseError, first_few, refusing
from layerwise.core.find_widths import KEPT, axes_in, without_overlap
from layerwise.core.fold import Fold
from layerwise.core.lockstep import walk
from layerwise.core.network import Network
from layerwise.core.open import refolded
from layerwise.core.shaping import changed_axes, shapes_stored
from layerwise.core.stack import Layer
from layerwise.core.task import example_inputs
from layerwise.core.trial import Trial
from layerwise.core.width import Cut, Place, Width, narrowed_config
from layerwise.core.wiring import configs_in

#: numbers of the experts that stay, by the key of their layer in the original
Kept = Mapping[str, Sequence[int]]


def find_experts(network: Network) -> list[Width]:
    """The experts of a network: widths without a reader, which not all layers need to have.

    The network runs up to the first layer that has some, on a short input. Those that a router
    chooses by groups can change places inside a group, a span of the width.
    """
    found: list[Width] = []
    candidates = list(_candidates(network))
    for stop in walk(network, [example_inputs(network.module)]) if candidates else ():
        key = network.original_key(stop.layer)
        mine = [width for width in candidates if width.places[0].layers[0] == key]
        if stop.kind != "enter" or not mine:
            continue
        trial = Trial(stop.layer, stop.lanes[0].args, stop.lanes[0].kwargs)
        spans = {width.name: _spans(trial, stop.layer, width) for width in mine}
        found += [w._replace(spans=spans[w.name]) for w in mine if spans[w.name]]
        candidates = [width for width in candidates if width not in mine]
        if not candidates:
            break
    return without_overlap(found)


def least_experts(network: Network, width: Width) -> int:
    """How few experts the architecture can be built with and run: as many as a token runs.

    Found by trying, on a network without weights.
    """
    layers = width.places[0].layers

    def runs(count: int) -> bool:
        each, span = count // width.spans, width.units // width.spans
        kept = [s * span + i for s in range(width.spans) for i in range(each)]
        try:
            cut_experts(network, [(width, dict.fromkeys(layers, kept))])
        except LayerwiseError:
            return False
        return True

    counts = range(width.spans, width.units, width.spans)
    place = bisect_left(counts, True, key=runs)
    return counts[place] if place < len(counts) else width.units


def without_experts(
    network: Network, units: Mapping[str, Kept], experts: Sequence[Width] | None = None
) -> Network:
    """The network with some of its experts, by fields of the configuration, and no others.

    They are searched for where they are not given.

    Raises:
        LayerwiseError: a field says of no experts how many there are, the numbers are none that
            a layer has, layers would have different counts, or the architecture refuses them.
    """
    if not units:
        return network
    found = find_experts(network) if experts is None else experts
    known = {width.name: width for width in found}
    for name in units:
        if name not in known:
            raise LayerwiseError(
                f"plan, units {name}",
                allowed=", ".join(known) or "none here: no experts that can change places",
                found=name,
                fix="name the field of the configuration that says how many experts there are",
            )
    chosen = [(known[name], kept) for name, kept in units.items()]
    for width, kept in chosen:
        _check(width, kept)
    return cut_experts(network, chosen)


def cut_experts(network: Network, chosen: Sequence[tuple[Width, Kept]]) -> Network:
    """The network with the experts that are kept, in their order.

    Raises:
        LayerwiseError: the architecture cannot be built with so few, or does not run.
    """
    folds: dict[str, tuple[Fold, ...]] = {}
    values: dict[str, int] = {}
    for width, kept in chosen:
        values |= width.values(len(next(iter(kept.values()))))
        for layer in network.layers():
            key, path = network.original_key(layer), network.origins.get(layer.path, layer.path)
            for place in width.inside(key):
                numbers = torch.tensor(sorted(kept[key]))
                folds |= {
                    f"{path}.{name}": (cut.fold(numbers, width.units),)
                    for name, cut in place.cuts.items()
                }

    def cut(whole: Network) -> Network:
        return refolded(whole, folds, config=narrowed_config(whole.model.config, values))

    with refusing(
        f"experts, {', '.join(f'{name} {value}' for name, value in values.items())}",
        allowed="at least as many experts as a token runs, in whole groups",
        fix="keep more",
    ):
        found = cut(network)
        return found if network.before is None else replace(found, before=cut(network.before))


def _check(width: Width, kept: Kept) -> None:
    wanted = {*width.places[0].layers}
    span = width.units // width.spans
    for key in sorted(wanted | kept.keys()):
        numbers = kept.get(key, ())
        counts = {sum(n // span == s for n in numbers) for s in range(width.spans)}
        own = len({*numbers} & {*range(width.units)}) == len(numbers) > 0
        same = len(numbers) == len(next(iter(kept.values())))
        if key not in wanted or not own or not same or len(counts) > 1:
            groups = f", as many of each {span}" if width.spans > 1 else ""
            raise LayerwiseError(
                f"plan, units {width.name} at {key}",
                allowed=f"numbers from 0 to {width.units - 1}, each once, as many in every layer"
                f"{groups}; of {first_few(sorted(wanted))}",
                found=list(numbers) or "none",
                fix="list the experts that stay of every layer that has some, and of no other",
            )


def _candidates(network: Network) -> Iterator[Width]:
    """Widths that experts may be, by the numbers of the configuration that are as many."""
    kind, config = type(network.model), network.model.config
    layers = network.layers()
    counts = {1 + m.expert for layer in layers for m in layer.matrices if m.expert is not None}
    inside = tuple(f"{layer.path}." for layer in layers)
    before = shapes_stored(kind, config) if counts else {}
    for path, part in configs_in(config.to_dict()) if counts else ():
        for name, value in part.items():
            if type(value) is not int or value not in counts:
                continue
            changed = changed_axes(kind, config, before, {path + name: value})
            if changed and all(tensor.startswith(inside) for tensor in changed):
                own = [(layer, axes_in(layer, changed)) for layer in layers]
                held = [(la, axes) for la, axes in own if axes]
                keys = tuple(network.original_key(layer) for layer, _ in held)
                yield from _width(path + name, value, keys, held)


def _width(
    field: str,
    units: int,
    keys: tuple[str, ...],
    own: Sequence[tuple[Layer, Mapping[str, tuple[int, int]]]],
) -> Iterator[Width]:
    """The width of a field, if all layers that it shapes have the same, and all experts do."""
    first, axes = own[0]
    stacked = {m.parameter for la, _ in own for m in la.matrices if m.expert is not None}
    along = all(name in axes and axes[name][0] == -len(first.shapes[name]) for name in stacked)
    whole = all(size % units == 0 for _, size in axes.values())
    if stacked and along and whole and all(other == axes for _, other in own):
        cuts = {name: Cut(axis, (size // units,)) for name, (axis, size) in axes.items()}
        yield Width({field: units}, units, (Place(keys, cuts, ""),))


def _spans(trial: Trial, layer: Layer, width: Width) -> int:
    """Into how many equal spans the experts fall in which they can change places; 0 if in none."""
    stacked = {m.parameter for m in layer.matrices if m.expert is not None}
    for spans in (n for n in range(1, width.units // 2 + 1) if width.units % n == 0):
        turned = torch.arange(width.units).reshape(spans, -1).roll(1, 1).flatten()
        cuts = width.places[0].cuts
        turns = {name: (cut.fold(turned, width.units),) for name, cut in cuts.items()}
        alone = trial.run({n: folds for n, folds in turns.items() if n not in stacked})
        change = alone.away(trial.before)
        if change and trial.run(turns).away(trial.before) <= KEPT * change:
            return spans
    return 0
