"""What whole numbers of a configuration shape, seen on models without weights."""

import copy
import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from transformers import PretrainedConfig, PreTrainedModel

from layerwise.core.hollow import build_meta
from layerwise.core.width import narrowed_config
from layerwise.core.wiring import configs_in

#: a length that nothing else has
PROBE = 7


def shrunk(values: Sequence[int]) -> list[int] | None:
    """Numbers made smaller by one share, the least that whole numbers allow; none if they cannot.

    Example:
        >>> shrunk([8, 4]), shrunk([9]), shrunk([3, 2])
        ([4, 2], [6], None)
    """
    shared = math.gcd(*values)
    prime = next((p for p in range(2, shared + 1) if shared % p == 0), None)
    return None if prime is None else [v // prime * (prime - 1) for v in values]


def fields_shaping(
    config: PretrainedConfig, shapes: Mapping[str, torch.Size]
) -> Iterator[tuple[str, int]]:
    """The whole numbers of a configuration that divide the length of some axis."""
    lengths = {size for shape in shapes.values() for size in shape}
    for path, part in configs_in(config.to_dict()):
        for name, value in part.items():
            if type(value) is int and value > 1 and any(size % value == 0 for size in lengths):
                yield path + name, value


def told_by_shapes(
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
        narrowed = narrowed_config(config, dict(zip(fields, fewer, strict=True)))
        narrowed.validate()
        shapes = shapes_stored(kind, narrowed)
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
