"""Solvers as the papers write them, one weight at a time, beside the fast ones."""

from typing import Any

import pytest
import torch
from torch import Tensor

from layerwise.core.method import find
from layerwise.core.plan import Step
from layerwise.core.stats import Seen
from layerwise.core.weight import Dense, Quantized, Weight
from layerwise.jobs.solve import run_chain
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
    again = chain(weight, stats, ("rtn", grid), ("refine", {"by": "feedback"}))
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
