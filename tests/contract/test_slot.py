"""Every slot: its shape, its gradients, and the function that the paper writes down."""

from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from layerwise.core.errors import LayerwiseError
from layerwise.core.method import Method, find, methods
from layerwise.slot.mixture import FeedForward, MixtureSlot, merged

CONFIG = LlamaConfig(hidden_size=8, intermediate_size=12, num_attention_heads=2)
every_slot = pytest.mark.parametrize("method", methods("slot"), ids=lambda m: m.name)


def made(name: str, **options: Any) -> MixtureSlot:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        slot = find(name, "slot").bind(options)(CONFIG)
        for p in slot.parameters():  # nothing stays at zero
            p.data += 0.3 * torch.randn(p.shape)
    return slot


def rows(count: int = 10) -> torch.Tensor:
    return torch.randn(count, 8, generator=torch.Generator().manual_seed(1))


@every_slot
@pytest.mark.parametrize("active", [1, 2, 4])
def test_shapes_and_gradients(method: Method, active: int) -> None:
    slot = made(method.name, active=active)
    y = slot(rows().reshape(2, 5, 8))
    assert y.shape == (2, 5, 8)
    (y.square().sum() + slot.balance).backward()
    assert all(p.grad is not None for p in slot.parameters() if active == 4)
    assert slot.router.weight.grad is not None
    assert slot.router.weight.grad.abs().sum() > 0
    assert torch.equal(slot(rows()), slot(rows().reshape(2, 5, 8)).reshape(10, 8))


@every_slot
def test_too_many_active(method: Method) -> None:
    with pytest.raises(LayerwiseError, match="1 to 4 experts"):
        made(method.name, active=5)


def test_experts_by_definition() -> None:
    slot = made("widenet", active=2)
    for x, got in zip(rows(), slot(rows()), strict=True):
        p = (slot.router.weight @ x).softmax(0)
        best = p.argsort(descending=True)[:2].tolist()
        torch.testing.assert_close(got, sum(4 * p[e] * slot.experts[e](x) for e in best))


def by_hand(slot: Any, x: torch.Tensor, weights: dict[int, Any]) -> torch.Tensor:
    """The shared part with a weighted sum of products in every matrix."""
    shared, w = slot.experts[0].shared, {}
    for name in ("gate", "up", "down"):
        products = (
            v * slot.experts[e].b[name] @ slot.experts[e].a[name] for e, v in weights.items()
        )
        w[name] = getattr(shared, name).weight + sum(products)
    return w["down"] @ (torch.nn.functional.silu(w["gate"] @ x) * (w["up"] @ x))


@pytest.mark.parametrize("mix", ["outputs", "weights"])
def test_low_rank_experts_by_definition(mix: str) -> None:
    slot = made("mixture_of_loras", rank=3, mix=mix)
    for x, got in zip(rows(), slot(rows()), strict=True):
        p = (slot.router.weight @ x).softmax(0)
        best = p.argsort(descending=True)[:2].tolist()
        if mix == "weights":
            wanted = by_hand(slot, x, {e: 2 * p[e] for e in best})
        else:
            wanted = sum(2 * p[e] * by_hand(slot, x, {e: 1.0}) for e in best)
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_merged_is_the_mean_of_the_products_not_of_the_factors() -> None:
    slot = made("mixture_of_loras", rank=3)
    whole = merged(slot, 8)  # no matrix has a higher rank
    wanted = by_hand(slot, rows()[0], dict.fromkeys(range(4), 0.25))
    torch.testing.assert_close(whole(rows()[0]), wanted, rtol=1e-4, atol=1e-5)
    mean: Any = sum(e.b["up"] @ e.a["up"] for e in slot.experts) / 4  # type: ignore[index,union-attr]
    left = (merged(slot, 3).up.weight - whole.up.weight).norm()
    torch.testing.assert_close(left, torch.linalg.svdvals(mean)[3:].norm())


@pytest.mark.parametrize("mix", ["outputs", "weights"])
def test_one_expert_merged_is_itself(mix: str) -> None:
    slot = made("mixture_of_loras", count=1, active=1, rank=3, mix=mix)
    found = merged(slot, 3)
    assert isinstance(found, FeedForward)
    torch.testing.assert_close(found(rows()), slot(rows()), rtol=1e-4, atol=1e-5)


def test_worked_example_of_both_mixtures() -> None:
    """`h = 1`, both matrices 1, `-3` and `+1` added to the first, half each, relu: 1 and 0."""
    outputs = 0.5 * max(0, 1 - 3) + 0.5 * max(0, 1 + 1)
    weights = max(0, 1 + 0.5 * -3 + 0.5 * 1)
    assert (outputs, weights) == (1.0, 0)


def test_balance_is_one_where_all_are_chosen_alike() -> None:
    slot = made("widenet", count=2, active=1)
    slot.router.weight.data = torch.eye(8)[:2] * 9
    slot(torch.eye(8)[:2])
    assert slot.balance.item() == pytest.approx(1.0)
    slot(torch.eye(8)[[0, 0]])
    assert slot.balance.item() == pytest.approx(2.0, abs=1e-3)
