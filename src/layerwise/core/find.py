"""Finding the stack by following the data: no table of architectures, one hollow forward.

A stack is a chain of calls in which a tensor that one call returns is a tensor that the next one
receives. What the modules inside a layer are for is read off how they behave.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from layerwise.core.anatomy import dissect, sees_ahead
from layerwise.core.calls import Call, record_calls, tensors_in
from layerwise.core.errors import LayerwiseError
from layerwise.core.hollow import ShortCircuit
from layerwise.core.stack import Layer, Matrix, Part, Stack, plain_wiring
from layerwise.core.task import takes_images

#: what a layer is built of -> its parts and matrices, of whichever layer they were read off
Anatomies = dict[Any, tuple[tuple[Part, ...], Sequence[Matrix]]]


def find_chains(calls: list[Call]) -> list[list[Call]]:
    """Chains of calls of one container, each fed by a tensor that the last one returned."""
    chains: list[list[Call]] = []
    by_container: dict[str, list[Call]] = {}
    for call in calls:
        by_container.setdefault(call.path.rpartition(".")[0], []).append(call)
    for members in by_container.values():
        chain: list[Call] = []
        for call in members:
            feeding = {id(t) for t in tensors_in(chain[-1].output)} if chain else set()
            if chain and not feeding & {id(t) for t in tensors_in((call.args, call.kwargs))}:
                chains.append(chain)
                chain = []
            chain.append(call)
        chains.append(chain)
    return chains


def choose_stacks(chains: list[list[Call]]) -> list[list[Call]]:
    """The chains that are not inside links of a chain at least as long; the longest first."""

    def inside(chain: list[Call], other: list[Call]) -> bool:
        ends = (chain[0], chain[-1])
        return all(any(x.began < end.began and end.ended < x.ended for x in other) for end in ends)

    weighty = [c for c in chains if any(True for _ in c[0].module.parameters())]
    longest = sorted(weighty, key=lambda c: (-len(c), c[0].began))
    chosen: list[list[Call]] = []
    for chain in longest:
        if not any(inside(chain, other) or inside(other, chain) for other in chosen):
            chosen.append(chain)
    longest_length = len(chosen[0]) if chosen else 0
    return [c for c in chosen if len(c) > 1 or longest_length == 1]


def find_stacks(
    model: nn.Module, run: Callable[[], Any], known: Sequence[Stack] = ()
) -> list[Stack]:
    """Find the stacks of a hollow model by a trial forward; those of a known twin in its places.

    A stack whose layers let no position see a later one is a `decoder`, any other, and what reads
    images, an `encoder`; the second of a name is `decoder2`. They come in the order in which they
    run. Layers that are built like those of the twin are not taken apart again.

    Raises:
        LayerwiseError: no container's members feed one another.
    """
    children = {
        f"{path}.{key}" if path else key: child
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList | nn.Sequential)
        for key, child in module.named_children()
    }
    with torch.no_grad(), ShortCircuit():
        found = find_chains(record_calls(children, run))
    containers = [stack.container for stack in known]
    same = [chain for chain in found if _container(chain) in containers]
    chains = sorted(same or choose_stacks(found), key=lambda chain: chain[0].began)
    if not chains:
        raise LayerwiseError(
            type(model).__name__,
            allowed="a network with a ModuleList or Sequential whose members feed one another",
            found=f"no such chain among {len(children)} modules",
            fix="give the network's stack of layers as an nn.Sequential",
        )
    twins = (layer for stack in known for layer in stack.layers)
    anatomies: Anatomies = {_signature(la.module): (la.parts, la.matrices) for la in twins}
    names = {stack.container: stack.name for stack in known}
    told = same and len(same) == len(names)
    titles = [names[_container(chain)] for chain in chains] if told else _titles(model, chains)
    stacks: list[Stack] = []
    for title, chain in zip(titles, chains, strict=True):
        layers: dict[int, Layer] = {}
        visits = []
        for call in chain:
            if id(call.module) not in layers:
                layers[id(call.module)] = _layer(title, len(layers), call, anatomies)
            visits.append(layers[id(call.module)].index)
        wiring = plain_wiring(len(layers)) if len(layers) == len(chain) else _wiring(visits)
        stacks.append(Stack(title, _container(chain), tuple(layers.values()), wiring))
    return stacks


def _container(chain: list[Call]) -> str:
    return chain[0].path.rpartition(".")[0]


def _titles(model: nn.Module, chains: list[list[Call]]) -> list[str]:
    titles: list[str] = []
    for chain in chains:
        ahead = takes_images(model) or sees_ahead(chain[0])
        name = "encoder" if ahead else "decoder"
        count = sum(title.rstrip("0123456789") == name for title in titles)
        titles.append(f"{name}{count + 1}" if count else name)
    return titles


def _wiring(visits: list[int]) -> Any:
    from layerwise.core.stack import Visit

    return tuple(Visit(i) for i in visits)


def _signature(layer: nn.Module) -> tuple[Any, ...]:
    """What layers that are built alike have in common."""
    return type(layer), tuple((n, p.shape) for n, p in layer.named_parameters())


def _layer(stack: str, index: int, call: Call, anatomies: Anatomies) -> Layer:
    signature = _signature(call.module)
    if signature not in anatomies:
        anatomies[signature] = dissect(call)
    parts, found = anatomies[signature]
    key = f"{stack}/{index}"
    matrices = tuple(
        replace(
            m,
            layer=key,
            inputs=f"{key}/{m.inputs.removeprefix(f'{m.layer}/')}",
            fusion=f"{key}/{m.fusion.removeprefix(f'{m.layer}/')}",
        )
        for m in found
    )
    alone = isinstance(call.output, Tensor)
    return Layer(stack, index, call.path, call.module, parts, matrices, _keeps_shape(call), alone)


def _keeps_shape(call: Call) -> bool:
    """Whether a layer returns a hidden state of the shape that it received."""
    received = [t for t in tensors_in((call.args, call.kwargs)) if t.is_floating_point()]
    returned = [t for t in tensors_in(call.output) if t.is_floating_point()]
    return bool(received and returned) and received[0].shape == returned[0].shape
