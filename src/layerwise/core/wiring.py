"""A new execution order as an ordinary configuration: depth, and lists with one entry a layer."""

import copy
import pickle
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from transformers import PretrainedConfig, PreTrainedModel

from layerwise.core.errors import LayerwiseError
from layerwise.core.hollow import build_meta
from layerwise.core.stack import Stack, Wiring

Tree = dict[str, Any]

#: what configurations of backbones derive from their depth
_DERIVED = ("stage_names", "out_features", "out_indices")


class DepthField(NamedTuple):
    """Where a configuration says how deep a stack is: in a number, or one of a list of stages.

    `config` counts the nested configurations; without a name the per-layer lists say it alone,
    without `lists` those of that length belong to another stack.
    """

    config: int
    name: str
    stage: int | None = None
    lists: bool = True


def configs_in(tree: Tree, path: str = "") -> list[tuple[str, Tree]]:
    """The values of a configuration and of those nested in it, with the path to each.

    Example:
        >>> [path for path, _ in configs_in({"text": {"model_type": "llama"}})]
        ['', 'text.']
    """
    nested = [(n, v) for n, v in tree.items() if isinstance(v, dict) and "model_type" in v]
    inner = (found for name, value in nested for found in configs_in(value, f"{path}{name}."))
    return [(path, tree), *inner]


def _configs(tree: Tree) -> list[Tree]:
    return [part for _, part in configs_in(tree)]


def depth_fields(
    kind: type[PreTrainedModel], config: PretrainedConfig, stack: Stack
) -> list[DepthField]:
    """The fields that set the stack's length.

    A field counts when it equals the depth and the stack on the meta device is one layer longer
    after it was raised by one, together with what has one entry a layer.
    """
    return _depth_fields(kind, pickle.dumps(config), stack.container, len(stack.layers))


@lru_cache(64)
def _depth_fields(
    kind: type[PreTrainedModel], pickled: bytes, container: str, depth: int
) -> list[DepthField]:
    config = pickle.loads(pickled)
    gives = partial(_gives, kind, config, container, depth)
    found = []
    for number, part in enumerate(_configs(config.to_dict())):
        alone = DepthField(number, "")
        if _per_layer(part, depth) and gives([alone]):
            return [alone]
        for name, value in part.items():
            if type(value) is int and value == depth:
                forms = (DepthField(number, name), DepthField(number, name, lists=False))
                found += [f for f in forms if gives([f])][:1]
            elif isinstance(value, list | tuple):
                stages = [DepthField(number, name, i) for i, v in enumerate(value) if v == depth]
                found += [f for f in stages if gives([f])]
    return found


def _gives(
    kind: type[PreTrainedModel],
    config: PretrainedConfig,
    container: str,
    depth: int,
    fields: list[DepthField],
) -> bool:
    """Whether these fields, raised by one, give one layer more."""
    try:
        trial = _edited(config, fields, depth, [*range(depth), depth - 1])
        layers = build_meta(kind, trial, torch.float32).get_submodule(container).children()
        return len(list(layers)) == depth + 1
    except Exception:  # a trial value that the architecture refuses is simply not the depth
        return False


def _edited(
    config: PretrainedConfig,
    fields: list[DepthField],
    depth: int,
    order: list[int],
    renumber: bool = False,
) -> PretrainedConfig:
    """The configuration with its depth set and everything per layer in the new order.

    With `renumber` lists of layer numbers name the same layers as before.
    """
    tree = copy.deepcopy(config.to_dict())
    parts = _configs(tree)
    for field in fields:
        part = parts[field.config]
        if field.stage is None:
            for name in _per_layer(part, depth) if field.lists else ():
                part[name] = _reordered(part[name], order)
            part |= {field.name: len(order)} if field.name else {}
            for name in _numbering(part, depth) if renumber else ():
                part[name] = [new for new, old in enumerate(order) if old in part[name]]
        else:
            stages = list(part[field.name])
            stages[field.stage] = len(order)
            part[field.name] = stages
        for name in _DERIVED if "stage_names" in part else ():
            part.pop(name, None)
    return type(config).from_dict(tree)


def _per_layer(part: Tree, depth: int) -> list[str]:
    """Names of the values with one entry a layer: lists, and what is kept under layer numbers."""
    return [
        name
        for name, value in part.items()
        if (isinstance(value, list) and len(value) == depth and not _are_indices(value, depth))
        or (isinstance(value, dict) and value and _is_by_layer(value, depth))
    ]


def _numbering(part: Tree, depth: int) -> list[str]:
    """Names of the lists that may name layers."""
    return [
        name
        for name, value in part.items()
        if isinstance(value, list)
        and value
        and all(type(v) is int for v in value)
        and value == sorted(set(value))
        and all(_is_layer(v, depth) for v in value)
    ]


def _is_by_layer(value: dict[Any, Any], depth: int) -> bool:
    """Whether a dictionary holds settings under layer numbers."""
    return all(_is_layer(k, depth) and isinstance(v, dict) for k, v in value.items())


def _is_layer(key: object, depth: int) -> bool:
    return str(key).isdecimal() and int(str(key)) < depth


def _reordered(value: Any, order: list[int]) -> Any:
    if isinstance(value, list):
        return [value[i] for i in order]
    own = {int(key): entry for key, entry in value.items()}
    return {new: own[old] for new, old in enumerate(order) if old in own}


def _are_indices(values: list[Any], depth: int) -> bool:
    """Whether a list names layers instead of describing each of them."""
    whole = all(isinstance(v, int) and not isinstance(v, bool) for v in values)
    return whole and len(values) > 2 and values == sorted(set(values)) and values[-1] < depth


def edited_config(
    kind: type[PreTrainedModel],
    config: PretrainedConfig,
    stack: Stack,
    wiring: Wiring,
    renumber: bool = False,
) -> PretrainedConfig:
    """The configuration under which the stock class builds the stack in its new order.

    Raises:
        LayerwiseError: no field of the configuration sets the stack's depth, or its own
            validation refuses the new order.
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
    try:
        made = _edited(config, fields, len(stack.layers), order, renumber)
        return _with_room(kind, made, len(order))
    except Exception as error:  # whatever the configuration's own validation raises
        raise LayerwiseError(
            f"wiring of {stack.name!r}",
            allowed=f"what {type(config).__name__} accepts",
            found=str(error).strip().splitlines()[-1].strip(),
            fix="leave out other layers",
        ) from None


def _with_room(
    kind: type[PreTrainedModel], config: PretrainedConfig, depth: int
) -> PretrainedConfig:
    """The same, its caches with a place for every layer: stock code may count those of another
    stack, which this class does not build."""
    wide = copy.deepcopy(config)
    text: Any = wide.get_text_config(decoder=True)
    held = text if any(text is part for part in vars(wide).values()) else wide
    name = held.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    count = vars(held).get(name)
    if type(count) is not int or count >= depth:
        return config
    try:
        held.num_hidden_layers = depth
    except NotImplementedError:  # the length of two stacks
        return config
    return wide if _shapes(kind, wide) == _shapes(kind, config) else config


def _shapes(kind: type[PreTrainedModel], config: PretrainedConfig) -> dict[str, torch.Size]:
    model = build_meta(kind, copy.deepcopy(config), torch.float32)
    return {name: p.shape for name, p in model.named_parameters()}
