"""One layer, run on one call with some of its tensors changed: what a change really does."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import functional_call
from torch.utils._pytree import tree_map

from layerwise.core.calls import snapshot, tensors_in
from layerwise.core.fold import Folds
from layerwise.core.hollow import CONVOLUTIONS, operands
from layerwise.core.instead import swapped
from layerwise.core.stack import Layer, Matrix
from layerwise.core.stops import hidden
from layerwise.core.watching import Watching


class Run(NamedTuple):
    """What a layer gave, and what its matrices received, rows `[rows, in]` by parameter."""

    output: list[Tensor]
    inputs: Mapping[str, Tensor]

    def away(self, other: "Run") -> float:
        """How far two outputs are from each other."""
        if [t.shape for t in self.output] != [t.shape for t in other.output]:
            return math.inf
        pairs = zip(self.output, other.output, strict=True)
        return sum((a.double() - b.double()).square().sum().item() for a, b in pairs) ** 0.5


class Trial:
    """Runs of one layer on one call, in float32; its own weights stay as they are."""

    def __init__(self, layer: Layer, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self.module = layer.module
        self.call = tree_map(wide, snapshot((args, dict(kwargs))))
        found = {**dict(self.module.named_parameters()), **dict(self.module.named_buffers())}
        self.tensors = {name: wide(tensor.detach()) for name, tensor in found.items()}
        #: parameters that are matrices `[out, in]` or stacks of them, by name
        self.matrices = {m.parameter: m for m in layer.matrices if self._plain(m)}
        self.before = self.run({})

    def _plain(self, matrix: Matrix) -> bool:
        found = self.tensors.get(matrix.parameter)
        return found is not None and found.ndim == (2 if matrix.expert is None else 3)

    def axis(self, parameter: str, inputs: bool) -> int:
        """The axis of a matrix along its inputs, or along its outputs."""
        return -1 if self.matrices[parameter].transposed != inputs else -2

    def run(
        self, folds: Folds, mix: Tensor | None = None, add: Mapping[str, Tensor] | None = None
    ) -> Run:
        """The layer with some tensors changed.

        With `mix` on a stream that is multiplied by it; `add` goes to the outputs of matrices.
        """
        tensors = dict(self.tensors)
        for name, changes in folds.items():
            for fold in changes:
                tensors[name] = fold.of(tensors[name])
        args, kwargs = tree_map(_fresh, snapshot(self.call))
        if mix is not None:
            x = hidden((args, kwargs))
            args, kwargs = swapped((args, kwargs), x, x @ mix.to(x))
        own = {n: tensors[n] for n in self.matrices}
        with torch.no_grad(), _Inputs(own, add or {}) as seen:
            output = functional_call(self.module, tensors, args, kwargs, strict=False)
        given = [t for t in tensors_in(output) if t.is_floating_point()]
        return Run(given, {name: torch.cat(rows) for name, rows in seen.rows.items()})


class _Inputs(Watching):
    """Keeps what some tensors are multiplied with while it is open, and adds to what comes out."""

    def __init__(self, tensors: Mapping[str, Tensor], add: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._add = add
        self._names = {t.untyped_storage().data_ptr(): name for name, t in tensors.items()}
        self.rows: dict[str, list[Tensor]] = {}

    def _call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = None
        found = None if func in CONVOLUTIONS else operands(func, args, kwargs)
        if found is not None:
            name = self._names.get(found[1].untyped_storage().data_ptr())
            if name is not None:
                self.rows.setdefault(name, []).append(found[0].flatten(0, -2).clone())
        output = func(*args, **kwargs)
        return output + self._add[name] if name is not None and name in self._add else output


def wide(value: Any) -> Any:
    """A tensor of less than 32 bits in float32; anything else as it is."""
    small = isinstance(value, Tensor) and value.is_floating_point() and value.itemsize < 4
    return value.float() if small else value


def _fresh(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value
