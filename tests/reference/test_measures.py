"""Measures of the stream against slow references, and against answers that are known."""

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

import layerwise
from layerwise.core.stats import Probe, Seen, observe
from layerwise.core.stream import Attention, measured
from layerwise.core.tokens import moments_of, places, priorities
from layerwise.measure.runtime import causal_floor


def run(
    probe: Probe, before: Tensor, after: Tensor, mask: Tensor | None = None, **more: Any
) -> Any:
    return probe.finish(
        probe.update(probe.init("decoder/0"), Seen(before, after, mask, None, {}, None, **more))
    )


def find(name: str, **options: Any) -> Probe:
    return layerwise.find(name, "measure").bind(options)()


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def test_depth_use_of_one_token() -> None:
    h, a, m = (
        torch.tensor([[[3.0, 4.0]]]),
        torch.tensor([[[0.0, 5.0]]]),
        torch.tensor([[[-3.0, 1.0]]]),
    )
    added = {"attention": measured(h, a), "mlp": measured(h + a, m)}
    found = run(find("depth_use"), h, h + a + m, added=added)
    ratios = [found[f"{part}_ratio"] for part in ("attention", "mlp", "layer")]
    assert ratios == pytest.approx([1, 1 / 3, 1.3416], abs=1e-4)
    assert [found["attention_cosine"], found["mlp_cosine"]] == pytest.approx([0.8, 0], abs=1e-6)
    assert math.isnan(found["layer_ratio_rest"])


def test_depth_use_is_a_mean_of_ratios_and_can_leave_the_first_token_out() -> None:
    h = torch.tensor([[[100.0, 0], [1, 0], [1, 0]], [[100.0, 0], [2, 0], [7, 7]]])
    u = torch.tensor([[[1.0, 0], [2, 0], [0, 1]], [[1.0, 0], [1, 0], [9, 9]]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    found = run(find("depth_use"), h, h + u, mask)
    assert found["layer_ratio"] == pytest.approx((0.01 + 2 + 1 + 0.01 + 0.5) / 5)
    assert found["layer_ratio_rest"] == pytest.approx((2 + 1 + 0.5) / 3)
    assert found["layer_cosine_rest"] == pytest.approx((1 + 0 + 1) / 3)
    assert found["layer_largest"] == pytest.approx(2)


def test_a_layer_that_adds_nothing_has_no_use() -> None:
    h = random(2, 5, 4)
    found = run(find("depth_use"), h, h)
    assert found["layer_ratio"] == found["layer_cosine"] == found["layer_largest"] == 0
    assert run(find("depth_use"), h, h[:, ::2]) == {}


def test_the_sample_is_that_of_the_smallest_hashes() -> None:
    mask = torch.tensor([[1] * 9, [0, 0] + [1] * 5 + [0, 0]])
    before, after = random(2, 2, 9, 3)
    found = run(find("token_sample", tokens=6), before, after, mask)
    rows = [
        (d, p, t) for d in range(2) for p, t in enumerate(torch.nonzero(mask[d])[:, 0].tolist())
    ]
    ranks = priorities(torch.tensor([row[:2] for row in rows]))
    chosen = sorted(sorted(rows, key=lambda row: ranks[rows.index(row)])[:6])
    assert found.where.tolist() == [[d, p] for d, p, _ in chosen]
    assert torch.equal(found.after, torch.stack([after[d, t] for d, _, t in chosen]))
    assert torch.equal(found.before, torch.stack([before[d, t] for d, _, t in chosen]))


def test_a_sample_is_spread_over_documents_and_positions() -> None:
    where = places(torch.ones(64, 64, dtype=torch.bool), 0)
    chosen = where[priorities(where).topk(1024, largest=False).indices].double()
    assert (chosen.mean(0) - 31.5).abs().max() < 2.5  # four standard errors are 2.3
    assert (chosen.var(0) - 341).abs().max() < 45


def test_padding_never_wins_a_maximum() -> None:
    x = torch.tensor([[[-3.0], [-1.0], [5.0]]])
    mask = torch.tensor([[1, 1, 0]])
    pooled = {
        how: run(find("pooled_states", how=how), x, -x, mask)
        for how in ("max", "mean", "last", "first")
    }
    assert {how: s.before.item() for how, s in pooled.items()} == {
        "max": -1,
        "mean": -2,
        "last": -1,
        "first": -3,
    }
    assert pooled["max"].where.tolist() == [[0, 2]]


def test_moments_are_sums_of_shifted_rows() -> None:
    before, after = random(2, 3, 4, 2)
    even, odd = run(find("stream_moments"), before, after)
    x = torch.stack([before[0], before[2]]).reshape(-1, 2).double()
    y = torch.stack([after[0], after[2]]).reshape(-1, 2).double()
    covariance = (x - x.mean(0)).T @ (y - y.mean(0)) / 8
    torch.testing.assert_close(even.covariance(0, 1), covariance, rtol=1e-6, atol=1e-6)
    exact, _ = run(find("stream_moments"), before.double(), after.double())
    torch.testing.assert_close(exact.covariance(0, 1), covariance, rtol=1e-12, atol=1e-12)
    both = even.plus(odd)
    shifted = (before - before[0].mean(0)).reshape(-1, 2), (after - after[0].mean(0)).reshape(-1, 2)
    for mine, other in zip(both[:-1], moments_of(*shifted)[:-1], strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-6)


def entropy_of(x: Tensor) -> tuple[float, float, float]:
    """Entropy, curvature and turn of one document, one angle after the other."""
    z = torch.nn.functional.normalize(x - x.mean(0), dim=1)
    p = [v / len(z) for v in torch.linalg.eigvalsh(z @ z.T).tolist() if v > 1e-12]

    def angle(a: Tensor, b: Tensor) -> float:
        return math.degrees(math.acos(max(-1, min(1, float(a @ b / (a.norm() * b.norm()))))))

    steps = [x[i + 1] - x[i] for i in range(len(x) - 1)]
    curve = sum(angle(a, b) for a, b in pairwise(steps)) / (len(x) - 2)
    turn = sum(angle(a, b) for a, b in pairwise(z)) / (len(x) - 1)
    return -sum(v * math.log(v) for v in p), curve, turn


@pytest.mark.parametrize("width", [3, 20])
def test_document_geometry_is_a_mean_over_documents(width: int) -> None:
    x = random(3, 7, width).double()
    found = run(find("document_geometry", documents=2), x, x)
    expected = torch.tensor([entropy_of(document) for document in x[:2]]).mean(0)
    got = torch.tensor([found[k] for k in ("entropy", "curvature", "turn")])
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_orthonormal_tokens_and_the_clamp() -> None:
    eye = torch.eye(8)[None, :5].double()
    assert run(find("document_geometry"), eye, eye)["entropy"] == pytest.approx(math.log(4))
    assert run(find("document_geometry", clamp=True), eye, eye)["entropy"] == pytest.approx(
        math.log(5)
    )
    assert run(find("document_geometry", alpha=2.0), eye, eye)["entropy"] == pytest.approx(
        math.log(4)
    )


def test_a_line_is_not_curved_and_equal_tokens_have_no_entropy() -> None:
    line = torch.arange(4.0)[None, :, None] * torch.tensor([1.0, 2.0])
    found = run(find("document_geometry"), line, line)
    assert found["curvature"] == pytest.approx(0, abs=1e-3)
    assert found["turn"] == pytest.approx(60)  # 0, 180 and 0 degrees
    assert found["rank"] == pytest.approx(1)
    assert run(find("document_geometry"), torch.ones(1, 4, 2), torch.ones(1, 4, 2)) == {}


def test_position_and_context_of_a_planted_sum() -> None:
    positions, contexts = torch.zeros(12, 9), torch.zeros(5, 9)
    positions[:, :3], contexts[:, 3:] = random(12, 3), random(5, 6)
    h = 7 + positions + contexts[:, None]
    found = run(find("position_parts", skip_first=False), h, h)
    centred = positions - positions.mean(0)
    energy = 5 * centred.square().sum(), 12 * (contexts - contexts.mean(0)).square().sum()
    assert found["position_share"] == pytest.approx((energy[0] / sum(energy)).item(), rel=1e-5)
    assert found["rest_share"] == pytest.approx(0, abs=1e-6)
    assert found["incoherence"] == pytest.approx(0, abs=1e-6)
    values = torch.linalg.svdvals(centred)
    assert found["position_rank"] == pytest.approx(
        (values.square().sum() / values[0] ** 2).item(), rel=1e-5
    )


def test_shuffled_tokens_have_no_position() -> None:
    x = random(100, 20, 8)
    found = run(find("position_parts", skip_first=False), x, x)
    assert found["documents"] == 64
    assert found["position_share"] == pytest.approx(found["rest_share"] / 64, rel=0.4)
    x[:, 0] += 100
    assert run(find("position_parts", skip_first=False), x, x)["position_share"] > 0.9
    assert run(find("position_parts"), x, x)["position_share"] < 0.02


def patterns(*heads: Tensor, **more: Any) -> dict[str, float]:
    """Figures of heads whose scores are given: the keys are the identity."""
    scores = torch.stack(heads)[None]
    keys = torch.eye(scores.shape[-1])[None, None].expand(1, len(heads), -1, -1)
    x = torch.zeros(1, scores.shape[-2], 2)
    return run(
        find("head_patterns", rows=64),
        x,
        x,
        attention=[Attention(scores, keys, None, True, 1.0)],
        **more,
    )


def test_identity_against_uniform_heads() -> None:
    """`sqrt(H_4 / 4)` and mean entropies 0 and `ln(4!) / 4`."""
    found = patterns(1e4 * torch.eye(4), torch.zeros(4, 4))
    assert found["cosine"] == pytest.approx(0.7217, abs=1e-4)
    assert found["entropy"] == pytest.approx(0.7945 / 2, abs=1e-4)
    assert found["entropy_spread"] == pytest.approx(0.7945 / 2, abs=1e-4)
    same = patterns(random(4, 4), random(4, 4))
    assert (same["cosine"], same["entropy_spread"]) == pytest.approx((1, 0), abs=1e-6)


def test_random_heads_are_at_their_floor() -> None:
    heads = torch.randn(6, 40, 40, generator=torch.Generator().manual_seed(3))
    found = patterns(*heads)
    assert found["cosine"] == pytest.approx(found["floor"], abs=0.05)
    assert causal_floor(3) > causal_floor(16) > causal_floor(128) > 0.5


@pytest.mark.parametrize("kind", ["llama", "gpt2", "neox"])
def test_probabilities_are_those_of_the_eager_network(tiny, kind: str) -> None:
    from transformers import AutoModelForCausalLM

    ids = torch.arange(3, 19).reshape(2, 8)
    mask = torch.tensor([[1] * 8, [1] * 5 + [0] * 3])
    eager = AutoModelForCausalLM.from_pretrained(tiny(kind), attn_implementation="eager")
    with torch.no_grad():
        given = eager(ids, attention_mask=mask, output_attentions=True).attentions
    seen: list[Any] = []
    look = lambda state, s: seen.append(s.attention)  # noqa: E731
    probe = Probe("layer", lambda key: None, look, lambda s: 0.0, watch=("attention",))
    observe(layerwise.open(tiny(kind)), [{"input_ids": ids, "attention_mask": mask}], {"p": probe})
    for calls, expected in zip(seen, given, strict=True):
        for document, length in enumerate((8, 5)):
            p = calls[0].probabilities(torch.arange(length).expand(2, -1))[document]
            torch.testing.assert_close(p, expected[document, :, :length], rtol=1e-4, atol=1e-5)


def test_neurons_of_a_real_feed_forward_part(tiny) -> None:
    network = layerwise.open(tiny("llama")).load()
    ids = torch.arange(3, 27).reshape(3, 8)
    mask = torch.tensor([[1] * 8, [1] * 5 + [0] * 3, [1] * 8])
    batches = [{"input_ids": ids[a:b], "attention_mask": mask[a:b]} for a, b in ((0, 2), (2, 3))]
    found = observe(network, batches, {"n": find("neuron_means", inputs="mlp.down")})["n"]
    held: list[Tensor] = []
    down = network.layers()[1].module.get_submodule("mlp.down_proj")
    down.register_forward_pre_hook(lambda module, args: held.append(args[0]))
    with torch.no_grad():
        network.module(ids, attention_mask=mask, use_cache=False)
    expected = torch.stack([x[m.bool()].abs().mean(0) for x, m in zip(held[0], mask, strict=True)])
    torch.testing.assert_close(found["decoder/1/mlp.down"], expected, rtol=1e-4, atol=1e-5)
    assert found["decoder/1/attention.q"].numel() == 0
