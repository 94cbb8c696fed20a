"""Scores of fusion groups: what a trial edit costs, measured, or told by gradients or inputs.

Each comes with the relative squared error of the trial, to which its value is proportional.
"""

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from layerwise.core.method import find, method
from layerwise.core.plan import Step, label
from layerwise.core.stack import Group, Stack
from layerwise.core.stats import Scores, Stats

#: chains by group, for each trial -> (KL in nats per token, relative squared error) of each
Evaluate = Callable[[Sequence[Mapping[str, tuple[Step, ...]]]], list[tuple[float, float]]]
#: a matrix's weight, its group and the chain of a trial -> what the trial makes of it
Tried = Callable[[Tensor, Mapping[str, Tensor], tuple[Step, ...]], Tensor]


def _chain(trial: str, bits: int, group: int, share: float = 0.5) -> tuple[Step, ...]:
    """The trial, with as much of the setting as it knows."""
    known = find(trial, "weight").options
    setting = {"bits": bits, "group": group, "share": share}
    return (Step(trial, {key: value for key, value in setting.items() if key in known}),)


@method("score", aliases=("kl",))
def sensitivity(
    stack: Stack,
    stats: Stats,
    *,
    evaluate: Evaluate,
    trial: str = "rtn",
    bits: int = 3,
    group: int = 64,
    share: float = 0.5,
) -> Scores:
    """Measured KL of a trial edit, one group at a time, the rest of the model as it is.

    Args:
        stack: the layers.
        stats: not used.
        evaluate: given; for each trial, chains per group, (KL in nats per token, relative squared
            error).
        trial: the method that is tried.
        bits: of the trial.
        group: columns of the trial that share a scale.
        share: what a trial that removes weights or ranks keeps.

    Returns:
        One score per fusion group, in nats, with the error that gave rise to it.
    """
    chain = _chain(trial, bits, group, share)
    keys = [member.key for member in stack.groups()]
    found = dict(zip(keys, evaluate([{key: chain} for key in keys]), strict=True))
    values = {key: kl for key, (kl, _) in found.items()}
    errors = {key: error for key, (_, error) in found.items()}
    return Scores(values, "group", f"sensitivity to {label(chain)}", errors)


@method("score", aliases=("higgs_alpha",), paper="arXiv:2411.17525")
def linearity(
    stack: Stack,
    stats: Stats,
    *,
    evaluate: Evaluate,
    trial: str = "rtn",
    bits: tuple[int, ...] = (3, 4, 5),
    group: int = 64,
) -> Scores:
    r"""Slope of the measured KL over the relative error, fitted through the origin.

    `alpha_g = sum_b t_gb^2 D_gb / sum_b t_gb^4`, where `D_gb` is the KL when group `g` alone is
    at `b` bits and `t_gb^2` its relative squared error.

    Args:
        stack: the layers.
        stats: not used.
        evaluate: given, see `sensitivity`.
        trial: the method that is tried.
        bits: of the trials; the KL is linear in the error at medium bits.
        group: columns of a trial that share a scale.

    Returns:
        One slope per fusion group, in nats per unit of error.

    Reference: Malinovskii et al., 2024, arXiv:2411.17525, who regress on the error of the grid,
    the same for all matrices; here it is that of the matrix.
    """
    keys = [member.key for member in stack.groups()]
    trials = [(key, width) for key in keys for width in bits]
    found = evaluate([{key: _chain(trial, width, group)} for key, width in trials])
    rows: dict[str, list[tuple[float, float]]] = {key: [] for key in keys}
    for (key, _), row in zip(trials, found, strict=True):
        rows[key].append(row)
    values = {key: slope(row) for key, row in rows.items()}
    return Scores(values, "group", f"linearity of {trial}", dict.fromkeys(keys, 1.0))


def slope(rows: Sequence[tuple[float, float]]) -> float:
    """Of (rise, error) through the origin, by least squares.

    Example:
        >>> slope([(0.02, 0.01), (0.08, 0.04)])
        2.0
    """
    below = sum(error**2 for _, error in rows)
    return sum(rise * error for rise, error in rows) / below if below else 0.0


@method("score", aliases=("augmented_hessian",), paper="arXiv:2306.04879")
def interactions(
    stack: Stack,
    stats: Stats,
    *,
    evaluate: Evaluate,
    trial: str = "rtn",
    bits: int = 3,
    group: int = 64,
    reach: int = 0,
) -> Scores:
    r"""Measured KL of every group, and of pairs of groups beyond the sum of both.

    `s_i = L(i) + 1/2 sum_j (L(i, j) - L(i) - L(j))` over the groups `j` of the same layer, and of
    the next `reach` layers on both sides. Two halves of a pair's term make the scores of both add
    up to what both together cost; errors that cancel make it negative.

    Args:
        stack: the layers.
        stats: not used.
        evaluate: given, see `sensitivity`.
        trial: the method that is tried.
        bits: of the trials.
        group: columns of a trial that share a scale.
        reach: how many layers further pairs are looked for.

    Returns:
        One score per fusion group, in nats.

    Reference: Schaefer et al., 2023, arXiv:2306.04879, who published no code; the pair term is
    measured here, where they take it from a Hessian.
    """
    chain = _chain(trial, bits, group)
    groups = stack.groups()
    keys = [member.key for member in groups]
    near = [
        (a.key, b.key)
        for i, a in enumerate(groups)
        for b in groups[i + 1 :]
        if abs(_layer(a) - _layer(b)) <= reach
    ]
    found = evaluate([*({key: chain} for key in keys), *({a: chain, b: chain} for a, b in near)])
    alone = {key: kl for key, (kl, _) in zip(keys, found, strict=False)}
    values = dict(alone)
    for (a, b), (both, _) in zip(near, found[len(keys) :], strict=True):
        term = both - alone[a] - alone[b]
        values[a] += term / 2
        values[b] += term / 2
    errors = {key: error for key, (_, error) in zip(keys, found, strict=False)}
    return Scores(values, "group", f"interactions under {trial} at {bits} bits", errors)


def _layer(group: Group) -> int:
    return int(group.matrices[0].layer.rpartition("/")[2])


@method("score", aliases=("gradient_error",))
def fisher(
    stack: Stack,
    stats: Stats,
    *,
    fetch: Callable[[str], Mapping[str, Tensor]],
    squares: Callable[[], Mapping[str, Tensor]],
    tried: Tried,
    trial: str = "rtn",
    bits: int = 3,
    group: int = 64,
) -> Scores:
    r"""Predicted KL of a trial edit, from squared gradients: no trial is run.

    `1/2 sum F (W - Q(W))^2`, where `F` is the mean over documents of `T g^2`, `g` the gradient of
    the mean loss of its `T` tokens: the diagonal of the empirical Fisher information.

    Args:
        stack: the layers.
        stats: not used.
        fetch: given; the matrices `[out, in]` of a layer by their key.
        squares: given; `F` of every matrix by its key.
        tried: given; what a chain makes of a weight.
        trial: the method that is tried.
        bits: of the trial.
        group: columns of the trial that share a scale.

    Returns:
        One score per fusion group, in nats, with the relative error of its trial.
    """
    chain, found = _chain(trial, bits, group), squares()

    def cost(key: str, weight: Tensor, error: Tensor) -> float:
        return 0.5 * (found[key] * error.square()).sum().item()

    values, errors = _told(stack, fetch, tried, chain, cost)
    return Scores(values, "group", f"fisher of {trial} at {bits} bits", errors)


@method("score", aliases=("baq",), paper="arXiv:2506.05664", needs=("second_moment",))
def trial_error(
    stack: Stack,
    stats: Stats,
    *,
    fetch: Callable[[str], Mapping[str, Tensor]],
    tried: Tried,
    trial: str = "gptq",
    bits: int = 3,
    group: int = 64,
) -> Scores:
    r"""Squared error of the output under a trial edit: `tr(E H E^T)`, with `E = W - Q(W)`.

    Not in nats: it says how a layer's own output suffers, not what that does to the model.

    Args:
        stack: the layers.
        stats: with `second_moment` per input group.
        fetch: given; the matrices `[out, in]` of a layer by their key.
        tried: given; what a chain makes of a weight.
        trial: the method that is tried.
        bits: of the trial.
        group: columns of the trial that share a scale.

    Returns:
        One score per fusion group, with the relative error of its trial.

    Reference: Zhang et al., 2025, arXiv:2506.05664, who measure the loss of columns by a GPTQ pass
    and share bits out among the columns of a matrix; no engine stores columns of different widths,
    so groups of matrices get them here.
    """
    moments = stats.values.get("second_moment", {})
    inputs = {m.key: m.inputs for m in stack.matrices()}

    def cost(key: str, weight: Tensor, error: Tensor) -> float:
        moment = moments.get(inputs[key])
        product = error if moment is None else error @ moment.float()
        return (product * error).sum().item()

    chain = _chain(trial, bits, group)
    values, errors = _told(stack, fetch, tried, chain, cost, moments)
    return Scores(values, "group", f"trial_error under {trial} at {bits} bits", errors)


def _told(
    stack: Stack,
    fetch: Callable[[str], Mapping[str, Tensor]],
    tried: Tried,
    chain: tuple[Step, ...],
    cost: Callable[[str, Tensor, Tensor], float],
    moments: Mapping[str, Tensor] = {},
) -> tuple[dict[str, float], dict[str, float]]:
    """What a trial costs every group by a rule, and its relative squared error."""
    values: dict[str, float] = {}
    errors: dict[str, float] = {}
    for layer in stack.layers:
        weights = fetch(layer.key)
        above: dict[str, float] = {}
        below: dict[str, float] = {}
        for matrix in layer.matrices:
            weight, moment = weights[matrix.key], moments.get(matrix.inputs)
            stats = {} if moment is None else {"second_moment": moment}
            error = tried(weight, stats, chain).float() - weight.float()
            key = matrix.fusion
            values[key] = values.get(key, 0.0) + cost(matrix.key, weight, error)
            above[key] = above.get(key, 0.0) + error.square().sum().item()
            below[key] = below.get(key, 0.0) + weight.float().square().sum().item()
        errors |= {key: above[key] / max(below[key], 1e-300) for key in above}
    keys = [member.key for member in stack.groups()]
    return {key: values[key] for key in keys}, {key: errors[key] for key in keys}
