"""Widths: what a configuration lets every layer have fewer of, such as channels or heads."""

import copy
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PretrainedConfig

from layerwise.core.errors import LayerwiseError
from layerwise.core.fold import Fold


class Cut(NamedTuple):
    """How an axis of a parameter holds units: in pieces, with so many entries of every unit.

    The axis is counted from the last one, -1.
    """

    axis: int
    pieces: tuple[int, ...]

    def entries(self, units: Tensor, count: int) -> Tensor:
        """The entries of some of `count` units along the axis, piece by piece.

        Example:
            >>> Cut(-1, (2, 1)).entries(torch.tensor([0, 2]), 3)
            tensor([0, 1, 4, 5, 6, 8])
        """
        found, start = [], 0
        for block in self.pieces:
            found.append(start + (units[:, None] * block + torch.arange(block)).flatten())
            start += count * block
        return torch.cat(found)

    def fold(self, units: Tensor, count: int) -> Fold:
        """Some of `count` units taken along the axis, in their order."""
        return Fold(self.axis, self.entries(units, count))


class Width(NamedTuple):
    """How many units every layer has, by which fields of the configuration, and where they lie.

    `fields` are paths such as `text_config.intermediate_size` with their values now; all shrink by
    the same share. What is `fixed` would follow from them if it were not said. `cuts` are by the
    names of parameters in a layer; `reader` is the one whose inputs the units are, and nobody
    reads experts. As many units stay of each of the `spans`, and `least` of all of them.
    """

    fields: Mapping[str, int]
    units: int
    cuts: Mapping[str, Cut]
    reader: str
    fixed: Mapping[str, int] = {}
    spans: int = 1
    least: int = 1

    @property
    def name(self) -> str:
        """The first of its fields."""
        return next(iter(self.fields))

    @property
    def block(self) -> int:
        """Inputs of the reader that belong to one unit; 0 without a reader."""
        return self.cuts[self.reader].pieces[0] if self.reader else 0

    def values(self, units: int) -> dict[str, int]:
        """The fields of the configuration with so many units."""
        return {n: v * units // self.units for n, v in self.fields.items()} | {**self.fixed}

    def read_units(self, tensors: Mapping[str, Tensor], units: int, where: str) -> Tensor:
        """The units of a layer that its reader reads: `[units]`, or `[experts, units]`.

        Raises:
            LayerwiseError: they are more than there are to be.
        """
        axis, size = self.cuts[self.reader].axis, self.block
        rows = tensors[self.reader].movedim(axis, -1)
        read = rows.ne(0).any(-2).unflatten(-1, (self.units, size)).any(-1)
        most = int(read.sum(-1).max())
        if most > units:
            raise LayerwiseError(
                f"plan, widths {self.name} at layer {where}",
                allowed=f"{units} units of {self.units} that {self.reader} reads",
                found=most,
                fix=f"give it a chain that leaves so many: sparsegpt with pattern column:{size} "
                f"and share {units / self.units:g}",
            )
        order = (~read).to(torch.uint8).argsort(dim=-1, stable=True)
        return order[..., :units].sort(-1).values

    def without(self, tensors: Mapping[str, Tensor], kept: Tensor) -> dict[str, Tensor]:
        """The tensors of a layer with the kept units alone, `[units]`, or `[experts, units]`."""
        found = dict(tensors)
        for name, cut in self.cuts.items():
            if name in found and kept.ndim == 1:
                found[name] = cut.fold(kept, self.units).of(found[name])
            elif name in found:
                own = (cut.fold(k, self.units) for k in kept)
                found[name] = torch.stack([f.of(t) for f, t in zip(own, found[name], strict=True)])
        return found


def narrowed_config(config: PretrainedConfig, values: Mapping[str, int]) -> PretrainedConfig:
    """A configuration with other values of some fields.

    Example:
        >>> from transformers import LlamaConfig
        >>> narrowed_config(LlamaConfig(), {"intermediate_size": 100}).intermediate_size
        100
    """
    shape = copy.deepcopy(config)
    for path, value in values.items():
        *parents, name = path.split(".")
        owner: Any = shape
        for parent in parents:
            owner = vars(owner)[parent]
        setattr(owner, name, value)
    return shape
