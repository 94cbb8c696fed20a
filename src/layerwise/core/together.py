"""Layers that read one input: what each of them changes of it is added to what came before."""

from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from torch import Tensor

from layerwise.core.errors import LayerwiseError
from layerwise.core.instead import swapped
from layerwise.core.stack import Layer, Visit
from layerwise.core.stops import hidden

#: what the groups that are being visited read, by their number; every lane of a walk has its own
_READ: ContextVar[Mapping[int, Tensor]] = ContextVar("read", default=MappingProxyType({}))


@dataclass
class Together:
    """A layer of a group whose members all read what the first of them reads.

    `y = x + sum_i (f_i(x) - x)`: each later member is given `x`, and adds what it changes of it
    to what came to it.
    """

    forward: Callable[..., Any]
    group: int
    first: bool
    last: bool

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """One visit of the group."""
        given, read = hidden((args, kwargs)), _READ.get()
        if self.first:
            _READ.set({**read, self.group: given.clone()})  # a layer may write into its input
            return self.forward(*args, **kwargs)
        x, before = read[self.group], given.clone()
        if self.last:
            _READ.set({group: held for group, held in read.items() if group != self.group})
        args, kwargs = swapped((args, kwargs), given, x.clone())
        output = self.forward(*args, **kwargs)
        new = hidden(output)
        return swapped(output, new, before + (new - x))


def run_together(layers: Sequence[Layer], visits: Sequence[Visit]) -> None:
    """Let the layers of every parallel group read one input.

    Raises:
        LayerwiseError: one of them does not keep the shape of its input.
    """
    for layer, visit in zip(layers, visits, strict=True):
        if visit.parallel is None:
            continue
        if not layer.keeps_shape:
            raise LayerwiseError(
                f"wiring, layer {layer.key}",
                allowed="layers in parallel that keep the shape of their input",
                found="one that changes it",
                fix="leave it out of the group",
            )
        numbers = [i for i, other in enumerate(visits) if other.parallel == visit.parallel]
        ends = layer.index == numbers[0], layer.index == numbers[-1]
        own = layer.module.forward
        vars(layer.module)["forward"] = Together(own, visit.parallel, *ends)
