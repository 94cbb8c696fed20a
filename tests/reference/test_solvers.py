"""Solvers as the papers write them, one weight at a time, beside the fast ones."""

from typing import Any

import pytest
import torch
from torch import Tensor

from layerwise.core.plan import Step
from layerwise.core.weight import Dense, Quantized, Weight
from layerwise.core.method import find
from layerwise.jobs.solve import run_chain


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
