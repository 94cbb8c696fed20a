"""Steps before a solver: they change what it is to meet, or what it sees of the inputs."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from layerwise.core.errors import LayerwiseError
from layerwise.core.method import method
from layerwise.core.rotation import rotated
from layerwise.core.weight import Dense, Rotated, Scaled, in_groups
from layerwise.edit.weight._grid import check_bits
from layerwise.edit.weight._solve import row_errors
from layerwise.edit.weight.rtn import rtn


@method("weight", paper="arXiv:2504.09629", needs=("second_moment", "cross_moment"), by_rows=True)
def qep(
    weight: Float[Tensor, "out in"],
    stats: Mapping[str, Any],
    *,
    alpha: float = 0.5,
    damping: float = 1.0,
) -> Dense:
    r"""Correct a weight for what the edits before it did to its inputs.

    `W + alpha W C (H + d I)^-1` with `H` of the edited stream and `C` what that stream misses of
    the unedited one: at `alpha` 1 and without damping the least-squares fit of the old outputs.

    Args:
        weight: `[out, in]`.
        stats: `second_moment` and `cross_moment`; without them nothing changes.
        alpha: how much of the correction; 0 changes nothing.
        damping: `d` as a share of the mean of the diagonal.

    Returns:
        The corrected weight, for a solver to round.

    Raises:
        LayerwiseError: `damping` is negative, or `H` is singular without it.

    Example:
        >>> stats = {"second_moment": torch.tensor([[2.0]]), "cross_moment": torch.tensor([[1.0]])}
        >>> qep(torch.tensor([[2.0]]), stats, alpha=0.5, damping=0.0).dense()
        tensor([[2.5000]])

    Reference: Arai and Ichikawa, 2025, arXiv:2504.09629: `damping` 1 is that of the paper's code,
    the authors' later package has 0.01. Theirs leaves out the matrices that write into the stream
    from the MLP (leave them out of the plan's selector) and clears the weights of inputs that are
    always 0; here those stay.
    """
    moment, cross = stats.get("second_moment"), stats.get("cross_moment")
    if damping < 0:
        raise LayerwiseError(
            "qep, option 'damping'", allowed="0 or more", found=damping, fix="choose another"
        )
    if moment is None or cross is None or alpha == 0 or not cross.any():
        return Dense(weight)
    hessian = moment.double()
    mean = hessian.diagonal().mean()
    dead = hessian.diagonal() <= 0
    hessian = hessian + torch.diag(damping * mean + dead.double() * mean)
    lower, failed = torch.linalg.cholesky_ex(hessian)
    if failed or not cross.isfinite().all():
        raise LayerwiseError(
            "qep, second_moment and cross_moment",
            allowed="finite numbers, symmetric and positive definite once damped",
            found=f"a factorisation that fails at column {int(failed)}",
            fix="raise qep.damping, or calibrate on more or other text",
        )
    pull = weight.double() @ cross.double()
    return Dense((weight + alpha * torch.cholesky_solve(pull.T, lower).T).to(weight.dtype))


@method(
    "weight",
    paper="arXiv:2503.01820",
    needs=("attention_received", "attended_moment"),
    gives={"second_moment": "attended_moment"},
    by_rows=True,
)
def token_importance(weight: Float[Tensor, "out in"], stats: Mapping[str, Any]) -> Dense:
    """Let the steps that follow count tokens by the attention that they receive.

    The second moment that they are shown is `sum_t r_t x_t x_t^T`, see `attention_received`.

    Args:
        weight: `[out, in]`.
        stats: not used.

    Returns:
        The weight as it is.

    Example:
        >>> token_importance(torch.ones(1, 2), {}).dense()
        tensor([[1., 1.]])

    Reference: Sung et al., 2025, arXiv:2503.01820 (RSQ is rotate, token_importance, gptq).
    """
    return Dense(weight)


@method("weight", paper="arXiv:2404.00456", aliases=("hadamard",), by_rows=True)
def rotate(
    weight: Float[Tensor, "out in"],
    stats: Mapping[str, Any],
    *,
    block: int = 1024,
    seed: int = 0,
) -> Rotated:
    """Mix the columns of a matrix by an orthogonal matrix; the steps that follow round the mixture.

    `W' = W D H` with random signs `D` and Hadamard matrices `H` in blocks of columns, and moments
    accordingly. The record undoes it: only the rounding changes what is computed. A width that is
    no multiple of the block is made up of smaller powers of two.

    Args:
        weight: `[out, in]`.
        stats: not used.
        block: columns that are mixed at most; 1 mixes none.
        seed: of the signs; negative for none.

    Returns:
        The rotated weight in a frame that rotates it back; a bit per column is stored.

    Raises:
        LayerwiseError: `block` is not positive.

    Example:
        >>> record = rotate(torch.tensor([[8.0, 0.0, 0.0, 0.0]]), {}, seed=-1)
        >>> record.inner.dense(), record.dense()
        (tensor([[4., 4., 4., 4.]]), tensor([[8., 0., 0., 0.]]))

    Reference: Ashkboos et al., 2024, arXiv:2404.00456, inside one matrix: their rotation is folded
    into its neighbours and costs nothing at run time; this one is undone in the weight that is
    written, or must be done on the inputs by an engine that knows it.
    """
    if block < 1:
        raise LayerwiseError(
            "rotate, option 'block'", allowed="1 or more", found=block, fix="choose another"
        )
    columns = weight.shape[1]
    signs = torch.zeros(columns, dtype=torch.bool)
    if seed >= 0:
        generator = torch.Generator().manual_seed(seed)
        signs = torch.randint(0, 2, (columns,), generator=generator).bool()
    signs = signs.to(weight.device)
    return Rotated(Dense(rotated(weight, signs, block).to(weight.dtype)), signs, block)


@method("weight", paper="arXiv:2306.00978", needs=("second_moment",))
def scale_channels(
    weight: Float[Tensor, "out in"],
    stats: Mapping[str, Any],
    *,
    bits: int = 4,
    group: int = 128,
    symmetric: bool = True,
    shrink: bool = False,
    points: int = 20,
) -> Scaled:
    r"""Scale columns that large inputs meet up, so that they lose less when the weight is rounded.

    `W' = W diag(s)`, `s = rms(x)^rho`, with the one `rho` of `0, 1/points, ... 1 - 1/points` at
    which `tr(E H E^T)` is least when `W'` is rounded to nearest. The record divides by `s` again.

    Args:
        weight: `[out, in]`.
        stats: `second_moment` of the inputs, `[in, in]`; without it nothing changes.
        bits: of the rounding that the search tries; those of the step that follows.
        group: columns that share a scale in it.
        symmetric: no zero points in it.
        shrink: search a smaller range per group in it.
        points: exponents to try; 1 leaves the weight as it is.

    Returns:
        The scaled weight in a frame that divides again; a number per column is stored.

    Raises:
        LayerwiseError: `bits`, `group` or `points` are out of range.

    Example:
        >>> w, h = torch.tensor([[0.3, -1.0, 0.8, 0.1]]), torch.diag(torch.tensor([81.0, 1, 1, 1]))
        >>> record = scale_channels(w, {"second_moment": h}, bits=3, symmetric=False)
        >>> record.scale[0] / record.scale[1]
        tensor(1.7321)

    Reference: Lin et al., 2023, arXiv:2306.00978. Theirs goes by mean |x|, measures the module that
    reads the inputs, and folds `s` into what produces them, so that it costs nothing at run time;
    ours goes by the root mean square, measures the matrix itself, and writes the result divided
    again. Their search for a smaller range is `shrink` of the step that follows.
    """
    check_bits("scale_channels", bits, group)
    if points < 1:
        raise LayerwiseError(
            "scale_channels, option 'points'", allowed="1 or more", found=points, fix="raise it"
        )
    moment = stats.get("second_moment")
    ones = torch.ones(weight.shape[1], dtype=weight.dtype, device=weight.device)
    best = Scaled(Dense(weight), ones)
    if moment is None:
        return best
    size, least = moment.float().diagonal().clamp_min(0).sqrt(), None
    size = size / size.max().clamp_min(1e-30)
    options = {"bits": bits, "group": group, "symmetric": symmetric, "shrink": shrink}
    for step in range(points):
        scale = _evened(size, step / points).to(weight.dtype) if step else ones
        frame = Scaled(Dense((weight * scale).to(weight.dtype)), scale)
        rounded = Scaled(rtn(frame.inner.dense(), {}, **options), scale)
        error = row_errors(rounded.dense() - weight.float(), moment).sum()
        if least is None or error < least:
            best, least = frame, error
    return best


@method("weight", needs=("second_moment",), paper="arXiv:2306.00978", by_rows=True)
def clip(
    weight: Float[Tensor, "out in"],
    stats: Mapping[str, Any],
    *,
    bits: int = 4,
    group: int = 128,
    symmetric: bool = True,
    least: float = 0.5,
) -> Dense:
    r"""Cut off the largest weights of a group where a finer grid for the others is worth it.

    `W' = clamp(W, -c m, c m)`, `m = max |w|` of a row's group, with the one `c` of
    `1, 0.95, ... > least` at which `e^T H_gg e` is least: `e` is what rounding `W'` to nearest
    leaves of `W` in the group, `H_gg` the second moment of its inputs.

    Args:
        weight: `[out, in]`.
        stats: `second_moment` of the inputs, `[in, in]`; without it the identity is taken.
        bits: of the rounding that the search tries; those of the step that follows.
        group: columns that share a scale in it.
        symmetric: no zero points in it.
        least: share of the largest weight that stays at least; 1 changes nothing.

    Returns:
        The weight, for a solver to round.

    Raises:
        LayerwiseError: `bits`, `group` or `least` are out of range.

    Example:
        >>> w = torch.tensor([[1.0, 0.45, -0.45, 0.45, 0.45, -0.45]])
        >>> h = torch.diag(torch.tensor([0.01, 1.0, 1.0, 1.0, 1.0, 1.0]))
        >>> clip(w, {"second_moment": h}, bits=2, group=0).dense().max() < 1
        tensor(True)

    Reference: Lin et al., 2023, arXiv:2306.00978, whose code does so after scaling, for all but
    queries and keys. The error counted is that of the group alone.
    """
    check_bits("clip", bits, group)
    if not 0 <= least <= 1:
        raise LayerwiseError(
            "clip, option 'least'", allowed="0 to 1", found=least, fix="choose another"
        )
    width = group or weight.shape[1]
    blocks = in_groups(weight.float(), width)  # [out, groups, width]
    moment = stats.get("second_moment")
    squares = torch.eye(weight.shape[1]) if moment is None else moment.float()
    squares = in_groups(squares.to(weight.device), width)  # [in, groups, width]
    pieces = in_groups(squares.flatten(1).T, width)  # [groups * width, groups, width]
    count = blocks.shape[1]
    own = pieces.reshape(count, width, count, width).diagonal(dim1=0, dim2=2).movedim(-1, 0)
    top, best, loss = blocks.abs().amax(-1, keepdim=True), blocks, None
    for step in range(math.ceil((1 - least) * 20) or 1):
        cut = torch.maximum(torch.minimum(blocks, top * (1 - step / 20)), top * (step / 20 - 1))
        flat = cut.flatten(1)[:, : weight.shape[1]].to(weight.dtype)
        kept = rtn(flat, {}, bits=bits, group=group, symmetric=symmetric).dense()
        error = in_groups(kept - weight.float(), width)
        found = torch.einsum("ogv,gvw,ogw->og", error, own, error)[..., None]
        best = cut if loss is None else torch.where(found < loss, cut, best)
        loss = found if loss is None else torch.minimum(found, loss)
    return Dense(best.flatten(1)[:, : weight.shape[1]].to(weight.dtype).contiguous())


def _evened(size: Tensor, power: float) -> Tensor:
    """`size ** power`, the largest the inverse of the smallest; inputs that are never used at 1."""
    live = size > 0
    found = torch.where(live, size, torch.ones_like(size)).pow(power).clamp_min(1e-4)
    own = found[live] if live.any() else found
    return torch.where(live, found / (own.max() * own.min()).sqrt(), torch.ones_like(found))
