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
from layerwise.core.find_widths import KEPT, axes_in, changed_axes, shapes_stored, without_overlap
from layerwise.core.fold import Fold
from layerwise.core.lockstep import walk
from layerwise.core.network import Network
from layerwise.core.open import refolded
from layerwise.core.stack import Layer
from layerwise.core.task import example_inputs
from layerwise.core.trial import Trial
from layerwise.core.width import Cut, Width, narrowed_config
from layerwise.core.wiring import configs_in

#: numbers of the experts that stay, by the key of their layer in the original
Kept = Mapping[str, Sequence[int]]


def find_experts(network: Network) -> list[Width]:
    """The experts of a network: widths without a reader, which not all layers need to have.

    The network runs up to the first layer that has some, on a short input. Those that a router
    chooses by groups can change places inside a group, a span of the width.
    """
    found: list[Width] = []
    candidates = [(width, layers_with(network, width)[0].path) for width in _candidates(network)]
    for stop in walk(network, [example_inputs(network.module)]) if candidates else ():
        mine = [width for width, path in candidates if path == stop.layer.path]
        if stop.kind != "enter" or not mine:
            continue
        trial = Trial(stop.layer, stop.lanes[0].args, stop.lanes[0].kwargs)
        spans = {width.name: _spans(trial, stop.layer, width) for width in mine}
        found += [w._replace(spans=spans[w.name]) for w in mine if spans[w.name]]
        candidates = [(width, path) for width, path in candidates if path != stop.layer.path]
        if not candidates:
            break
    return without_overlap(found)


def layers_with(network: Network, width: Width) -> list[Layer]:
    """The layers that have the tensors of a width."""
    layers = network.layers()
    return [la for la in layers if width.cuts.keys() <= la.module.state_dict().keys()]


def least_experts(network: Network, width: Width) -> int:
    """How few experts the architecture can be built with and run: as many as a token runs.

    Found by trying, on a network without weights.
    """
    layers = [original_key(network, layer) for layer in layers_with(network, width)]

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
        _check(network, width, kept)
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
        for layer in layers_with(network, width):
            numbers = torch.tensor(sorted(kept[original_key(network, layer)]))
            path = network.origins.get(layer.path, layer.path)
            folds |= {
                f"{path}.{name}": (cut.fold(numbers, width.units),)
                for name, cut in width.cuts.items()
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


def original_key(network: Network, layer: Layer) -> str:
    """The key that a layer has in the order of the checkpoint."""
    visit = network.visits.get(layer.path)
    return layer.key if visit is None else f"{layer.stack}/{visit.layer}"


def _check(network: Network, width: Width, kept: Kept) -> None:
    wanted = {original_key(network, layer) for layer in layers_with(network, width)}
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
                yield from _width(path + name, value, [(la, axes) for la, axes in own if axes])


def _width(
    field: str, units: int, own: Sequence[tuple[Layer, Mapping[str, tuple[int, int]]]]
) -> Iterator[Width]:
    """The width of a field, if all layers that it shapes have the same, and all experts do."""
    first, axes = own[0]
    stacked = {m.parameter for la, _ in own for m in la.matrices if m.expert is not None}
    along = all(name in axes and axes[name][0] == -len(first.shapes[name]) for name in stacked)
    whole = all(size % units == 0 for _, size in axes.values())
    if stacked and along and whole and all(other == axes for _, other in own):
        cuts = {name: Cut(axis, (size // units,)) for name, (axis, size) in axes.items()}
        yield Width({field: units}, units, cuts, "")


def _spans(trial: Trial, layer: Layer, width: Width) -> int:
    """Into how many equal spans the experts fall in which they can change places; 0 if in none."""
    stacked = {m.parameter for m in layer.matrices if m.expert is not None}
    for spans in (n for n in range(1, width.units // 2 + 1) if width.units % n == 0):
        turned = torch.arange(width.units).reshape(spans, -1).roll(1, 1).flatten()
        turns = {name: (cut.fold(turned, width.units),) for name, cut in width.cuts.items()}
        alone = trial.run({n: folds for n, folds in turns.items() if n not in stacked})
        change = alone.away(trial.before)
        if change and trial.run(turns).away(trial.before) <= KEPT * change:
            return spans
    return 0
