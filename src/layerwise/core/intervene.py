"""Running a network with changes at some of its sites, and keeping what is there."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from layerwise.core.instead import instead
from layerwise.core.network import Network
from layerwise.core.running import Running
from layerwise.core.sites import At, Cache, Edits, Intervention, sites
from layerwise.core.task import forward_arguments


@contextmanager
def edited(network: Network, edits: Edits) -> Iterator[Running]:
    """Whatever runs the model in this block runs with the changes, `generate` as well.

    Raises:
        LayerwiseError: a site is not there, was never reached, or a value does not fit.
    """
    running = Running(network, edits)
    hook = network.module.register_forward_pre_hook(running.begin, with_kwargs=True)
    try:
        with instead(running.layers, running.forward):
            yield running
    finally:
        hook.remove()
    running.check()


def run(
    network: Network, batch: Mapping[str, Tensor], edits: Edits = (), grad: bool = False
) -> Any:
    """The network's output for a batch, with changes; with `grad` it can be differentiated."""
    inputs = {key: value.to(network.device) for key, value in batch.items()}
    with torch.set_grad_enabled(grad), edited(network, edits):
        return network.module(**forward_arguments(network.module, inputs))


def keeping(at: At, kept: dict[At, list[Tensor]], grad: bool = False) -> Intervention:
    """Keep what passes at a site, changing nothing; with `grad` as a node of the graph."""

    def keep(value: Tensor) -> Tensor:
        if not grad:
            kept.setdefault(at, []).append(value.detach().clone())
            return value
        node = value.clone() if value.requires_grad else value.detach().clone().requires_grad_()
        kept.setdefault(at, []).append(node)
        return node

    return Intervention(at, keep)


def cache(
    network: Network,
    batch: Mapping[str, Tensor],
    where: Sequence[At] = (),
    edits: Edits = (),
    grad: bool = False,
) -> Cache:
    """Run a batch and keep what is at some sites: the stream after every layer if none is given.

    Args:
        network: the opened model.
        batch: keywords of its forward.
        where: the sites.
        edits: changes of the same run; what is kept is what is there after them.
        grad: keep nodes of the graph, so that the output can be differentiated by them.
    """
    where = where or sites(network)
    kept: dict[At, list[Tensor]] = {}
    output = run(network, batch, [*edits, *(keeping(at, kept, grad) for at in where)], grad)
    values = {at: torch.cat(kept[at], 1) if kept[at][1:] else kept[at][0] for at in where}
    return Cache(values, output, (network.stack.name, len(network.stack.wiring)))
