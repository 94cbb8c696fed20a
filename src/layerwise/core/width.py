"""Widths: what a configuration lets every layer have fewer of, such as channels or heads."""

import copy
from collections.abc import Mapping
from math import gcd
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


class Place(NamedTuple):
    """Where some layers hold the units of a width, each layer units of its own.

    `layers` are keys in the order of the checkpoint, `cuts` by the names of parameters in a layer;
    `reader` is the one whose inputs the units are, and nobody reads experts.
    """

    layers: tuple[str, ...]
    cuts: Mapping[str, Cut]
    reader: str

    @property
    def block(self) -> int:
        """Inputs of the reader that belong to one unit; 0 without a reader."""
        return self.cuts[self.reader].pieces[0] if self.reader else 0

    def read_units(self, tensors: Mapping[str, Tensor], count: int) -> Tensor:
        """Which of `count` units of a layer its reader reads: `[count]`, or `[experts, count]`."""
        rows = tensors[self.reader].movedim(self.cuts[self.reader].axis, -1)
        return rows.ne(0).any(-2).unflatten(-1, (count, self.block)).any(-1)

    def without(self, tensors: Mapping[str, Tensor], kept: Tensor, count: int) -> dict[str, Tensor]:
        """The tensors of a layer with the kept units alone, `[units]`, or `[experts, units]`."""
        found = dict(tensors)
        for name, cut in self.cuts.items():
            if name in found and kept.ndim == 1:
                found[name] = cut.fold(kept, count).of(found[name])
            elif name in found:
                own = (cut.fold(k, count) for k in kept)
                found[name] = torch.stack([f.of(t) for f, t in zip(own, found[name], strict=True)])
        return found


class Width(NamedTuple):
    """How many units layers have in some places, and which fields of the configuration say so.

    `fields` are paths such as `text_config.intermediate_size` with their values now; all shrink by
    the same share. What is `fixed` would follow from them if it were not said. As many units stay
    of each of the `spans`, and `least` of all of them.
    """

    fields: Mapping[str, int]
    units: int
    places: tuple[Place, ...]
    fixed: Mapping[str, int] = {}
    spans: int = 1
    least: int = 1

    @property
    def name(self) -> str:
        """The first of its fields."""
        return next(iter(self.fields))

    @property
    def read(self) -> bool:
        """Whether matrices read the units, which nobody does of experts."""
        return all(place.reader for place in self.places)

    @property
    def block(self) -> int:
        """What the inputs that belong to one unit are a multiple of in all places."""
        return gcd(*(place.block for place in self.places))

    def values(self, units: int) -> dict[str, int]:
        """The fields of the configuration with so many units."""
        return {n: v * units // self.units for n, v in self.fields.items()} | {**self.fixed}

    def inside(self, layer: str) -> list[Place]:
        """The places of a layer, by its key in the order of the checkpoint."""
        return [place for place in self.places if layer in place.layers]

    def holding(self, layer: str, parameter: str) -> list[Place]:
        """The places of a layer in which a parameter holds units: one, or none."""
        return [place for place in self.inside(layer) if parameter in place.cuts]

    def narrowed(self, tensors: Mapping[str, Tensor], units: int, layer: str) -> dict[str, Tensor]:
        """The tensors of a layer with so many units in every place: those that are read.

        Raises:
            LayerwiseError: more are read than there are to be.
        """
        found = dict(tensors)
        for place in self.inside(layer):
            read = place.read_units(tensors, self.units)
            most = int(read.sum(-1).max())
            if most > units:
                raise LayerwiseError(
                    f"plan, widths {self.name} at layer {layer}",
                    allowed=f"{units} units of {self.units} that {place.reader} reads",
                    found=most,
                    fix="give it a chain that leaves so many: sparsegpt with pattern "
                    f"column:{place.block} and share {units / self.units:g}",
                )
            order = (~read).to(torch.uint8).argsort(dim=-1, stable=True)
            kept = order[..., :units].sort(-1).values
            found = place.without(found, kept, self.units)
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
