"""Finding the widths of a network by trying.

A whole number of the configuration is changed in a model without weights: where
axes of the layers' parameters, and nothing else, become shorter by the same share, they hold its
units. They are its units indeed if they can change places in all these axes and the layer still
computes the same, and if a unit that is zero in all of them is one that is not read. So what was
fused, and what groups of heads share, needs no table. The matrix whose inputs are the units reads
them: those that it does not read can be taken out of the layer.
"""

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from layerwise.core.errors import LayerwiseError
from layerwise.core.fold import Fold
from layerwise.core.hollow import build_meta
from layerwise.core.lockstep import walk
from layerwise.core.network import Network
from layerwise.core.stack import Layer
from layerwise.core.task import example_inputs
from layerwise.core.trial import Trial
from layerwise.core.width import Cut, Width, narrowed_config
from layerwise.core.wiring import configs_in

#: a length that nothing else has
PROBE = 7
#: what may be left of a change that was taken back
KEPT = 1e-3


class Candidate(NamedTuple):
    """Fields with their values, what is to be said besides, and the cuts that are to be tried."""

    fields: Mapping[str, int]
    fixed: Mapping[str, int]
    units: int
    ways: Sequence[Mapping[str, Cut]]


def find_widths(network: Network) -> list[Width]:
    """The widths of a network that all its layers have, each with one reader in a layer.

    The network runs up to the first layer of each stack, on a short input.
    """
    first = {stack.layers[0].path for stack in network.stacks}
    found: list[Width] = []
    candidates = list(_candidates(network))
    batch = example_inputs(network.module)
    for stop in walk(network, [batch]) if candidates else ():
        if stop.kind != "enter" or stop.layer.path not in first:
            continue
        trial = Trial(stop.layer, stop.lanes[0].args, stop.lanes[0].kwargs)
        passed = (_tried(trial, candidate) for candidate in candidates)
        found = [width for width in passed if width is not None]
        candidates = [Candidate(w.fields, w.fixed, w.units, [w.cuts]) for w in found]
        first.remove(stop.layer.path)
        if not first or not found:
            break
    return without_overlap(found)


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
            fix="name fields of the configuration that all layers of this network shrink with",
        )
    return found


def shrunk(values: Sequence[int]) -> list[int] | None:
    """Numbers made smaller by one share, the least that whole numbers allow; none if they cannot.

    Example:
        >>> shrunk([8, 4]), shrunk([9]), shrunk([3, 2])
        ([4, 2], [6], None)
    """
    shared = math.gcd(*values)
    prime = next((p for p in range(2, shared + 1) if shared % p == 0), None)
    return None if prime is None else [v // prime * (prime - 1) for v in values]


def _candidates(network: Network) -> Iterator[Candidate]:
    """Fields that make layers narrower, one by one or two together, and how it may be cut.

    Fields without a value are given the one that they stand for: the size of a head would change
    with the number of heads.
    """
    kind, config = type(network.model), network.model.config
    before = shapes_stored(kind, config)
    inside = tuple(f"{layer.path}." for layer in network.layers())
    told = _told(kind, config, before)
    settled = narrowed_config(config, {path: value for path, (value, _) in told.items()})
    alone: dict[str, int] = {}

    def cut(fields: dict[str, int]) -> Iterator[Candidate]:
        changed = changed_axes(kind, settled, before, fields)
        if changed and all(name.startswith(inside) for name in changed):
            fixed = {
                p: v for p, (v, names) in told.items() if names & {*changed} and p not in fields
            }
            yield from _cut(network, fields, fixed, changed)

    for path, value in _fields(settled, before):
        ways = list(cut({path: value}))
        alone |= {path: value} if ways else {}
        yield from ways
    for (one, large), (other, small) in product(alone.items(), repeat=2):
        if one != other and large % small == 0 and (large > small or one < other):
            yield from cut({one: large, other: small})


def _fields(
    config: PretrainedConfig, shapes: Mapping[str, torch.Size]
) -> Iterator[tuple[str, int]]:
    """The whole numbers of a configuration that divide the length of some axis."""
    lengths = {size for shape in shapes.values() for size in shape}
    for path, part in configs_in(config.to_dict()):
        for name, value in part.items():
            if type(value) is int and value > 1 and any(size % value == 0 for size in lengths):
                yield path + name, value


def _told(
    kind: type[PreTrainedModel], config: PretrainedConfig, before: Mapping[str, torch.Size]
) -> dict[str, tuple[int, set[str]]]:
    """What fields without a value stand for, and which parameters they shape, if these tell.

    Seen by giving each a value.
    """
    found = {}
    for path in [
        p + n for p, part in configs_in(config.to_dict()) for n, v in part.items() if v is None
    ]:
        try:
            shapes = shapes_stored(kind, narrowed_config(config, {path: PROBE}))
        except Exception:  # a field that takes no number
            continue
        axes = [
            (name, a * PROBE / b)
            for name in before.keys() & shapes.keys()
            for a, b in zip(before[name], shapes[name], strict=False)
            if a != b
        ]
        values = {value for _, value in axes}
        if len(values) == 1 and min(values).is_integer():
            found[path] = int(min(values)), {name for name, _ in axes}
    return found


def shapes_stored(kind: type[PreTrainedModel], config: PretrainedConfig) -> dict[str, torch.Size]:
    """The shapes of all tensors that a model of some configuration stores, by their names."""
    model = build_meta(kind, copy.deepcopy(config), torch.float32)
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def changed_axes(
    kind: type[PreTrainedModel],
    config: PretrainedConfig,
    before: Mapping[str, torch.Size],
    fields: Mapping[str, int],
) -> dict[str, int] | None:
    """The axis of every parameter that shrinks as the fields do; none if they do anything else."""
    fewer = shrunk(list(fields.values()))
    if fewer is None:
        return None
    try:
        shapes = shapes_stored(kind, narrowed_config(config, dict(zip(fields, fewer, strict=True))))
    except Exception:  # a value that the architecture refuses is simply no width
        return None
    if shapes.keys() != before.keys():
        return None
    share = fewer[0] / next(iter(fields.values()))
    found = {}
    for name, shape in shapes.items():
        axes = [i for i, (a, b) in enumerate(zip(before[name], shape, strict=False)) if a != b]
        if not axes:
            continue
        if len(axes) > 1 or before[name][axes[0]] * share != shape[axes[0]]:
            return None
        found[name] = axes[0] - len(shape)
    return found


def _cut(
    network: Network,
    fields: Mapping[str, int],
    fixed: Mapping[str, int],
    changed: Mapping[str, int],
) -> Iterator[Candidate]:
    """Ways in which the parameters of a layer may hold the units of some fields."""
    units = math.gcd(*fields.values())
    layers = network.layers()
    axes, *others = [axes_in(layer, changed) for layer in layers]
    if not axes or any(other != axes for other in others):
        return
    sizes = {name: size for name, (_, size) in axes.items()}
    if any(size % units for size in sizes.values()):
        return
    least = min(sizes.values()) // units
    shapes_of = {size: _pieces(size // units, least) for size in {*sizes.values()}}
    ways = []
    for chosen in product(*shapes_of.values()):
        pieces = dict(zip(shapes_of, chosen, strict=True))
        ways.append({n: Cut(axis, pieces[size]) for n, (axis, size) in axes.items()})
    yield Candidate(fields, fixed, units, ways)


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


def _tried(trial: Trial, candidate: Candidate) -> Width | None:
    """The width that some fields are, if the units of a layer can change places."""
    fields, fixed, units, ways = candidate
    for cuts in ways:
        readers = [n for n, c in cuts.items() if _reads(trial, n, c)]
        if len(readers) != 1 or len(cuts[readers[0]].pieces) != 1:
            continue
        turned = torch.arange(units).roll(1)
        own = {name: cut for name, cut in cuts.items() if name in trial.tensors}
        stacks = {trial.tensors[name].shape[:-2] for name in own}
        if len(stacks) != 1:  # experts beside what all of them share
            continue
        turns = {n: (c.fold(turned, units),) for n, c in own.items()}
        zeros = {n: (Fold(c.axis, _last_zero(c, units)),) for n, c in own.items()}
        moved, unread = (trial.run({readers[0]: f[readers[0]]}) for f in (turns, zeros))
        change, lost = moved.away(trial.before), unread.away(trial.before)
        same = change and trial.run(turns).away(trial.before) <= KEPT * change
        if same and trial.run(zeros).away(unread) <= KEPT * lost:
            return Width(fields, units, cuts, readers[0], fixed)
    return None


def _last_zero(cut: Cut, units: int) -> Tensor:
    """Factors along an axis that make the last unit zero."""
    found = torch.ones(units * sum(cut.pieces))
    found[cut.entries(torch.tensor([units - 1]), units)] = 0.0
    return found


def _reads(trial: Trial, name: str, cut: Cut) -> bool:
    """Whether the axis is that of a matrix's inputs."""
    found = trial.matrices.get(name)
    if found is None:
        return False
    return cut.axis == trial.axis(name, inputs=True)


def without_overlap(widths: Sequence[Width]) -> list[Width]:
    """Widths that share no parameter's axis with one before them; those of more units first."""
    found: list[Width] = []
    taken: set[tuple[str, int]] = set()
    for width in sorted(widths, key=lambda w: -w.units):
        own = {(name, cut.axis) for name, cut in width.cuts.items()}
        if not own & taken:
            found.append(width)
            taken |= own
    return found
