"""Sweeps of patching: known answers, and a slow reference with one forward per site."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import layerwise
from layerwise.core.errors import LayerwiseError
from layerwise.core.network import Network
from layerwise.intervene import (
    At,
    activation_patching,
    attribution_patching,
    back_patching,
    patch,
    sites,
)

IDS = torch.arange(3, 19).reshape(2, 8)
CLEAN = {"input_ids": IDS}
CORRUPTED = {"input_ids": IDS.index_fill(1, torch.tensor([2]), 60)}


def metric(output: Any) -> Tensor:
    return output.logits[:, -1, 5] - output.logits[:, -1, 9]


def load(tiny: Callable[..., Path], kind: str) -> Network:
    return layerwise.open(tiny(kind)).load()


@pytest.mark.parametrize("kind", ["llama", "gpt2", "falcon", "mixtral", "mamba"])
def test_all_positions_of_a_boundary_are_the_whole_answer(tiny, kind: str) -> None:
    network = load(tiny, kind)
    where = sites(network, "in", "out")
    score = activation_patching(network, CLEAN, CORRUPTED, metric, where, rows=6)
    assert score.tolist() == [1.0] * len(where)


def test_patching_is_one_forward_per_site_in_few(tiny) -> None:
    network = load(tiny, "llama")
    where = [
        *sites(network, "in", "mlp", positions=(1, 2, 7)),
        *sites(network, "attention", heads=range(4)),
    ]
    score = activation_patching(network, CLEAN, CORRUPTED, metric, where, rows=10)
    kept = network.cache(CLEAN, where)
    low, high = metric(network.run(CORRUPTED)).mean(), metric(kept.output).mean()
    for at, found in zip(where, score.tolist(), strict=True):
        value = metric(network.run(CORRUPTED, [patch(at, kept)])).mean()
        assert found == pytest.approx(((value - low) / (high - low)).item(), abs=1e-4), at.label
    before = [at.positions == 1 for at in where]
    assert all(s == 0 for s, b in zip(score.tolist(), before, strict=True) if b)


def test_few_forwards(tiny) -> None:
    network, calls = load(tiny, "llama"), itertools.count()
    network.module.register_forward_pre_hook(lambda *_: (next(calls), None)[1])
    where = sites(network, "in", positions=range(8))
    activation_patching(network, CLEAN, CORRUPTED, metric, where, rows=32)
    assert next(calls) == 2 + len(where) * 2 // 32


def test_back_patching(tiny) -> None:
    network = load(tiny, "llama")
    found = back_patching(network, CLEAN, metric, positions=-1, rows=8)
    wide = {"input_ids": IDS.repeat(4, 1)}
    plain = metric(network.run(wide)).double().reshape(4, 2)
    assert found.shape == (4, 4, 2)
    for i in range(4):
        assert found[i, i].tolist() in plain.tolist()
    assert found.isnan().any(2).equal(~torch.ones(4, 4, dtype=torch.bool).tril())
    cached = network.cache(CLEAN)
    edits = [patch(At(1, positions=-1), cached, At(3, positions=-1))]
    torch.testing.assert_close(found[3, 1].float(), metric(network.run(CLEAN, edits)))
    assert not torch.equal(found[3, 1], found[3, 3])


class Linear(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        self.mlp = nn.Linear(4, 4, bias=False, dtype=torch.float64)
        nn.init.normal_(self.mlp.weight, generator=torch.Generator().manual_seed(seed))

    def forward(self, h: Tensor) -> Tensor:
        return h + self.mlp(h.flip(1))


def test_attribution_is_patching_for_a_linear_model() -> None:
    module = nn.Sequential(*[Linear(seed) for seed in range(3)])
    x = torch.sin(torch.arange(24.0, dtype=torch.float64)).reshape(2, 3, 4)
    network = layerwise.open(module, inputs={"input": x})
    clean, corrupted = {"input": x}, {"input": x.flip(2)}
    where = [*sites(network, "in", "mlp", positions=(None, 0, -1)), *sites(network, "mlp.up")]
    both = [
        sweep(network, clean, corrupted, lambda y: y[:, -1, 0], where)
        for sweep in (activation_patching, attribution_patching)
    ]
    torch.testing.assert_close(*both)
    assert both[0].unique().numel() > len(where) // 2


@pytest.mark.parametrize(
    ("other", "found"),
    [({"input_ids": IDS[:, 1:]}, "same shape"), (CLEAN, "same value for both")],
)
def test_one_clear_error(tiny, other: Any, found: str) -> None:
    network = load(tiny, "gpt2")
    for sweep in (activation_patching, attribution_patching):
        with pytest.raises(LayerwiseError, match=found):
            sweep(network, CLEAN, other, metric, sites(network, "in"))
