"""Solvers as the papers write them, one weight at a time, beside the fast ones."""

import itertools
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor

from layerwise.core.chain import run_chain
from layerwise.core.gaussian import gaussian_grid
from layerwise.core.method import find
from layerwise.core.plan import Step
from layerwise.core.stats import Seen
from layerwise.core.weight import Dense, Quantized, Weight
from layerwise.edit.weight.learn import _parametrisations
from layerwise.measure.importance import normalised


def problem(rows: int = 6, columns: int = 150, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5
    x = torch.randn(3 * columns, columns, generator=generator) @ (mixing + torch.eye(columns))
    return weight, x.T @ x / len(x)


def objective(error: Tensor, moment: Tensor) -> float:
    return (error.double() @ moment.double() * error.double()).sum().item()


def chain(weight: Tensor, stats: dict[str, Any], *steps: tuple[str, dict[str, Any]]) -> Weight:
    return run_chain(weight, stats, [Step(name, options) for name, options in steps])


def slow_descent(w: Tensor, h: Tensor, record: Quantized) -> Tensor:
    """COMQ's sweep: the target of each weight from all others of its row, then the nearest code."""
    w, h, codes, now = w.double(), h.double(), record.codes.clone(), record.dense().double()
    half, width = 2 ** (record.bits - 1), record.group or w.shape[1]
    for j in h.diagonal().argsort(descending=True, stable=True).tolist():
        for i in range(len(w)):
            others = [k for k in range(w.shape[1]) if k != j]
            pull = sum(h[j, k] * (w[i, k] - now[i, k]) for k in others) / h[j, j]
            scale = record.scale[i, j // width].double()
            codes[i, j] = ((w[i, j] + pull) / scale).round().clamp(-half, half - 1)
            now[i, j] = codes[i, j] * scale
    return codes


def test_descent_is_the_slow_one() -> None:
    """More than one block of columns, a last group that is shorter."""
    weight, moment = problem(3, 150)
    start = find("rtn").bind({"bits": 3, "group": 64})(weight, {})
    codes = slow_descent(weight, moment, start)
    fast = chain(weight, {"second_moment": moment}, ("comq", {"bits": 3, "group": 64, "sweeps": 1}))
    assert (fast.codes != codes).double().mean() < 0.01


def test_descent_worked_example() -> None:
    """Loss .28 for the codes, .27 with the scale put where it is best."""
    weight, moment = torch.tensor([[0.6, 0.6]]), torch.tensor([[1.0, 0.5], [0.5, 1.0]])
    start = Quantized(torch.tensor([[1, 0]], dtype=torch.int8), torch.ones(1, 1), None, 2, 0)
    for scale_step, loss, scale in ((False, 0.28, 1.0), (True, 0.27, 0.9)):
        options = {"bits": 2, "group": 0, "sweeps": 1, "scale_step": scale_step}
        comq = find("comq").bind(options, before=start, target=weight)
        record = comq(start.dense(), {"second_moment": moment})
        assert record.codes.tolist() == [[1, 0]]
        assert record.scale.item() == pytest.approx(scale)
        assert objective(record.dense() - weight, moment) == pytest.approx(loss, abs=1e-6)


@pytest.mark.parametrize("scale_step", [False, True])
def test_descent_never_rises(scale_step: bool) -> None:
    weight, moment = problem()
    options = {"bits": 2, "group": 32, "scale_step": scale_step}
    found = [
        chain(weight, {"second_moment": moment}, ("comq", {**options, "sweeps": n})).dense()
        for n in range(6)
    ]
    errors = [objective(dense - weight, moment) for dense in found]
    assert errors == sorted(errors, reverse=True)
    assert errors[1] < 0.9 * errors[0]
    nearest = find("rtn").bind({"bits": 2, "group": 32})(weight, {}).dense()
    assert torch.equal(found[0], nearest)


def test_descent_improves_on_gptq() -> None:
    weight, moment = problem()
    stats, grid = {"second_moment": moment}, {"bits": 3, "group": 32}
    first = chain(weight, stats, ("gptq", grid))
    for step in (("comq", grid), ("refine", {})):
        both = chain(weight, stats, ("gptq", grid), step)
        assert objective(both.dense() - weight, moment) < objective(first.dense() - weight, moment)
    searched = ("rtn", grid | {"shrink": True})
    again = chain(weight, stats, searched, ("refine", {"by": "feedback"}))
    assert torch.equal(again.codes, first.codes)
    assert isinstance(chain(weight, {}), Dense)


def test_error_propagation_worked_example() -> None:
    """Targets 2 and 4 from inputs that are both 1."""
    stats = {"second_moment": torch.tensor([[2.0]]), "cross_moment": torch.tensor([[1.0]])}
    for alpha, damping, wanted in ((1.0, 0.0, 3.0), (0.5, 0.0, 2.5), (0.5, 1.0, 2.25), (0.0, 1, 2)):
        step = ("qep", {"alpha": alpha, "damping": float(damping)})
        assert chain(torch.tensor([[2.0]]), stats, step).dense().item() == pytest.approx(wanted)


def test_error_propagation_is_least_squares() -> None:
    weight, _ = problem(5, 20)
    generator = torch.Generator().manual_seed(1)
    clean = torch.randn(200, 20, generator=generator)
    edited = clean + 0.3 * torch.randn(200, 20, generator=generator)
    stats = {"second_moment": edited.T @ edited, "cross_moment": (clean - edited).T @ edited}
    found = chain(weight, stats, ("qep", {"alpha": 1.0, "damping": 0.0})).dense()
    fit = torch.linalg.lstsq(edited.double(), (clean @ weight.T).double()).solution.T
    torch.testing.assert_close(found.double(), fit, rtol=1e-4, atol=1e-5)


def test_rotation_by_an_explicit_matrix() -> None:
    """Blocks of 64, 32 and 4 columns: the solver sees W R and R^T H R, the record is Q R^T."""
    weight, moment = problem(6, 100)
    record = chain(weight, {}, ("rotate", {"block": 64}))
    turn = chain(torch.eye(100), {}, ("rotate", {"block": 64})).inner.dense()
    torch.testing.assert_close(turn @ turn.T, torch.eye(100))
    assert not turn[:64, 64:].any()
    assert (turn[:64, :64].abs() - 1 / 8).abs().max() < 1e-6
    torch.testing.assert_close(record.dense(), weight)
    steps = (("rotate", {"block": 64}), ("gptq", {"bits": 3, "group": 32}))
    found = chain(weight, {"second_moment": moment}, *steps)
    inside = {"second_moment": turn.T @ moment @ turn}
    alone = chain(weight @ turn, inside, ("gptq", {"bits": 3, "group": 32}))
    assert (found.inner.codes != alone.codes).double().mean() < 0.01
    torch.testing.assert_close(found.dense(), found.inner.dense() @ turn.T)
    assert found.nbytes == alone.nbytes + 13


def test_attention_received_by_hand() -> None:
    """Softmax by softmax, with two heads that share their keys, one of six tokens masked."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 4, 6, 8, generator=generator)
    mask, received = torch.tensor([[1, 1, 1, 1, 1, 0]]), torch.zeros(6)
    for head in range(4):
        for i in range(5):
            scores = torch.tensor(
                [q[0, head, i] @ k[0, head // 2, j] / 8**0.5 for j in range(i + 1)]
            )
            received[: i + 1] += scores.softmax(0)
    share = (received[:5] - received[:5].min()) / (received[:5].max() - received[:5].min())
    weights = 0.1 + 0.9 * share
    weights = torch.cat([weights / weights.mean(), torch.zeros(1)])

    def replay() -> Tensor:
        sdpa = torch.nn.functional.scaled_dot_product_attention
        return sdpa(q, k[:, :2], v[:, :2], is_causal=True, enable_gqa=True)

    probe = find("attention_received").bind({"low": 0.1})()
    seen = Seen(torch.zeros(1, 6, 8), None, mask, None, {}, replay)
    state = probe.update(probe.init(""), seen)
    torch.testing.assert_close(probe.emit(state)[0], weights)
    assert probe.finish(state) == pytest.approx((5**2 / (5 * weights.square().sum())).item())


def test_token_weights_worked_example() -> None:
    raw, rows = torch.tensor([[0.2, 0.6, 0.4]]), torch.tensor([[1.0, 0], [0, 1], [1, 1]])
    weights = normalised(raw, torch.ones(1, 3), 0.005)
    torch.testing.assert_close(weights, torch.tensor([[0.00995025, 1.99004975, 1.0]]))
    probe = find("attended_moment").bind()()
    fed = {"attention_received": weights}
    seen = Seen(rows, None, None, None, fed, None, owners=torch.zeros(3))
    moment = 3 * probe.finish(probe.update(probe.init(""), seen))
    wanted = torch.tensor([[1.00995025, 1.0], [1.0, 2.99004975]])
    torch.testing.assert_close(moment, wanted)
    stats = {"second_moment": torch.eye(2), "attended_moment": moment}
    steps = (("token_importance", {}), ("gptq", {"bits": 2}))
    found = chain(torch.tensor([[0.3, 1.0]]), stats, *steps)
    plain = chain(torch.tensor([[0.3, 1.0]]), {"second_moment": moment}, ("gptq", {"bits": 2}))
    assert torch.equal(found.codes, plain.codes)


def slow_planes(w: list[float], rounds: int) -> tuple[list[tuple[int, int]], list[float]]:
    """One group: normal equations with a little ridge, then every weight tries nine pairs."""
    pairs = sorted(itertools.product((1, 0, -1), repeat=2), key=lambda p: abs(p[0]) + abs(p[1]))
    trits = [((x > 0) - (x < 0),) * 2 for x in w]
    for _ in range(rounds):
        s, y = np.array(trits, float), np.array(w)
        ridge = 1e-8
        while (
            np.linalg.norm(m := s.T @ s + ridge * np.eye(2)) * np.linalg.norm(np.linalg.inv(m))
            > 1e6
        ):
            ridge *= 10
        a = np.linalg.solve(m, s.T @ y)
        trits = [
            min(pairs, key=lambda p, x=x: round(abs(x - p[0] * a[0] - p[1] * a[1]), 6)) for x in w
        ]
    return trits, a.tolist()


def test_trit_planes_worked_example() -> None:
    w = [1.0, 0.4, -0.7, 0.0]
    for rounds, scales, error in ((1, (0.35, 0.35), 0.0925), (2, (0.40, 0.45), 0.045)):
        found = chain(torch.tensor([w]), {}, ("trit_planes", {"rounds": rounds}))
        slow, a = slow_planes(w, rounds)
        assert a == pytest.approx(scales, abs=1e-4)
        assert (found.a.scale.item(), found.b.scale.item()) == pytest.approx(scales, abs=1e-4)
        assert list(zip(found.a.codes[0].tolist(), found.b.codes[0].tolist(), strict=True)) == slow
        assert (found.dense() - torch.tensor(w)).square().sum().item() == pytest.approx(
            error, abs=1e-4
        )


def test_trit_planes_fall_and_are_the_slow_ones() -> None:
    weight, _ = problem(4, 64)
    errors = []
    for rounds in (2, 3, 5, 50):
        found = chain(weight, {}, ("trit_planes", {"group": 64, "rounds": rounds})).dense()
        errors.append((found - weight).square().sum().item())
    assert errors == sorted(errors, reverse=True)
    for row, dense in zip(weight.tolist(), found.tolist(), strict=True):
        trits, a = slow_planes(row, 50)
        slow = sum((x - t[0] * a[0] - t[1] * a[1]) ** 2 for x, t in zip(row, trits, strict=True))
        fast = sum((x - y) ** 2 for x, y in zip(row, dense, strict=True))
        assert fast == pytest.approx(slow, rel=0.02)


@pytest.mark.parametrize(("levels", "dim"), [(4, 1), (16, 1), (16, 2), (64, 2)])
def test_higgs_one_group_at_a_time(levels: int, dim: int) -> None:
    """Rotate a block of each row, divide by its size over sqrt(g), take the nearest points."""
    weight, _ = problem(4, 128)
    grid = gaussian_grid(levels, dim).points
    record = chain(
        weight, {}, ("rotate", {"seed": -1}), ("gaussian", {"levels": levels, "dim": dim})
    )
    turn = torch.tensor(scipy.linalg.hadamard(128), dtype=torch.float32) / 128**0.5
    for row, found in zip(weight, record.dense(), strict=True):
        turned = turn @ row
        scale = turned.norm() / 128**0.5
        points = [grid[(grid - v).square().sum(1).argmin()] for v in (turned / scale).split(dim)]
        torch.testing.assert_close(found, turn @ (torch.cat(points) * scale), rtol=1e-4, atol=1e-4)
    assert (record.dense() - weight).square().sum() / weight.square().sum() == pytest.approx(
        gaussian_grid(levels, dim).error, rel=0.25
    )


def test_channel_scales_worked_example() -> None:
    """The best exponent lies inside: .1604 at 0, .0124 at .25, .0837 at .5."""
    weight = torch.tensor([[0.3, -1.0, 0.8, 0.1]])
    moment = torch.diag(torch.tensor([81.0, 1.0, 1.0, 1.0]))
    grid = {"bits": 3, "symmetric": False}
    errors = {}
    for rho in (0.0, 0.25, 0.5):
        scale = moment.diagonal().sqrt() ** rho
        rounded = chain(weight * scale, {}, ("rtn", grid)).dense() / scale
        errors[rho] = objective(rounded - weight, moment)
    assert list(errors.values()) == pytest.approx([0.1604, 0.0124, 0.0837], abs=1e-3)
    steps = (("scale_channels", {**grid, "points": 4}), ("rtn", grid))
    found = chain(weight, {"second_moment": moment}, *steps)
    assert objective(found.dense() - weight, moment) == pytest.approx(errors[0.25], rel=1e-3)


def test_learned_offsets_by_hand() -> None:
    """Sign steps that fall linearly, on offsets and on one share of the range per row."""
    weight, moment = problem(3, 12)
    shape, steps = moment / moment.diagonal().mean(), 10
    scale = 2 * weight.abs().amax(1, keepdim=True) / 7
    v, beta, best = torch.zeros(3, 12), torch.ones(3, 1), {}
    for k in range(steps + 1):
        size = scale * beta.clamp(0.1, 1)
        z = weight / size + v
        codes, inside = z.round().clamp(-4, 3), (z >= -4) & (z <= 3)
        error = codes * size - weight
        slope = 2 * error @ shape
        for i, loss in enumerate(((error @ shape) * error).sum(1).tolist()):
            best[i] = min(best.get(i, (torch.inf, None)), (loss, codes[i].tolist()))
        grad_size = (slope * (codes - inside * weight / size)).sum(1, keepdim=True)
        v = v - (slope * size * inside).sign() * (1 - k / steps) / steps
        beta = beta - (grad_size * scale * (beta <= 1)).sign() * (1 - k / steps) / steps
    options = {"bits": 3, "group": 0, "steps": steps}
    found = chain(weight, {"second_moment": moment}, ("learned_rounding", options))
    assert [best[i][1] for i in range(3)] == found.codes.tolist()


def test_divisors_worked_example() -> None:
    """The same divisor moves a large weight to the next code and leaves a small one."""
    blocks, scale = torch.tensor([[[0.6, 1.6, 0.1]]]), torch.ones(1, 1, 1)
    made = _parametrisations["divisor"](blocks, scale, 10, 1.0)
    assert made.form(made.start)[1].round().tolist() == [[[1, 2, 0]]]
    share, each, row = made.start
    moved = [share, each + torch.tensor(1.25).log(), row]
    assert made.form(moved)[1].round().tolist() == [[[0, 1, 0]]]


@pytest.mark.parametrize("form", ["offset", "divisor", "free"])
def test_learning_beats_rounding(form: str) -> None:
    weight, moment = problem()
    stats, grid = {"second_moment": moment}, {"bits": 3, "group": 32}
    nearest = chain(weight, stats, ("rtn", grid))
    same = chain(weight, stats, ("learned_rounding", {**grid, "form": form, "steps": 0}))
    assert torch.equal(same.codes, nearest.codes)
    with torch.no_grad():  # as it is in a walk
        found = chain(weight, stats, ("learned_rounding", {**grid, "form": form}))
    error, start = (objective(r.dense() - weight, moment) for r in (found, nearest))
    assert error < 0.9 * start
