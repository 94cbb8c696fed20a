"""What inspecting costs: forwards and layer calls are counted, and states that stay alive."""

import gc
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves

import layerwise
from layerwise.core.lockstep import walk
from layerwise.core.method import find
from layerwise.core.network import Network
from layerwise.core.stats import Gathering
from layerwise.jobs.inspect import inspect_model
from layerwise.jobs.wanted import MEASURES, Wanted, chosen, kind_of

BATCHES = [
    {"input_ids": torch.randint(3, 128, (2, 24), generator=torch.Generator().manual_seed(i))}
    for i in range(2)
]


class Calls:
    """How often the network and its layers ran, on real batches and on the lens's short ones."""

    def __init__(self, network: Network) -> None:
        self.forwards = 0
        self.layers: list[int] = []
        network.module.register_forward_pre_hook(self._forward)
        for layer in network.layers():
            layer.module.register_forward_pre_hook(self._layer)

    def _forward(self, module: Any, args: Any) -> None:
        self.forwards += 1

    def _layer(self, module: Any, args: Any) -> None:
        self.layers.append(args[0].shape[1])


def test_one_pass_over_the_data(tiny) -> None:
    network = layerwise.open(tiny("llama")).load()
    calls = Calls(network)
    everything = Wanted((*MEASURES, "direct_match", "voids", "document_geometry", "head_patterns"))
    inspect_model(network, BATCHES, everything)
    real = [n for n in calls.layers if n == 24]
    assert len(real) == len(BATCHES) * len(network.layers())
    # the one short forward that shows what layers return, and the end alone on pieces of the sample
    assert sum(n == 8 for n in calls.layers) == len(network.layers())
    before = calls.forwards
    inspect_model(network, BATCHES, Wanted(("depth_use", "spread", "similarity", "spectrum")))
    assert calls.forwards - before == len(BATCHES)


def free_of_cost(network: Network) -> tuple[str, ...]:
    """Everything in `all` that announces no cost of its own and reads the plain text."""
    ready, _ = chosen(Wanted(("all",)), network, against=False)
    return tuple(m.name for m in ready if m.cost is None and kind_of(m) == "text")


def test_everything_without_a_cost_of_its_own_is_one_pass(tiny) -> None:
    network = layerwise.open(tiny("llama")).load()
    calls, said = Calls(network), []
    names = free_of_cost(network)
    assert {"lens", "canonical", "update_fit", "head_patterns", "position_parts"} <= set(names)
    inspect_model(network, BATCHES, Wanted(names), say=said.append)
    layers = len(network.layers())
    assert sum(n == 24 for n in calls.layers) == len(BATCHES) * layers
    assert sum(n == 8 for n in calls.layers) == layers
    assert said == []


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_no_state_of_a_layer_outlives_it(tiny, kind: str) -> None:
    """Of all states of the batches, as many are alive after the last layer as after the second."""
    network = layerwise.open(tiny(kind)).load()
    alive: list[int] = []

    def count(task: str, done: int, total: int) -> None:
        gc.collect()
        found = [o for o in gc.get_objects() if type(o) is torch.Tensor]
        alive.append(sum(t.shape[:2] == (2, 24) and t.ndim == 3 for t in found))

    names = tuple(n for n in free_of_cost(network) if find(n).family == "measure")
    inspect_model(network, BATCHES, Wanted((*names, "stream_moments")), progress=count)
    assert len(alive) == len(network.layers())
    assert 0 < max(alive[2:]) <= alive[1]


def test_what_is_kept_of_a_layer_does_not_grow_with_the_text(tiny) -> None:
    """Once the sample is full; sums and samples do, one vector per document does not."""
    network = layerwise.open(tiny("llama")).load()
    options = {"token_sample": {"tokens": 16}, "head_patterns": {"documents": 2}}
    kept = ("token_sample", "stream_moments", "head_patterns", "depth_use", "residual_cosine")
    probes = {n: find(n, "measure").bind(options.get(n, {}))() for n in kept}
    sizes = []
    for times in (1, 3):
        batches = BATCHES * times
        gathering = Gathering(probes, batches)
        with gathering:
            for stop in walk(network, batches):
                gathering.look(stop)
        leaves = tree_leaves(gathering.states)
        sizes.append(sum(x.nbytes for x in leaves if isinstance(x, torch.Tensor)))
    assert sizes[0] == sizes[1] > 0
