"""Where the lanes of a walk stand, and what can be done there."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from greenlet import greenlet
from torch import Tensor

from layerwise.core.calls import tensors_in
from layerwise.core.stack import Layer, Matrix
from layerwise.core.weight import Weight

if TYPE_CHECKING:
    from layerwise.core.lockstep import Walk

Batch = Mapping[str, Tensor]
Edits = dict[str, Tensor]


@dataclass
class Lane:
    """One batch in one stream: a suspended forward and where it stands."""

    batch: int
    clean: bool
    green: greenlet | None = None
    coming: "tuple[Layer, tuple[Any, ...], dict[str, Any]] | None" = None
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    output: Any = None
    result: Any = None
    pause: "Pause | None" = None
    done: bool = False


@dataclass
class Pause:
    """An operation about to run: its parameter, expert (or None for all), and its input.

    `rows` gives the rows that a convolution multiplies.
    """

    parameter: str
    expert: int | None
    x: Tensor
    offsets: Tensor | None
    rows: Callable[[], Tensor] | None = None

    @property
    def key(self) -> tuple[int, str]:
        """What lanes that stand at the same operation have in common."""
        return (-1 if self.expert is None else self.expert, self.parameter)


@dataclass
class Rows:
    """What one input group received: rows `[tokens, in]` per lane, and its matrices."""

    inputs: str
    matrices: tuple[Matrix, ...]
    edited: dict[int, Tensor]
    clean: dict[int, Tensor]


@dataclass
class Stop:
    """A place in the walk. `enter` and `leave` stand before and after a layer, `at` in it.

    `done` stands where a lane has come to its end, before the next one does.
    """

    kind: Literal["enter", "at", "leave", "done"]
    layer: Layer
    lanes: list[Lane]
    rows: list[Rows]
    walk: "Walk"

    def weight(self, matrix: Matrix) -> Tensor:
        """The matrix as stored, `[out, in]`."""
        return matrix.view(self.walk.parameters[matrix.parameter].detach())

    def substitute(self, matrix: Matrix, value: Tensor) -> None:
        """Let the edited lanes use this value, `[out, in]`, from now on in this layer."""
        name, edits = matrix.parameter, self.walk.edits
        edits[name] = matrix.put(value, self.walk.parameters[name], edits.get(name))

    def substitute_all(self, records: Mapping[str, Weight]) -> None:
        """Let the edited lanes use what edits made of the layer's matrices, by their keys."""
        for matrix in self.layer.matrices:
            if matrix.key in records:
                self.substitute(matrix, records[matrix.key].dense())

    def replay(self, lane: Lane, edits: Edits | None = None) -> Any:
        """Run the layer on a lane's call once more, outside of the walk."""
        kept, self.walk.edits = self.walk.edits, self.walk.edits if edits is None else edits
        try:
            with self.walk, torch.no_grad():
                return self.layer.module(*lane.args, **lane.kwargs)
        finally:
            self.walk.edits = kept


def hidden(tree: Any) -> Tensor:
    """The hidden state in the arguments or the output of a layer, of three axes if one has them."""
    found = [t for t in tensors_in(tree) if t.is_floating_point()]
    return next((t for t in found if t.ndim >= 3), found[0])


def rows_of(pause: Pause, matrix: Matrix) -> Tensor:
    """Rows `[tokens, in]` of an operation's input that one matrix sees."""
    x = pause.x if pause.rows is None else pause.rows()
    if matrix.expert is None or pause.expert is not None:
        return x.reshape(-1, x.shape[-1])
    if pause.offsets is not None:
        ends = [0, *pause.offsets.tolist()]
        return x[ends[matrix.expert] : ends[matrix.expert + 1]]
    return x[matrix.expert].reshape(-1, x.shape[-1])
