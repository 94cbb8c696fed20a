"""Interventions on layers whose every number is known, with additions of every form."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import layerwise
from layerwise.intervene import At, ablate, add, scale


class Planted(nn.Module):
    """A position-wise layer that writes feature 0 from feature 1, and feature 2 from feature 3."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Linear(4, 4, bias=False)
        self.mlp.weight = nn.Parameter(torch.zeros(4, 4))
        self.mlp.weight.data[0, 1] = self.mlp.weight.data[2, 3] = 1.0

    def forward(self, h: Tensor) -> Tensor:
        return h + self.mlp(h)


def test_ablating_a_planted_feature_changes_exactly_that() -> None:
    module = nn.Sequential(Planted(), Planted())
    x = torch.arange(1.0, 25.0).reshape(2, 3, 4)
    network = layerwise.open(module, inputs={"input": x})
    before = network.run({"input": x})
    site = At(1, "mlp", positions=2)
    got = network.run({"input": x}, [ablate(site, torch.tensor([2.0, 0, 0, 0]))])
    wanted = before.clone()
    wanted[:, 2, 0] -= x[:, 2, 1]
    assert torch.equal(got, wanted)
    both = [scale(At(0), 2), add(At(0, positions=(0, -1)), torch.ones(4), 0.5)]
    cached = network.cache({"input": x}, [At(0), At(0, positions=1)], both)
    plain = network.cache({"input": x})[At(0)]
    assert torch.equal(cached[At(0)][:, 1], 2 * plain[:, 1])
    assert torch.equal(cached[At(0, positions=(2, 0))], 2 * plain[:, [2, 0]] + 0.5)


class Mixing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(4, 4)

    def forward(self, h: Tensor) -> Tensor:
        return self.out(h.cumsum(1))


class Sequenced(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn, self.mlp = Mixing(), nn.Linear(4, 4)

    def forward(self, h: Tensor) -> Tensor:
        h = h + self.attn(h)
        return self.mlp(h) + h


class InPlace(Sequenced):
    def forward(self, h: Tensor) -> Tensor:
        both = self.mlp(h)
        both += self.attn(h)
        both += h
        return both


class Overwritten(Sequenced):
    def forward(self, h: Tensor) -> Tensor:
        h = h.clone()
        h += self.attn(h)
        made = self.mlp(h)
        made.add_(h)
        return made


@pytest.mark.parametrize("kind", [Sequenced, InPlace, Overwritten])
@pytest.mark.parametrize("child", ["attn", "mlp"])
def test_additions_of_every_form(kind: Callable[[], Any], child: str) -> None:
    """Reference: the matrix of the part set to zero."""
    torch.manual_seed(0)
    module = nn.Sequential(kind(), kind())
    x = torch.sin(torch.arange(24.0)).reshape(2, 3, 4)
    network = layerwise.open(module, inputs={"input": x})
    layer = network.stack.layers[1]
    part = next(p.name for p in layer.parts if child in p.modules)
    before = network.run({"input": x})
    got = network.run({"input": x}, [ablate(At(1, part))])
    assert torch.equal(network.run({"input": x}), before)
    for parameter in layer.module.get_submodule(child).parameters():
        parameter.data.zero_()
    torch.testing.assert_close(got, network.run({"input": x}))
    assert not torch.allclose(got, before)
