"""Spectra, tails and rotations against slow references and known answers."""

import math
from functools import partial

import pytest
import torch
from torch import Tensor

import layerwise
from layerwise.core.method import find
from layerwise.core.network import Network
from layerwise.core.stack import Layer, Stack
from layerwise.core.stats import Stats
from layerwise.describe.boundary import logistic_boundary
from layerwise.describe.weights import share_above, squared_values, tail_index, turned
from layerwise.jobs.inspect import fetch
from layerwise.train import Layca, turned_step


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def one_layer() -> Stack:
    return Stack("decoder", "", (Layer("decoder", 0, "", torch.nn.Identity(), (), ()),), ())


def spectrum(**weights: Tensor) -> dict[str, dict[str, float]]:
    fetch = lambda key: {f"{key}/{name}": w for name, w in weights.items()}  # noqa: E731
    return dict(find("spectrum").bind({}, fetch=fetch)(one_layer(), Stats({})).values)


def test_figures_of_a_known_spectrum() -> None:
    turn = torch.linalg.qr(random(3, 3)).Q
    found = spectrum(a=turn @ torch.diag(torch.tensor([3.0, 2.0, 1.0]).double()))
    row = found["decoder/0/a"]
    assert row["norm"] == pytest.approx(math.sqrt(14)) and row["largest"] == pytest.approx(3)
    assert row["stable_rank"] == pytest.approx(14 / 9)
    p = [9 / 14, 4 / 14, 1 / 14]
    assert row["entropy"] == pytest.approx(-sum(x * math.log(x) for x in p) / math.log(3))
    assert found["decoder/0"] == row


def test_a_layer_is_the_mean_of_its_matrices_and_zeros_have_a_norm_alone() -> None:
    found = spectrum(a=random(4, 6), b=random(6, 4), c=torch.zeros(3, 3))
    rows = [found[f"decoder/0/{name}"] for name in "ab"]
    assert found["decoder/0"]["stable_rank"] == pytest.approx(
        sum(r["stable_rank"] for r in rows) / 2
    )
    assert found["decoder/0/c"] == {"norm": 0.0, "outliers": 0.0}


def slow_alpha(values: list[float]) -> float:
    """The candidate whose power law is nearest to the values from it on."""
    values, best = sorted(values), (math.inf, math.nan)
    for i in range(len(values) - 1):
        tail = values[i:]
        alpha = 1 + len(tail) / sum(math.log(v / tail[0]) for v in tail)
        gaps = [abs(1 - (v / tail[0]) ** (1 - alpha) - j / len(tail)) for j, v in enumerate(tail)]
        best = min(best, (max(gaps), alpha))
    return best[1]


def test_the_search_is_the_slow_one() -> None:
    values = torch.linalg.svdvals(random(40, 60)).square()
    assert tail_index(values) == pytest.approx(slow_alpha(values.tolist()))


def test_worked_examples_of_tails() -> None:
    e = math.e
    assert tail_index(torch.tensor([1, e, e**2]).double()) == pytest.approx(2)
    assert tail_index(torch.tensor([1, e, e**2, e**3]).double(), how="median") == pytest.approx(3)
    assert math.isnan(tail_index(torch.ones(9).double()))
    assert math.isnan(tail_index(torch.tensor([1.0, 2.0]).double()))


@pytest.mark.parametrize("alpha", [2.0, 3.0, 4.0])
def test_both_estimates_of_a_pareto_tail(alpha: float) -> None:
    quantiles = (torch.arange(4000).double() + 0.5) / 4000
    values = (1 - quantiles) ** (-1 / (alpha - 1))
    assert tail_index(values, how="median") == pytest.approx(alpha, abs=0.02)
    assert tail_index(values[-1500:]) == pytest.approx(alpha, abs=0.1)
    assert tail_index(7 * values, how="median") == pytest.approx(tail_index(values, how="median"))


def test_the_two_estimates_of_a_gaussian_matrix_are_not_comparable() -> None:
    many = torch.randn(6, 256, 512, generator=torch.Generator().manual_seed(0)).double()
    found = [squared_values(w, 1024) for w in many]
    assert 5 < sorted(map(tail_index, found))[3] < 9
    for values in found:
        assert tail_index(values, how="median") == pytest.approx(2.71, abs=0.1)


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (6, 6)])
def test_squared_singular_values(shape: tuple[int, int]) -> None:
    w = random(*shape)
    torch.testing.assert_close(squared_values(w, 99), torch.linalg.svdvals(w).square().flip(0))


def test_the_largest_of_a_sketched_matrix() -> None:
    w = random(400, 500) * torch.arange(500).add(1).double().pow(-0.7)
    exact, sketch = torch.linalg.svdvals(w).square(), squared_values(w.float(), exact=300)
    assert len(sketch) == 256
    torch.testing.assert_close(sketch[-100:], exact[:100].flip(0), rtol=0.02, atol=0)


def test_outliers_of_a_gaussian_and_of_a_planted_one() -> None:
    w = random(1000, 1000).float()
    assert share_above(w, 5.0) == pytest.approx(6.6e-5, rel=0.4)
    w = torch.ones(10, 10)
    w[3, 3] = -50
    assert share_above(w, 5.0) == pytest.approx(0.01)


def test_rotations() -> None:
    w, other = random(4, 5), random(5, 5)[:4] + 1
    assert turned(-w, w)["rotation"] == pytest.approx(2)
    assert turned(3 * w, w) == pytest.approx({"rotation": 0, "growth": 3}, abs=1e-15)
    cosine = (w * other).sum() / (w.norm() * other.norm())
    assert turned(other, w)["rotation"] == pytest.approx(1 - cosine.item())
    tiny = 1e-9 * torch.linalg.qr(random(20, 20)).Q[:4, :5]
    step = turned(w + tiny, w)["rotation"]
    assert 0 < step < 1e-17
    assert turned(w, torch.zeros(4, 5)) == {}


def slow_turn(w: Tensor, step: Tensor, rate: float) -> Tensor:
    """The update as the paper writes it, on one flattened matrix."""
    a, s = w.flatten().double(), step.flatten().double()
    s = s - (s @ a) / (a @ a) * a
    s = s * a.norm() / s.norm()
    moved = a - rate * s
    return (moved * a.norm() / moved.norm()).reshape(w.shape)


def test_a_turned_step_has_its_angle_and_keeps_the_norm() -> None:
    w = random(5, 7)
    for rate, scale in ((0.1, 1e-6), (0.5, 1.0), (1.0, 1e9)):
        step = scale * random(7, 5).T
        found = turned_step(w, step, rate)
        torch.testing.assert_close(found, slow_turn(w, step, rate), rtol=1e-12, atol=1e-12)
        assert found.norm().item() == pytest.approx(w.norm().item(), rel=1e-12)
        cosine = (found * w).sum() / w.norm() ** 2
        assert cosine.item() == pytest.approx(1 / math.sqrt(1 + rate**2), rel=1e-12)
    assert torch.equal(turned_step(w, 3 * w, 0.5), w)
    assert torch.equal(turned_step(0 * w, w, 0.5), 0 * w)


def trained(kind: type[torch.optim.Optimizer], tiny, steps: int) -> list[float]:
    """How far every layer turned after some steps of an optimizer of a rate that does not matter."""
    network = layerwise.open(tiny("llama")).load()
    for p in network.module.parameters():
        p.requires_grad_(True)
    start: Network = layerwise.open(tiny("llama")).load()
    layca = Layca(network.stack, kind(network.module.parameters(), lr=0.37), 0.02)
    ids = torch.arange(3, 35)[None]
    for _ in range(steps):
        network.module.zero_grad()
        network.module(ids, labels=ids).loss.backward()
        layca.step()
    norms = [
        dict(la.module.named_parameters())["input_layernorm.weight"] for la in network.layers()
    ]
    assert all(torch.equal(w, torch.ones_like(w)) for w in norms)  # nothing but matrices is trained
    found = find("rotation").bind(
        {}, fetch=partial(fetch, network), reference=partial(fetch, start)
    )(network.stack, Stats({}))
    assert all(row["growth"] == pytest.approx(1, abs=1e-5) for row in found.values.values())
    return [row["rotation"] for key, row in found.values.items() if key.count("/") == 1]


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
def test_every_layer_turns_alike_under_layca(tiny, kind: type[torch.optim.Optimizer]) -> None:
    once = trained(kind, tiny, 1)
    assert once == pytest.approx([1 - 1 / math.sqrt(1 + 0.02**2)] * 4, rel=1e-3)
    more = trained(kind, tiny, 5)
    assert max(more) < 1.6 * min(more) and min(more) > 3 * once[0]


def test_points_on_a_curve_give_it_back() -> None:
    places, k, middle = [-2.0, -1.7, -1.4, -1.1], 4.0, -1.55
    amounts, hits = [], []
    for x in places:
        share = round(1000 / (1 + math.exp(-k * (x - middle))))
        amounts += [10**x] * 1000
        hits += [True] * share + [False] * (1000 - share)
    found = logistic_boundary(amounts, hits, repeats=20)
    assert math.log10(found.critical) == pytest.approx(middle, abs=0.003)
    assert found.steepness == pytest.approx(k, rel=0.02)
    assert found.interval[0] < found.critical < found.interval[1]
    with pytest.raises(ValueError, match="two amounts"):
        logistic_boundary([1.0, 1.0], [True, False])
