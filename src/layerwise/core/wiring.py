"""A new execution order as an ordinary configuration: depth, and lists with one entry a layer."""

import copy
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from layerwise.core.errors import LayerwiseError
from layerwise.core.stack import Stack, Wiring


def parse_wiring(text: list[Any], depth: int, where: str) -> Wiring:
    """Read `[0, 1, 1, {layer: 3, copy: true}]`.

    Raises:
        LayerwiseError: an entry is no layer of the stack.
    """
    from layerwise.core.stack import Visit

    visits = []
    for entry in text:
        try:
            visit = Visit(entry) if isinstance(entry, int) else Visit(**entry)
        except TypeError:
            visit = Visit(-1)
        if not isinstance(visit.layer, int) or not 0 <= visit.layer < depth:
            raise LayerwiseError(
                where,
                allowed=f"layer numbers from 0 to {depth - 1}, or {{layer: n, copy: true}}",
                found=entry,
                fix="correct the entry",
            )
        visits.append(visit)
    if not visits:
        raise LayerwiseError(where, allowed="at least one layer", found="none", fix="keep one")
    return tuple(visits)


def _configs(config: PretrainedConfig) -> list[PretrainedConfig]:
    """A configuration and those nested in it."""
    nested = [v for v in vars(config).values() if isinstance(v, PretrainedConfig)]
    return [config, *(inner for n in nested for inner in _configs(n))]


def depth_fields(
    kind: type[PreTrainedModel], config: PretrainedConfig, stack: Stack
) -> list[tuple[int, str]]:
    """Fields (number of the nested config, name) that set the stack's length.

    A field counts when it equals the depth and the stack on the meta device is one layer longer
    after it was raised by one, together with the lists that have one entry a layer.
    """
    depth = len(stack.layers)
    found = []
    for number, part in enumerate(_configs(config)):
        for name, value in vars(part).items():
            if type(value) is int and value == depth:
                trial = copy.deepcopy(config)
                _stretch(_configs(trial)[number], name, depth, [*range(depth), depth - 1])
                if _length(kind, trial, stack.container) == depth + 1:
                    found.append((number, name))
    return found


def _stretch(part: PretrainedConfig, name: str, depth: int, order: list[int]) -> None:
    """Set the depth and put every per-layer list into the new order."""
    for key, value in list(vars(part).items()):
        if isinstance(value, list) and len(value) == depth and not _are_indices(value, depth):
            vars(part)[key] = [value[i] for i in order]
    vars(part)[name] = len(order)


def _are_indices(values: list[Any], depth: int) -> bool:
    """Whether a list names layers instead of describing each of them."""
    whole = all(isinstance(v, int) and not isinstance(v, bool) for v in values)
    return whole and len(values) > 2 and values == sorted(set(values)) and values[-1] < depth


def _length(kind: type[PreTrainedModel], config: PretrainedConfig, container: str) -> int:
    try:
        with torch.device("meta"):
            return len(list(kind(config).get_submodule(container).children()))
    except Exception:  # a trial value that the architecture refuses is simply not the depth
        return -1


def edited_config(
    kind: type[PreTrainedModel], config: PretrainedConfig, stack: Stack, wiring: Wiring
) -> PretrainedConfig:
    """The configuration under which the stock class builds the stack in its new order.

    Raises:
        LayerwiseError: no field of the configuration sets the stack's depth.
    """
    order = [visit.layer for visit in wiring]
    if order == list(range(len(stack.layers))):
        return config
    fields = depth_fields(kind, config, stack)
    if not fields:
        raise LayerwiseError(
            f"wiring of {stack.name!r}",
            allowed="an architecture whose configuration sets its depth",
            found=f"no field of {type(config).__name__} changes the length of {stack.container}",
            fix="keep the depth of this stack",
        )
    edited = copy.deepcopy(config)
    for number, name in fields:
        _stretch(_configs(edited)[number], name, len(stack.layers), order)
    return edited
