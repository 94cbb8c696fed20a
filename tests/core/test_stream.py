"""What a layer adds to the stream, against what its modules return, on unlike kinds of layers."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import layerwise
from layerwise.core.stats import Probe, observe
from layerwise.core.stream import StreamWatch

H, A, M = (3.0, 4.0), (0.0, 5.0), (-3.0, 1.0)


class Gift(nn.Module):
    """Adds a constant, through a matrix, so that it is a part."""

    def __init__(self, gift: tuple[float, float], mixes: bool = False) -> None:
        super().__init__()
        self.mixes = mixes
        self.out = nn.Linear(2, 2)
        nn.init.zeros_(self.out.weight)
        self.out.bias = nn.Parameter(torch.tensor(gift))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x.cumsum(1) if self.mixes else x)


class Sequenced(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn, self.mlp = Gift(A, mixes=True), Gift(M)

    def forward(self, h: Tensor) -> Tensor:
        h = h + self.attn(F.layer_norm(h, (2,)))
        return self.mlp(h) + h


class Parallel(Sequenced):
    def forward(self, h: Tensor) -> Tensor:
        return self.attn(h) + self.mlp(h) + h


class InPlace(Sequenced):
    def forward(self, h: Tensor) -> Tensor:
        both = self.mlp(h)
        both += self.attn(h)
        both += h
        return both


class PostNorm(Sequenced):
    def forward(self, h: Tensor) -> Tensor:
        h = F.layer_norm(h + self.attn(h), (2,))
        return F.layer_norm(h + self.mlp(h), (2,))


class Hidden(Sequenced):
    """Nothing can be followed through a product."""

    def forward(self, h: Tensor) -> Tensor:
        return (h + self.attn(h)) * 1.5


def added(layer: nn.Module) -> dict[str, tuple[float, float, float]]:
    network = nn.Sequential(layer, Gift((0.0, 0.0)))
    opened = layerwise.open(network, inputs={"input": torch.ones(1, 3, 2)})
    found: list[Any] = []
    look = lambda state, seen: found.append(seen.added)  # noqa: E731
    probe = Probe("layer", lambda key: None, look, lambda s: 0.0, watch=("added",))
    observe(opened, [{"input": torch.tensor(H).expand(1, 3, 2).clone()}], {"p": probe})
    return {k: tuple(round(x[0, 1].item(), 4) for x in v) for k, v in found[0].items()}


@pytest.mark.parametrize("kind", [Sequenced, Parallel, InPlace, PostNorm, Hidden])
def test_what_a_part_adds_to_what(kind: Callable[[], nn.Module]) -> None:
    """(norm of the stream, norm of what is added, inner product); h 5, a 5, m sqrt 10, h + a 9.49.

    After a norm in two dimensions the stream is (-1, 1): the inner product with m is 4.
    """
    attention = (5.0, 5.0, 20.0)
    expected = {
        Sequenced: {"attention": attention, "mlp": (9.4868, 3.1623, 0.0)},
        Parallel: {"attention": attention, "mlp": (5.0, 3.1623, -5.0)},
        InPlace: {"attention": attention, "mlp": (5.0, 3.1623, -5.0)},
        PostNorm: {"attention": attention, "mlp": (1.4142, 3.1623, 4.0)},
        Hidden: {},
    }[kind]
    found = added(kind())
    assert found.keys() == expected.keys()
    for part, row in expected.items():
        assert found[part] == pytest.approx(row, abs=2e-4)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral", "opt", "falcon", "neox", "mamba"])
def test_what_modules_return_is_what_is_added(tiny, kind: str) -> None:
    """Reference: hooks on the modules that hold the last matrix of each part."""
    network = layerwise.open(tiny(kind)).load()
    batch = {"input_ids": torch.arange(3, 27).reshape(2, 12)}
    last = {layer.key: {m.part: m.parameter for m in layer.matrices} for layer in network.layers()}
    seen: dict[str, list[Any]] = {}

    def look(state: str, seen_: Any) -> str:
        seen.setdefault(state, []).append(seen_.added)
        return state

    probe = Probe("layer", lambda key: key, look, lambda s: 0.0, watch=("added",))
    observe(network, [batch], {"p": probe})
    returned: dict[tuple[str, str], Tensor] = {}
    for layer in network.layers():
        for part, parameter in last[layer.key].items():
            path = (
                parameter.partition(".")[0] if kind == "mixtral" else parameter.rpartition(".")[0]
            )

            def keep(module: nn.Module, args: Any, out: Any, at=(layer.key, part)) -> None:
                returned[at] = (out[0] if isinstance(out, tuple) else out).clone()

            layer.module.get_submodule(path).register_forward_hook(keep)
    with torch.no_grad():
        network.module(**batch, use_cache=False)
    for (key, part), tensor in returned.items():
        norm = tensor.reshape(2, 12, -1).norm(dim=-1)
        torch.testing.assert_close(seen[key][0][part].added, norm, rtol=1e-4, atol=1e-5)


def test_nothing_stays_on_the_stack_when_the_walk_is_broken_off(tiny) -> None:
    def fail(state: Any, seen: Any) -> Any:
        raise ValueError("stop here")

    network = layerwise.open(tiny("llama")).load()
    probe = Probe("layer", lambda key: 0, fail, lambda s: s, watch=("added",))
    with pytest.raises(ValueError, match="stop here"):
        observe(network, [{"input_ids": torch.arange(8)[None]}], {"p": probe})
    assert torch.overrides._get_current_function_mode() is None
    assert not any(
        isinstance(m, StreamWatch) for m in torch.overrides._get_current_function_mode_stack()
    )
