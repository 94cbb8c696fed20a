"""Healing layer by layer: each learns what the original hands to the layer that follows it."""

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.func import functional_call

from layerwise.core.calls import snapshot
from layerwise.core.errors import LayerwiseError
from layerwise.core.journal import Journal
from layerwise.core.lockstep import walk
from layerwise.core.network import Network, fill
from layerwise.core.plan import Heal
from layerwise.core.stack import Layer
from layerwise.core.stops import Batch, Lane, hidden
from layerwise.core.weight import Dense
from layerwise.train.healing import Course, Healed, Leaves, wholes

#: number of a batch -> a state of the stream `[batch, seq, dim]`
States = Mapping[int, Tensor]


class Goal(NamedTuple):
    """Where a state is found in the original: before a layer, or after it."""

    path: str
    kind: Literal["enter", "leave"]


def goals_of(
    teacher: Network, student: Network, orders: Mapping[str, Sequence[int]]
) -> dict[str, Goal]:
    """What every layer of an edited network, by its key, is to hand on.

    It is what the original hands to the layer that follows there, or to what follows the stack.

    Args:
        teacher: the original.
        student: the edited network.
        orders: which layers of the original those of a stack are; all of them where it is missing.

    Raises:
        LayerwiseError: an order repeats or exchanges layers.
    """
    found = {}
    for old, new in zip(teacher.stacks, student.stacks, strict=True):
        order = list(orders.get(new.name, range(len(old.layers))))
        plain = len(order) == len(new.layers) == len(new.wiring) and order == sorted(set(order))
        if not plain:
            raise LayerwiseError(
                "heal.mode=layers",
                allowed="an order in which layers are only left out, each one module",
                found=f"{new.name}: {order}",
                fix="choose heal.mode=full or adapters",
            )
        ahead = [Goal(old.layers[index].path, "enter") for index in order[1:]]
        goals = [*ahead, Goal(old.layers[-1].path, "leave")]
        found |= {layer.key: goal for layer, goal in zip(new.layers, goals, strict=True)}
    return found


def heal_layers(
    teacher: Network,
    student: Network,
    orders: Mapping[str, Sequence[int]],
    batches: Sequence[Batch],
    held: Sequence[Batch],
    how: Heal,
    *,
    seed: int = 0,
    journal: Journal | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Healed:
    """Train one layer after the other: `min |f(x) - y|^2 / |y|^2` over its parameters.

    `x` is what the healed layers before it hand on, and `y` what the original hands to the layer
    that follows, so that a layer makes up for those left out behind it. Both networks walk side by
    side, with one layer of each in memory.

    Args:
        teacher: the original; streamed, or loaded.
        student: the edited network, streamed.
        orders: which layers of the original those of a stack are.
        batches: to train on.
        held: to choose the best step of every layer on.
        how: steps of every layer, rate and when to stop.
        seed: of the order of batches.
        journal: finished layers; a later call goes on behind them and ends with the same bytes.
        progress: called with the layers that are done, and all of them.

    Raises:
        LayerwiseError: an order does more than leave layers out.

    Reference: as `heal`; local regression as in LaDiMo, Kim et al., 2024, arXiv:2408.04278.
    """
    goals, both = goals_of(teacher, student, orders), [*batches, *held]
    healed = Healed({}, [])
    with closing(states_at(teacher, both, list(goals.values()))) as ahead:
        wanted: States = next(ahead)  # begun first, so ended last: each puts back what it found
        for stop in walk(student, both):
            layer = stop.layer
            if stop.kind != "enter":
                continue
            wanted = wanted or next(ahead)
            if journal is not None and layer.key in journal:
                made = {name: record.dense() for name, record in journal.read(layer.key).items()}
                row = journal.lines[layer.key]["report"]
            else:
                made, row = heal_layer(layer, stop.lanes, wanted, len(batches), how, seed)
                if journal is not None:
                    journal.write(layer.key, {n: Dense(t) for n, t in made.items()}, row)
            fill(layer.module, made, student.device)
            healed.tensors.update({f"{layer.path}.{name}": t for name, t in made.items()})
            healed.rows.append(row)
            wanted = {}
            progress(len(healed.rows), len(goals))
    return healed


def states_at(
    network: Network, batches: Sequence[Batch], goals: Sequence[Goal]
) -> Generator[States, None, None]:
    """The stream at some places, in the order in which a walk comes by them."""
    for stop in walk(network, batches):
        if Goal(stop.layer.path, stop.kind) in goals:  # type: ignore[arg-type]
            before = stop.kind == "enter"
            yield {
                lane.batch: hidden((lane.args, lane.kwargs) if before else lane.output)
                for lane in stop.lanes
            }


def heal_layer(
    layer: Layer, lanes: Sequence[Lane], wanted: States, count: int, how: Heal, seed: int
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A layer's parameters after training, by their names in it, and a row on that.

    The first `count` batches are to train on, the others to choose the best step on.
    """
    calls = {lane.batch: lane for lane in lanes}
    prefix = f"{layer.path}."

    def error(number: int, leaves: Leaves) -> Tensor:
        made = {name.removeprefix(prefix): leaf for name, (leaf,) in leaves.items()}
        args, kwargs = snapshot((calls[number].args, calls[number].kwargs))
        found = hidden(functional_call(layer.module, made, args, kwargs, strict=False))
        y = wanted[number]
        return (found - y).square().sum() / y.square().sum().clamp_min(1e-30)

    def told(leaves: Leaves) -> float:
        others = range(count, len(calls))
        with torch.no_grad():
            return sum(error(number, leaves).item() for number in others) / max(len(others), 1)

    course = Course(wholes(layer.path, layer.module), how)
    course.note(0, told(course.now))
    if course.history[0][1]:  # else no layer before it was left out, nor behind it
        with torch.enable_grad():
            course.run(count, error, told, seed, lambda done, total: None)
    made = {name.removeprefix(prefix): leaf for name, (leaf,) in course.result.items()}
    errors = [value for _, value in course.history]
    row = {"layer": layer.key, "steps": course.step, "before": errors[0], "error": min(errors)}
    return made, row
