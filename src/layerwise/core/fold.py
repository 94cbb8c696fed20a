"""Folds: changes of stored tensors that together keep what a network computes."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from layerwise.core.checkpoint import read_header, read_tensor
from layerwise.core.shards import write_safetensors

#: the file in a result that holds what its plan's rewrites came to
FILE = "layerwise.rewrites"


class Fold(NamedTuple):
    """A change of a tensor along one axis.

    A `value` `[size]` multiplies: `t' = (t + shift) * value - shift`; `shift` is 1 for a norm that
    multiplies by 1 + weight. A `value` `[size, size]` mixes: `t'_j = sum_k t_k value_kj`. Whole
    numbers `[any]` choose: `t'_j = t_value_j`.
    """

    axis: int
    value: Tensor
    shift: float = 0.0

    def of(self, tensor: Tensor) -> Tensor:
        """The tensor with this change, in float32 at least.

        Example:
            >>> Fold(-1, torch.tensor([2.0, 1.0]), shift=1.0).of(torch.tensor([0.5, 0.5]))
            tensor([2.0000, 0.5000])
        """
        if not self.value.is_floating_point():
            return tensor.index_select(self.axis, self.value.to(tensor.device))
        wide = tensor if tensor.dtype == torch.float64 else tensor.float()
        last = wide.movedim(self.axis, -1) + self.shift
        value = self.value.to(wide)
        changed = last @ value if value.ndim == 2 else last * value
        return (changed - self.shift).movedim(-1, self.axis).contiguous()


#: by the full name of a tensor in memory: its changes, one after the other
Folds = Mapping[str, tuple[Fold, ...]]


def folded(tensor: Tensor, folds: Iterable[Fold]) -> Tensor:
    """A tensor with all its changes, in float32 at least if there are any."""
    for fold in folds:
        tensor = fold.of(tensor)
    return tensor


def joined(*several: Folds) -> dict[str, tuple[Fold, ...]]:
    """The changes of all of them, those of the first one first."""
    found: dict[str, tuple[Fold, ...]] = {}
    for folds in several:
        for name, changes in folds.items():
            found[name] = found.get(name, ()) + tuple(changes)
    return found


def to_tensors(folds: Folds) -> dict[str, Tensor]:
    """Folds as matrices under names that say where they belong; a value that is shared, once."""
    values: dict[int, str] = {}
    found: dict[str, Tensor] = {}
    for name, changes in folds.items():
        for number, (axis, value, shift) in enumerate(changes):
            key = f"{name}|{number}|{axis}|{shift:g}"
            first = values.setdefault(id(value), key)
            rows = value if value.ndim == 2 else value[None]
            whole = {key: rows} if first is key else {f"{key}|{first}": rows[:0, :0]}
            found |= whole
    return found


def from_tensors(tensors: Mapping[str, Tensor]) -> dict[str, tuple[Fold, ...]]:
    """The folds that `to_tensors` named."""
    found: dict[str, dict[int, Fold]] = {}
    for key, value in tensors.items():
        name, number, axis, shift, *first = key.split("|", 4)
        rows = tensors[first[0]] if first else value
        plain = rows[0] if len(rows) == 1 else rows
        found.setdefault(name, {})[int(number)] = Fold(int(axis), plain, float(shift))
    return {name: tuple(own[i] for i in sorted(own)) for name, own in found.items()}


def save_folds(folder: Path, folds: Folds) -> None:
    """Keep folds, if there are any, beside the weights that they were made for."""
    if folds:
        write_safetensors(folder / FILE, to_tensors(folds))


def load_folds(folder: Path) -> dict[str, tuple[Fold, ...]]:
    """The folds that lie in a folder; none where there is no such file."""
    path = folder / FILE
    if not path.exists():
        return {}
    return from_tensors({name: read_tensor(info) for name, info in read_header(path).items()})
