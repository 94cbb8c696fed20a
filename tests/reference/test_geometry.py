"""Geometry against slow references, known answers and chance levels."""

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from layerwise.core.method import find
from layerwise.core.stack import Layer, Stack, plain_wiring
from layerwise.core.stats import Figures, Stats
from layerwise.core.tokens import Sample, moments_of
from layerwise.describe.geometry import local_map, residual
from layerwise.describe.similarity import cka_map, correlations, hsic, match_map, streamed_cka
from layerwise.describe.views import dime, infonce, lidar


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def orthogonal(n: int) -> Tensor:
    return torch.linalg.qr(random(n, n, seed=9)).Q


def a_stack(count: int) -> Stack:
    layers = tuple(Layer("decoder", i, "", nn.Identity(), (), ()) for i in range(count))
    return Stack("decoder", "", layers, plain_wiring(count))


def sampled(*states: Tensor) -> Stats:
    """Stats of the layers between given states of tokens; two documents, one after the other."""
    where = torch.stack([torch.arange(len(states[0])) % 2, torch.arange(len(states[0]))], 1)
    samples = {f"decoder/{i}": Sample(where, *pair) for i, pair in enumerate(pairwise(states))}
    moments = {
        key: tuple(
            moments_of(s.before[i::2], s.after[i::2], (s.before[0], s.after[0])) for i in (0, 1)
        )
        for key, s in samples.items()
    }
    return Stats({"token_sample": samples, "stream_moments": moments})


def describe(name: str, *states: Tensor, **options: Any) -> Figures:
    return find(name, "describe").bind(options)(a_stack(len(states) - 1), sampled(*states))


def slow_hsic(x: Tensor, y: Tensor) -> float:
    """Song et al.: over all quadruples of different rows, through the U-centred matrices."""
    n = len(x)
    k, el = x @ x.T, y @ y.T
    k, el = k - k.diagonal().diag(), el - el.diagonal().diag()
    one = torch.ones(n, dtype=x.dtype)
    trace = (k @ el).trace()
    sums = (one @ k @ one) * (one @ el @ one) / ((n - 1) * (n - 2))
    return ((trace + sums - 2 / (n - 2) * one @ k @ el @ one) / (n * (n - 3))).item()


def test_streamed_and_sampled_cka_are_the_definition() -> None:
    x, y = 3 + random(40, 6), random(40, 6, seed=1) + 0.4 * random(40, 6)
    slow = slow_hsic(x, y) / math.sqrt(slow_hsic(x, x) * slow_hsic(y, y))
    m = moments_of(x[:15], y[:15], (x[0], y[0])).plus(moments_of(x[15:], y[15:], (x[0], y[0])))
    assert hsic(m, 0, 1).item() == pytest.approx(slow_hsic(x, y), rel=1e-9)
    assert streamed_cka(m) == pytest.approx(slow, rel=1e-9)
    assert cka_map([x], [y]).item() == pytest.approx(slow, rel=1e-9)


def test_biased_cka_of_centred_columns() -> None:
    x, y = random(30, 4), random(30, 7, seed=1)
    a, b = x - x.mean(0), y - y.mean(0)
    slow = (a.T @ b).square().sum() / ((a.T @ a).norm() * (b.T @ b).norm())
    assert cka_map([x], [y], unbiased=False).item() == pytest.approx(slow.item())


def test_cka_of_turned_scaled_and_unrelated_states() -> None:
    x = random(50, 5)
    assert cka_map([x], [3 * x @ orthogonal(5) + 7]).item() == pytest.approx(1)
    skewed = x * torch.tensor([1.0, 1, 1, 1, 20])
    assert cka_map([x], [skewed]).item() < 0.9
    unrelated = [
        cka_map([random(32, 512, seed=s)], [random(32, 512, seed=100 + s)]).item() for s in range(8)
    ]
    assert abs(sum(unrelated) / 8) < 0.06
    biased = cka_map([random(32, 512)], [random(32, 512, seed=1)], unbiased=False).item()
    assert biased == pytest.approx(0.94, abs=0.02)


def slow_cca(x: Tensor, y: Tensor) -> Tensor:
    """Singular values of the product of orthonormal bases of the centred columns."""
    bases = [torch.linalg.qr(t - t.mean(0)).Q for t in (x, y)]
    return torch.linalg.svdvals(bases[0].T @ bases[1])


def test_canonical_correlations() -> None:
    x, y = random(200, 6), random(200, 4, seed=1) + random(200, 6)[:, :4]
    found, rho = correlations(moments_of(x, y), keep=1.0), slow_cca(x, y)
    assert found["cca"] == pytest.approx(rho.mean().item())
    assert found["cca_squared"] == pytest.approx(rho.square().mean().item())
    assert (found["kept"], found["floor"]) == (4, pytest.approx(6 / 199))


def test_cca_is_blind_to_any_invertible_map_and_has_a_floor() -> None:
    x = random(400, 5)
    map_ = random(5, 5, seed=3)
    found = correlations(moments_of(x, x @ map_ + 2), keep=1.0)
    assert (found["cca"], found["pwcca"]) == pytest.approx((1, 1))
    unrelated = [
        correlations(moments_of(random(100, 50, seed=s), random(100, 50, seed=s + 50)), 1.0)
        for s in range(4)
    ]
    assert sum(c["cca_squared"] for c in unrelated) / 4 == pytest.approx(50 / 99, abs=0.02)


def test_svcca_drops_directions_without_variance() -> None:
    loud, quiet = random(300, 3) * 100, random(300, 5, seed=1) * 0.01
    other = torch.cat([loud @ orthogonal(3), random(300, 5, seed=2) * 0.01], 1)
    m = moments_of(torch.cat([loud, quiet], 1), other)
    assert correlations(m, keep=0.99)["cca"] == pytest.approx(1, abs=1e-6)
    assert correlations(m, keep=0.99)["kept"] == 3
    assert correlations(m, keep=1.0)["cca"] < 0.7


def test_pwcca_weighs_by_what_a_direction_explains() -> None:
    """One shared loud direction among noise: the plain mean is low, the weighted one is not."""
    x, y = random(5000, 4), random(5000, 4, seed=1)
    x[:, 0] *= 50
    y[:, 0] = x[:, 0]
    found = correlations(moments_of(x, y), keep=1.0)
    centred = x - x.mean(0)
    u, rho, _ = torch.linalg.svd(torch.linalg.qr(centred).Q.T @ torch.linalg.qr(y - y.mean(0)).Q)
    weights = ((torch.linalg.qr(centred).Q @ u).T @ centred).abs().sum(1)
    assert found["pwcca"] == pytest.approx(((weights * rho).sum() / weights.sum()).item(), abs=1e-6)
    assert found["pwcca"] > 0.8 > found["cca"]


def test_direct_matching_is_least_squares_on_held_out_rows() -> None:
    x, y = random(60, 5), random(60, 7, seed=1) + 4
    held_out = torch.arange(60) % 3 == 0
    raw, centred = match_map([x], [y], held_out, ridge=0.0)
    ones = torch.ones(60, 1, dtype=x.dtype)
    design = torch.cat([x, ones], 1)
    fit = torch.linalg.lstsq(design[~held_out], y[~held_out]).solution
    error = (design[held_out] @ fit - y[held_out]).square().sum()
    assert raw.item() == pytest.approx((error / y[held_out].square().sum()).item(), rel=1e-5)
    spread = (y[held_out] - y[held_out].mean(0)).square().sum()
    assert centred.item() == pytest.approx((error / spread).item(), rel=1e-5)


def test_direct_matching_knows_what_was_lost() -> None:
    x = random(80, 6)
    found = describe("direct_match", x, x @ random(6, 6, seed=2) + 3, x[:, :4], ridge=1e-9)
    table = found.maps["error"]
    assert table.diagonal().abs().max() < 1e-6
    assert table[0, 2] < 1e-6 < 0.1 < table[2, 0]
    assert found.values["decoder/0"]["error"] < 1e-6


def test_uncentred_errors_of_a_large_mean_say_nothing() -> None:
    noise = random(400, 8)
    raw, centred = match_map(
        [random(400, 8, seed=1)], [10 + noise], torch.arange(400) % 2 == 1, 0.0
    )
    assert raw.item() == pytest.approx(0.0101, abs=0.001)
    assert centred.item() > 0.95


def test_spread_of_a_planted_rank() -> None:
    x = random(400, 3) @ random(3, 12, seed=1).svd().V.T
    found = describe("spread", x, x + 5).values["decoder/0"]
    assert found["rank"] == pytest.approx(3, abs=0.1)
    unit = nn.functional.normalize(x + 5, dim=1)
    cosines = (unit @ unit.T)[~torch.eye(400, dtype=torch.bool)]
    assert found["anisotropy"] == pytest.approx(cosines.mean().item())
    assert found["top_share"] == pytest.approx(1 / 3, abs=0.05)


def test_a_local_map_never_sees_its_own_token() -> None:
    x, y = random(30, 4), random(30, 4, seed=1)
    fitted, changed = local_map(x, y, 5), y.clone()
    changed[7] += 100
    again = local_map(x, changed, 5)
    assert torch.equal(fitted[7], again[7])
    assert not torch.equal(fitted, again)
    near = (x - x[7]).norm(dim=1).argsort()[1:6]
    below = x[near].square().sum(0)
    slow = x[7] * (x[near] * y[near]).sum(0) / (below + 1e-3 * below.mean())
    torch.testing.assert_close(fitted[7], slow)


def test_a_token_wise_layer_leaves_nothing_and_a_random_one_all() -> None:
    x = random(400, 6)
    linear = describe("update_fit", x, x * torch.tensor([2.0, -1, 3, 0, 1.5, 4])).values[
        "decoder/0"
    ]
    assert linear["local_error"] < 0.01 and linear["global_error"] < 0.01
    assert linear["global_aligned"] > 0.999
    unrelated = describe("update_fit", x, x + random(400, 6, seed=5)).values["decoder/0"]
    assert unrelated["global_error"] == pytest.approx(1, abs=0.05)
    assert abs(unrelated["global_aligned"]) < 0.1


def test_what_is_left_of_a_global_fit_is_at_right_angles_in_sample() -> None:
    x, y = random(50, 4), random(50, 4, seed=1)
    design = torch.cat([x, torch.ones(50, 1, dtype=x.dtype)], 1)
    fitted = design @ torch.linalg.lstsq(design, y).solution
    assert abs((fitted * (y - fitted)).sum()) < 1e-9
    found = residual(y, fitted, top=4)
    assert found["residual_share"] == pytest.approx(1)
    assert residual(y, y * 0.5, top=1)["error"] == pytest.approx(0.5)


def test_infonce_of_equal_and_of_collapsed_views() -> None:
    n, temperature = 5, 0.5
    same = torch.eye(n, dtype=torch.float64)[:, None].repeat(1, 2, 1)
    assert infonce(same, temperature) == pytest.approx(
        math.log(1 + (2 * n - 2) * math.exp(-1 / temperature))
    )
    assert infonce(torch.ones(n, 2, 3).double(), temperature) == pytest.approx(math.log(2 * n - 1))
    assert math.isfinite(infonce(1e4 * random(n, 2, 3), 0.1))


def test_lidar_counts_directions_between_documents() -> None:
    clean = torch.eye(5, dtype=torch.float64)[:, None].repeat(1, 16, 1)
    assert lidar(clean, 1e-4) == pytest.approx(4)
    assert lidar(clean + random(5, 16, 5), 1e-4) < 3.9


def test_dime_of_shared_blocks_and_of_nothing() -> None:
    blocks = torch.eye(2, dtype=torch.float64).repeat_interleave(3, 0)[:, None].repeat(1, 2, 1)
    assert dime(blocks, 400) == pytest.approx(0.565, abs=0.03)
    apart = torch.eye(6, dtype=torch.float64)[:, None].repeat(1, 2, 1)
    assert dime(apart, 10) == pytest.approx(0)
