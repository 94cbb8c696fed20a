"""Execution orders run as a slow, obvious reference does, on unlike kinds of networks."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import layerwise
from layerwise.core.errors import LayerwiseError
from layerwise.core.instead import instead, swapped
from layerwise.core.network import Network
from layerwise.core.stack import Layer, Visit
from layerwise.core.stops import hidden
from layerwise.core.task import answer
from layerwise.core.visits import entries_of, parse_wiring, read_wiring
from layerwise.intervene import At, ablate
from layerwise.jobs.measure import agrees_cached
from layerwise.jobs.stock import streamed

BATCH = {"input_ids": torch.arange(3, 27).reshape(2, 12)}
KINDS = ("llama", "mixtral", "gpt2", "opt", "falcon", "neox")


def walked(network: Network, visits: Sequence[Visit]) -> Tensor:
    """The unedited network's own layers, called one after the other by hand, without a cache."""
    calls: dict[str, tuple[tuple, dict]] = {}
    name = network.stack.name

    def note(layer: Layer) -> Callable[..., Any]:
        own = layer.module.forward

        def run(*args: Any, **kwargs: Any) -> Any:
            calls[layer.key] = args, kwargs
            return own(*args, **kwargs)

        return run

    with instead(network.layers(), note):
        network.run(BATCH)

    def step(visit: Visit, x: Tensor) -> Tensor:
        layer = network.stack.layers[visit.layer]
        args, kwargs = calls[layer.key]
        gone = [p.name for p in layer.parts if visit.parts is not None and p.name not in visit.parts]
        with torch.no_grad(), network.edited([ablate(At(layer.index, part)) for part in gone]):
            return hidden(layer.module(*swapped(args, hidden((args, kwargs)), x), **kwargs))

    x = hidden(calls[f"{name}/0"])
    done: set[int] = set()
    for visit in visits:
        if visit.parallel is None:
            x = step(visit, x)
        elif visit.parallel not in done:
            done.add(visit.parallel)
            members = [v for v in visits if v.parallel == visit.parallel]
            x = x + sum(step(v, x) - x for v in members)

    def end(layer: Layer) -> Callable[..., Any]:
        own = layer.module.forward

        def run(*args: Any, **kwargs: Any) -> Any:
            output = own(*args, **kwargs)
            return swapped(output, hidden(output), x)

        return run

    with instead([network.stack.layers[-1]], end):
        return network.run(BATCH).logits


ORDERS = {
    "dropped": [0, 2],
    "doubled": [0, 1, 1, 2],
    "looped": [0, 1, 2, 1, 2],
    "without attention": [0, {"layer": 1, "parts": ["mlp"]}, 2],
    "without the first attention": [{"layer": 0, "parts": ["mlp"]}, 1, 2],
    "without mlp": [0, {"layer": 1, "parts": ["attention"]}, {"layer": 2, "parts": ["attention"]}],
    "in parallel": [0, {"parallel": [1, 2]}],
    "all of it": [0, 0, {"parallel": [1, {"layer": 2, "parts": ["mlp"]}]}, 2],
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ORDERS)
def test_an_order_runs_like_the_reference(tiny, kind: str, name: str) -> None:
    order = {"decoder": ORDERS[name]}
    plain, edited = layerwise.open(tiny(kind)), layerwise.open(tiny(kind), wiring=order)
    with streamed(edited, [BATCH]) as answers:
        in_lockstep = answers(BATCH)
    resident = edited.load()
    got = resident.run(BATCH).logits
    depth = len(plain.stack.layers)
    wanted = walked(plain.load(), parse_wiring(ORDERS[name], depth, ""))
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    assert torch.equal(in_lockstep, answer(resident.run(BATCH), BATCH))
    same, total = agrees_cached(resident.module, BATCH["input_ids"], 12)
    assert same == total
