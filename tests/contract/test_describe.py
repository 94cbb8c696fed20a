"""Every description: finite figures per layer, whatever the batches, the padding and the order."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import layerwise
from layerwise.core.method import Method, find, methods
from layerwise.core.network import Network
from layerwise.core.stats import Figures, Stats, observe
from layerwise.jobs.rerun import Rerun
from layerwise.jobs.tail import Tail

LENGTHS = [9, 14, 12, 14, 11, 13]
VIEWS = 2
every_description = pytest.mark.parametrize("method", methods("describe"), ids=lambda m: m.name)


@pytest.fixture(scope="module")
def network(tiny) -> Network:
    return layerwise.open(tiny("llama")).load()


def batches(split: list[int]) -> list[dict[str, Tensor]]:
    ids = torch.randint(3, 128, (6, 14), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(14) < torch.tensor(LENGTHS)[:, None]).long()
    parts = zip(ids.split(split), mask.split(split), strict=True)
    return [{"input_ids": i * m, "attention_mask": m} for i, m in parts]


def measured(network: Network, split: list[int]) -> Stats:
    needed = {name for method in methods("describe") for name in method.needs}
    return observe(network, batches(split), {name: find(name).function() for name in needed})


@pytest.fixture(scope="module")
def stats(network: Network) -> Stats:
    return measured(network, [6])


def given(network: Network) -> dict[str, Callable | Any]:
    """Stand-ins for what the engine gives."""

    def fetch(key: str) -> dict[str, Tensor]:
        layer = next(la for la in network.layers() if la.key == key)
        parameters = dict(layer.module.named_parameters())
        return {m.key: m.view(parameters[m.parameter]) for m in layer.matrices}

    def reference(key: str) -> dict[str, Tensor]:
        return {name: w + (int(key[-1]) + 1) * w.flip(0) for name, w in fetch(key).items()}

    tail = Tail(network, batches([6])[0])
    labels = torch.tensor([0, 1, 1, 0, 1, 0])
    texts = [
        {"input_ids": b["input_ids"], "labels": b["input_ids"].roll(-1, 1)}
        for b in batches([1] * 6)
    ]
    rerun = Rerun(network, texts[:3])
    engine = {
        "rerun": rerun,
        "fetch": fetch,
        "reference": reference,
        "tail": tail,
        "labels": labels,
    }
    return {**engine, "views": VIEWS, "prompt": 5}


def describe(method: Method, network: Network, stats: Stats, **options: Any) -> Figures:
    return method.bind(options, **given(network))(network.stack, stats)


def numbers(figures: Figures) -> Tensor:
    return torch.tensor([v for row in figures.values.values() for v in row.values()]).double()


@every_description
def test_finite_figures_of_every_layer(method: Method, network: Network, stats: Stats) -> None:
    found = describe(method, network, stats)
    keys = [layer.key for layer in network.stack.layers]
    assert [k for k in found.values if k.count("/") == 1] in (keys, [])
    assert len(found.values) >= len(keys)
    assert len(numbers(found)) > 0
    assert numbers(found).isfinite().all()
    assert numbers(found).unique().numel() > 1
    assert all(table.isfinite().all() for table in found.maps.values())
    assert found.note


@every_description
def test_no_cut_into_batches_matters(method: Method, network: Network, stats: Stats) -> None:
    if method.needs:
        again = describe(method, network, measured(network, [1, 3, 2]))
        before = numbers(describe(method, network, stats))
        torch.testing.assert_close(numbers(again), before, rtol=2e-3, atol=2e-4)
