"""A module in memory: its stacks, found on a hollow twin, and its layers in another order."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from layerwise.core.arrange import stacks_named
from layerwise.core.errors import LayerwiseError, refusing
from layerwise.core.find import find_stacks
from layerwise.core.hollow import hollow_parameter
from layerwise.core.network import Network
from layerwise.core.stack import Stack, Wiring
from layerwise.core.task import Task, example_inputs, forward_arguments, task_of
from layerwise.core.together import run_together
from layerwise.core.visits import parse_wiring


def open_module(
    module: nn.Module,
    inputs: Mapping[str, Tensor] | None = None,
    wiring: Mapping[str, Sequence[Any]] | None = None,
) -> Network:
    """Open a module that is already in memory, in another order as a new one that shares weights.

    Raises:
        LayerwiseError: it has no stack, or its layers cannot be put in that order.
    """
    if wiring:
        return _reordered(open_module(module, inputs), inputs, wiring)
    memo: dict[int, Any] = {id(p): hollow_parameter(p.shape, p.dtype) for p in module.parameters()}
    found, task = examine(copy.deepcopy(module, memo).eval(), inputs)
    own = dict(module.named_modules())
    stacks = tuple(
        replace(s, layers=tuple(replace(la, module=own[la.path]) for la in s.layers)) for s in found
    )
    first = next(module.parameters())
    return Network(module.eval(), stacks, first.device, first.dtype, task)


def examine(
    module: nn.Module,
    inputs: Mapping[str, Tensor] | None = None,
    known: Sequence[Stack] = (),
) -> tuple[tuple[Stack, ...], Task]:
    """The stacks and the task of a hollow model, by one trial forward."""
    given = forward_arguments(module, example_inputs(module) if inputs is None else inputs)
    outputs: list[Any] = []
    stacks = tuple(find_stacks(module, lambda: outputs.append(module(**given)), known))
    return stacks, task_of(module, outputs[0], stacks[-1].name.startswith("encoder"))


def _reordered(
    network: Network, inputs: Mapping[str, Tensor] | None, wiring: Mapping[str, Sequence[Any]]
) -> Network:
    if isinstance(network.module, PreTrainedModel):
        raise LayerwiseError(
            f"wiring of {type(network.module).__name__}",
            allowed="a folder, or a module that is not one of transformers, whose caches go by "
            "their configuration",
            found="a module in memory",
            fix="save it with `save_pretrained` and open the folder",
        )
    module = _sharing(network.module)
    orders: dict[str, Wiring] = {}
    for stack in stacks_named(network.stacks, wiring):
        where = f"wiring {stack.name}"
        order = parse_wiring(list(wiring[stack.name]), len(stack.layers), where)
        orders[stack.container] = order
        _put_in_order(module, stack, order)
    with refusing(
        f"wiring of {type(network.module).__name__}",
        allowed="an order in which every layer can read what comes to it",
        fix="keep the layers that change the shape of what they read",
    ):
        made = open_module(module, inputs)
    for stack in (stack for stack in made.stacks if stack.container in orders):
        run_together(stack.layers, orders[stack.container])
    return made


def _put_in_order(module: nn.Module, stack: Stack, order: Wiring) -> None:
    """Let the container of a stack hold a module per visit, between what it holds besides."""
    for visit in order:
        if visit.parts is not None or visit.mix is not None or visit.adapter is not None:
            raise LayerwiseError(
                f"wiring {stack.name}, layer {visit.layer}",
                allowed="numbers of layers, copies and parallel ones, for a module in memory",
                found="parts, a mix or an adapter",
                fix="save the model as a folder and open that",
            )
    container = module.get_submodule(stack.container)
    held = list(container.children())
    layers = [module.get_submodule(layer.path) for layer in stack.layers]
    first = held.index(layers[0])
    used: set[int] = set()
    new: list[nn.Module] = []
    for visit in order:
        own = layers[visit.layer]
        again = visit.layer in used
        used.add(visit.layer)
        new.append(copy.deepcopy(own) if visit.copy else _sharing(own) if again else own)
    others = [m for m in held[first:] if m not in layers]
    container._modules.clear()
    for number, member in enumerate([*held[:first], *new, *others]):
        container._modules[str(number)] = member


def _sharing(module: nn.Module) -> nn.Module:
    """A copy of a module with the same parameters and buffers."""
    return copy.deepcopy(module, {id(t): t for t in chain(module.parameters(), module.buffers())})
