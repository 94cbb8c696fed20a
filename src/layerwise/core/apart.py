"""Experts that a checkpoint stores one by one and a model holds in one parameter."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightConverter, revert_weight_conversion

from layerwise.core.source import Source
from layerwise.core.stack import Layer, Stack

_WEIGHT = ".weight"


class Piece(NamedTuple):
    """A module on disk, and the rows of an expert's matrix that are its weight."""

    module: str
    rows: Tensor


def on_disk(
    model: PreTrainedModel, source: Source, tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Names in memory to names on disk, through transformers' own conversions."""
    vars(model)["_weight_conversions"] = source.conversions
    return revert_weight_conversion(model, dict(tensors))


def merges(source: Source) -> list[WeightConverter]:
    """The conversions in use that put stored weights together, or change them."""
    return [
        conversion
        for conversion in source.conversions
        if isinstance(conversion, WeightConverter)
        and all(pattern.endswith(_WEIGHT) for pattern in conversion.source_patterns)
    ]


def pieces(source: Source, layer: Layer, parameter: str) -> dict[int, list[Piece]]:
    """Where the experts of a parameter `[experts, rows, columns]` are stored, by their numbers.

    Found by the numbers of the rows, which are sent through the conversion that stores them.
    Nothing where an expert has no modules of its own on disk that hold whole rows.
    """
    shape = layer.shapes[parameter]
    if len(shape) != 3 or not merges(source):
        return {}
    numbers = torch.arange(shape[0] * shape[1]).reshape(shape[0], shape[1], 1)
    try:
        stored = on_disk(source.model, source, {f"{layer.path}.{parameter}": numbers})
    except (RuntimeError, ValueError, IndexError, KeyError):
        return {}  # it is not made of rows
    found: dict[int, list[Piece]] = {}
    for name, given in stored.items():
        experts = given.flatten() // shape[1]
        if given.shape[1:] != (1,) or (experts != experts[0]).any() or not name.endswith(_WEIGHT):
            return {}
        piece = Piece(name.removesuffix(_WEIGHT), given.flatten() % shape[1])
        found.setdefault(int(experts[0]), []).append(piece)
    return found


def tell_apart(stacks: Sequence[Stack], source: Source) -> tuple[Stack, ...]:
    """Stacks whose matrices know in how many modules of its own a checkpoint stores an expert."""
    if not merges(source):
        return tuple(stacks)
    return tuple(
        replace(stack, layers=tuple(_told(layer, source) for layer in stack.layers))
        for stack in stacks
    )


def _told(layer: Layer, source: Source) -> Layer:
    held = {m.parameter for m in layer.matrices if m.expert is not None and not m.transposed}
    counts: dict[tuple[str, int | None], int] = {
        (name, expert): len(own)
        for name in held
        for expert, own in pieces(source, layer, name).items()
    }
    matrices = (replace(m, apart=counts.get((m.parameter, m.expert), 0)) for m in layer.matrices)
    return replace(layer, matrices=tuple(matrices))
