"""A few rows at once: linear modules by another product, shared keys in place."""

import os
import time
from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

import layerwise
from layerwise.jobs.decoding import Session
from layerwise.jobs.generate import generate
from layerwise.jobs.speculate import Draft
from layerwise.run import few_rows, rows

ALL = frozenset(range(2, 9))


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The product is always the faster one; the rows that it was asked for."""
    asked, own = [], rows.product_of_few

    def product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        asked.append(x.shape[:-1].numel())
        return own(x, weight)

    monkeypatch.setattr(rows, "product_of_few", product)
    monkeypatch.setattr(rows, "faster_rows", lambda m: {rows.kind_of(x): ALL for x in m})
    yield asked


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_the_same_product(always: list[int], bias: bool, dtype: torch.dtype) -> None:
    module = nn.Linear(24, 16, bias=bias).to(dtype)
    for shape in [(1, 1), (2,), (1, 4), (2, 3), (1, 8), (3, 3)]:
        x = torch.randn(*shape, 24).to(dtype)
        with torch.no_grad():
            wanted = module(x)
            with few_rows(module) as count:
                found = module(x)
        assert count == 1
        assert found.shape == wanted.shape and found.is_contiguous()
        rough = dtype == torch.bfloat16
        torch.testing.assert_close(
            found, wanted, rtol=0.02 if rough else 1e-5, atol=0.01 if rough else 1e-5
        )
    assert always == [2, 4, 6, 8], "one row and more than eight are left alone"


class Seen(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.functions: list[object] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.functions.append(func)
        return func(*args, **kwargs or {})


def test_gradients_and_what_is_watched_take_the_stock_path(always: list[int]) -> None:
    module, x = nn.Linear(4, 3), torch.randn(2, 4)
    with few_rows(module), few_rows(module) as again:
        assert again == 0, "a block inside of another finds nothing to do"
        module(x).sum().backward()
        with torch.no_grad(), Seen() as seen:
            module(x)
        assert F.linear in seen.functions and not always
    assert "forward" not in vars(module) and module.weight.grad is not None


@pytest.mark.parametrize("slow", ["few", "stock"])
def test_it_is_used_where_it_is_faster(monkeypatch: pytest.MonkeyPatch, slow: str) -> None:
    def late(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        time.sleep(0.002)
        return x @ weight.T

    place = (rows, "product_of_few") if slow == "few" else (rows.F, "linear")
    modules = [nn.Linear(8, 8), nn.Linear(8, 4), nn.Linear(8, 8)]
    with monkeypatch.context() as patch:
        patch.setattr(*place, late)
        found = rows.faster_rows(modules)
    wanted = frozenset() if slow == "few" else ALL
    assert found == {rows.kind_of(module): wanted for module in modules[:2]}


def test_weights_that_are_timed_hold_enough_and_every_kind(monkeypatch) -> None:
    modules = [nn.Linear(8, 8) for _ in range(5)] + [nn.Linear(8, 4)]
    monkeypatch.setattr(rows, "BYTES", 2 * modules[0].weight.nbytes)
    assert rows._some(modules) == [*modules[:2], modules[-1]]


@pytest.mark.parametrize("kind", ["llama", "opt", "gpt2"])
def test_a_draft_changes_no_token(tiny, always: list[int], kind: str) -> None:
    network, prompt = layerwise.open(tiny(kind)).load(), torch.arange(3, 15)[None]
    plain = generate(network, prompt, max_tokens=20).tokens
    with few_rows(network.module) as count:
        found = generate(network, prompt, max_tokens=20, speculate=Draft((2,), 3))
    assert found.tokens == plain
    assert bool(count) == bool(always)
    assert not any("forward" in vars(m) for m in network.module.modules())


class Heads(TorchFunctionMode):
    """Heads of keys that attention is given for several queries and a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.keys: set[int] = set()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and kwargs.get("attn_mask") is not None:
            self.keys.add(args[1].shape[1])
        return func(*args, **kwargs)


def test_a_verification_does_not_repeat_the_keys_that_heads_share(
    tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(rows.IN_PLACE, "0")
    network = layerwise.open(tiny("llama")).load()
    config = network.model.config
    shared, heads = config.num_key_value_heads, config.num_attention_heads
    assert shared < heads
    session, logits = Session(network, (2,)), []
    for block, keys in ((nullcontext(), heads), (few_rows(network.module), shared)):
        with torch.inference_mode(), block, Heads() as seen:
            session.start([3, 4, 5])
            logits.append(session.feed([6, 7, 8]))
        assert seen.keys == {keys}
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-5)
    assert os.environ[rows.IN_PLACE] == "0", "as it was before"
    monkeypatch.delenv(rows.IN_PLACE)
    with few_rows(nn.Linear(2, 2)):
        assert os.environ[rows.IN_PLACE] == "1"
    assert rows.IN_PLACE not in os.environ
