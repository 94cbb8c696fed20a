"""Learned rounding: gradient steps through the rounding, on the error of what a matrix gives."""

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from layerwise.core.errors import LayerwiseError
from layerwise.core.method import method
from layerwise.core.weight import Quantized, in_groups
from layerwise.edit.weight._grid import check_bits, fit_grid
from layerwise.edit.weight._solve import must_be_moment, prepared
from layerwise.edit.weight.rtn import quantized

#: parameters -> scale `[out, groups, 1]` and unrounded codes `[out, groups, width]`
Form = Callable[[list[Tensor]], tuple[Tensor, Tensor]]


class Parametrisation(NamedTuple):
    """What is learned: where it starts, what it stands for, and how fast it moves at first."""

    start: list[Tensor]
    form: Form
    rates: list[float]
    sign: bool


@method(
    "weight",
    aliases=("signround", "auto_round"),
    paper="arXiv:2309.05516",
    needs=("second_moment",),
    by_rows=True,
)
def learned_rounding(
    weight: Float[Tensor, "out in"],
    stats: Mapping[str, Any],
    *,
    target: Float[Tensor, "out in"],
    bits: int = 4,
    group: int = 128,
    symmetric: bool = True,
    form: Literal["offset", "divisor", "free"] = "offset",
    steps: int = 200,
    rate: float = 1.0,
) -> Quantized:
    r"""Learn how every weight is rounded, by gradient steps on `tr(E H E^T)`, `E = W - Q`.

    `Q = s (clip(round(z)) - zero)`, with the gradient passed straight through the rounding. What
    is learned: `offset`, `z = W / s + V` and a share of the range, by the sign of the gradient, so
    that `V` stays within about a half; `divisor`, `z = W / (s exp(D + d))` with one `D` per weight
    and one `d` per row, and `s`; `free`, `z = (W + V) / s`, and `s`. The best rows seen are kept.

    Args:
        weight: `[out, in]`.
        stats: `second_moment` of the inputs, `[in, in]`; without it this is
            rounding to nearest.
        target: given; the last weight of the chain that was not rounded.
        bits: 2 to 8.
        group: columns that share a scale; the last group may be shorter; 0 for the whole row.
        symmetric: no zero points.
        form: `offset`, `divisor` or `free`.
        steps: of the optimiser; 0 is rounding to nearest.
        rate: times the usual learning rate of the form.

    Returns:
        A `Quantized` record, no row of it worse than rounding to nearest.

    Raises:
        LayerwiseError: `bits`, `group` or `steps` are out of range.

    Example:
        >>> w, h = torch.tensor([[0.6, 0.6, 3.0, -4.0]]), torch.eye(4)
        >>> h[0, 1] = h[1, 0] = 0.5
        >>> stats = {"second_moment": h}
        >>> q = learned_rounding(w, stats, target=w, bits=3, symmetric=False, group=0)
        >>> (q.dense() - w).abs().max() < 1
        tensor(True)

    Reference: Cheng et al., 2023, arXiv:2309.05516 (offset); Lee et al., 2023, arXiv:2306.00317
    (divisor); Hubara et al., 2020, arXiv:2006.10518 (free). Theirs fit the output of a block on
    batches of inputs, ours the matrix on its second moment, so that no input is kept; zero points
    stay where they start; steps of all but `offset` are Adam's, with rates relative to the scale.
    """
    check_bits("learned_rounding", bits, group)
    if steps < 0:
        raise LayerwiseError(
            "learned_rounding, option 'steps'", allowed="0 or more", found=steps, fix="raise it"
        )
    work, hessian = prepared(target, stats.get("second_moment"))
    must_be_moment(hessian, "learned_rounding")
    grid = fit_grid(work, bits, group, symmetric, False, weight.dtype)
    blocks = in_groups(work, grid.group)  # [out, groups, width]
    scale, zero = grid.scale[..., None], grid.zero[..., None]
    steps = steps if "second_moment" in stats else 0
    made = _parametrisations[form](blocks, scale, steps, rate)

    def values(parameters: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        size, free = made.form(parameters)
        exact = size.detach().to(weight.dtype).float()
        size = size + (exact - size).detach()
        codes = _through((free + zero).clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1))
        dense = ((codes - zero) * size).flatten(1)[:, : work.shape[1]]
        return dense, codes.detach().round(), exact

    codes, size = reconstruct(values, made, work, hessian, steps)
    found = codes.flatten(1)[:, : work.shape[1]].to(torch.int8).contiguous()
    fitted = grid._replace(scale=size[..., 0])
    return quantized(found, fitted, group, symmetric, weight.dtype)


def reconstruct(
    values: Callable[[list[Tensor]], tuple[Tensor, Tensor, Tensor]],
    made: Parametrisation,
    weight: Float[Tensor, "out in"],
    hessian: Float[Tensor, "in in"],
    steps: int,
) -> tuple[Tensor, Tensor]:
    """Codes and scales, row by row the best that the optimiser came by, its start among them."""
    parameters = [p.clone().requires_grad_() for p in made.start]
    adam = torch.optim.Adam(
        [{"params": [p], "lr": r} for p, r in zip(parameters, made.rates, strict=True)]
    )
    best: Tensor | None = None
    kept: list[Tensor] = []
    shape = hessian / hessian.diagonal().mean()
    for step in range(steps + 1):
        with torch.enable_grad():
            dense, *state = values(parameters)
            error = dense - weight
            losses = ((error @ shape) * error).sum(1)
            whole = losses.sum()
        found = losses.detach()
        if best is None:
            best, kept = found, state
        else:
            better = (found < best)[:, None, None]
            kept = [torch.where(better, new, old) for new, old in zip(state, kept, strict=True)]
            best = torch.minimum(found, best)
        if step == steps:
            break
        slopes = torch.autograd.grad(whole, parameters)
        left = 1 - step / steps
        if made.sign:
            for p, slope, r in zip(parameters, slopes, made.rates, strict=True):
                p.data -= r * left * slope.sign()
        else:
            for p, slope in zip(parameters, slopes, strict=True):
                p.grad = slope
            for entry, r in zip(adam.param_groups, made.rates, strict=True):
                entry["lr"] = r * left
            adam.step()
    return kept[0], kept[1]


def _through(codes: Tensor) -> Tensor:
    """Rounded, with the gradient of what is not."""
    return codes + (codes.round() - codes).detach()


def _offset(blocks: Tensor, scale: Tensor, steps: int, rate: float) -> Parametrisation:
    start = [torch.zeros_like(blocks), torch.ones_like(scale)]

    def form(parameters: list[Tensor]) -> tuple[Tensor, Tensor]:
        offset, share = parameters
        size = scale * share.clamp(0.1, 1.0)
        return size, blocks / size + offset

    return Parametrisation(start, form, [rate / max(steps, 1)] * 2, True)


def _divisor(blocks: Tensor, scale: Tensor, steps: int, rate: float) -> Parametrisation:
    start = [torch.zeros_like(scale), torch.zeros_like(blocks), torch.zeros_like(scale[:, :1])]

    def form(parameters: list[Tensor]) -> tuple[Tensor, Tensor]:
        share, each, row = parameters
        size = scale * share.exp()
        return size, blocks / (size * (each + row).exp())

    return Parametrisation(start, form, [3e-3 * rate] * 3, False)


def _free(blocks: Tensor, scale: Tensor, steps: int, rate: float) -> Parametrisation:
    start = [torch.zeros_like(blocks), torch.zeros_like(scale)]

    def form(parameters: list[Tensor]) -> tuple[Tensor, Tensor]:
        offset, size = parameters
        return scale * size.exp(), (blocks / scale + offset) / size.exp()

    return Parametrisation(start, form, [1e-2 * rate, 1e-3 * rate], False)


_parametrisations = {"offset": _offset, "divisor": _divisor, "free": _free}
