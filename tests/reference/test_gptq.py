"""GPTQ as the paper writes it, one column at a time, beside the fast one."""

import math

import pytest
import torch
from torch import Tensor

from layerwise.core.method import find


def slow_gptq(
    w: Tensor, hessian: Tensor, bits: int, group: int, symmetric: bool, order: bool, damping: float
) -> tuple[Tensor, Tensor]:
    """Codes from 0 to 2^bits - 1 and values; equations 2 and 3 with the Cholesky form of step 3."""
    w, top, width = w.double().clone(), 2**bits - 1, group or w.shape[1]
    h = hessian.double() + damping * hessian.double().diagonal().mean() * torch.eye(len(hessian))
    places = h.diagonal().argsort(descending=True, stable=True) if order else torch.arange(len(h))
    upper = torch.linalg.cholesky(torch.linalg.inv(h[places][:, places]), upper=True)
    codes, values, whole = torch.empty_like(w), torch.empty_like(w), w.clone()
    for k, j in enumerate(places.tolist()):
        if order or not group or j % group == 0:  # grids of the untouched or of the present weights
            start = j // width * width
            block = (whole if order or not group else w)[:, start : start + width]
            low, high = block.amin(1).clamp_max(0), block.amax(1).clamp_min(0)
            low, high = (low, high) if not symmetric else (-(x := torch.maximum(-low, high)), x)
            scale = (high - low) / top
            zero = (-low / scale).round() if not symmetric else torch.full_like(low, (top + 1) / 2)
        codes[:, j] = ((w[:, j] / scale).round() + zero).clamp(0, top)
        values[:, j] = (codes[:, j] - zero) * scale
        error = (w[:, j] - values[:, j]) / upper[k, k]
        w[:, places[k:]] -= torch.outer(error, upper[k, k:])
    return codes, values


def objective(error: Tensor, moment: Tensor) -> float:
    return (error.double() @ moment.double() * error).sum().item()


@pytest.mark.parametrize("order", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [0, 33, 128])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_fast_one_is_the_slow_one(bits: int, group: int, symmetric: bool, order: bool) -> None:
    """Three blocks of columns, the last one short."""
    generator = torch.Generator().manual_seed(bits)
    weight = torch.randn(16, 300, generator=generator)
    x = torch.randn(900, 300, generator=generator) @ torch.randn(300, 300, generator=generator)
    moment = x.T @ x / len(x)
    options = {"bits": bits, "group": group, "symmetric": symmetric, "order": order}
    codes, values = slow_gptq(weight, moment, damping=0.01, **options)
    record = find("gptq").bind(options | {"shrink": False})(weight, {"second_moment": moment})
    differing = (record.codes.int() + 2 ** (bits - 1) != codes).double().mean()
    assert differing < 0.005
    fast, slow = record.dense() - weight, values - weight.double()
    assert math.isclose(objective(fast, moment), objective(slow, moment), rel_tol=0.01)


def test_worked_example() -> None:
    """Two columns beside 3 and -4, which make the grid that of the integers."""
    weight = torch.tensor([[0.6, 0.6, 3.0, -4.0]])
    moment = torch.eye(4)
    moment[0, 1] = moment[1, 0] = 0.5
    options = {"bits": 3, "symmetric": False, "order": False, "damping": 0.0, "group": 0}
    options["shrink"] = False
    found = find("gptq").bind(options)(weight, {"second_moment": moment}).dense()
    nearest = find("rtn").bind({"bits": 3, "symmetric": False, "group": 0})(weight, {}).dense()
    assert found.tolist() == [[1, 0, 3, -4]]
    assert nearest.tolist() == [[1, 1, 3, -4]]
    assert objective(found - weight, moment) == pytest.approx(0.28, abs=1e-6)
    assert objective(nearest - weight, moment) == pytest.approx(0.48, abs=1e-6)
    _, slow = slow_gptq(weight, moment, 3, 0, False, False, 0.0)
    assert torch.equal(slow.float(), found)
