"""Second moments of what a matrix receives."""

import torch
from jaxtyping import Float
from torch import Tensor

from layerwise.core.method import method
from layerwise.core.stats import Probe, Seen
from layerwise.core.tokens import by_token

State = tuple[Tensor | None, int]


@method("measure", paper="arXiv:2210.17323")
def second_moment(*, weights: str = "") -> Probe:
    r"""Second moment of an input group: `H = (1/n) sum_t w_t x_t x_t^T`, `[in, in]`, in float32.

    Args:
        weights: a probe whose emitted values `[batch, seq]` weigh the tokens; every token counts 1
            without it, and where the rows are not the layer's tokens (an expert's share of them).

    Returns:
        A probe whose value per input group is `H`; what receives the same memory shares it.

    Example:
        >>> probe = second_moment()
        >>> seen = Seen(torch.tensor([[1.0, 2.0], [3.0, 0.0]]), None, None, None, {}, None)
        >>> probe.finish(probe.update(probe.init(""), seen))
        tensor([[5., 1.],
                [1., 2.]])

    Reference: Frantar et al., 2022, arXiv:2210.17323, with a mean over tokens and no factor 2.
    """

    def update(state: State, seen: Seen) -> State:
        found = seen.fed.get(weights)
        if found is None or seen.owners is None:
            return add_rows(state, seen.inputs)
        weight = found.reshape(-1)
        if len(weight) != len(seen.inputs) and seen.mask is not None:
            weight = weight[seen.mask.reshape(-1).bool()]
        return add_rows(state, seen.inputs.float() * weight[:, None] ** 0.5)

    def finish(state: State) -> Tensor:
        assert state[0] is not None
        return state[0] / max(state[1], 1)

    return Probe("input", lambda key: (None, 0), update, finish)


def add_rows(state: State, rows: Float[Tensor, "tokens in"]) -> State:
    """Add `rows^T rows` to the running sum."""
    x = rows.float()
    total = x.T @ x if state[0] is None else torch.addmm(state[0], x.T, x)
    return total, state[1] + len(x)


@method("measure", paper="arXiv:2504.09629")
def cross_moment() -> Probe:
    r"""What an input group misses of the unedited network, against what it receives.

    `C = (1/n) sum_t (x_t - x'_t) x'_t^T`, `[in, in]`, in float32: `x` comes from the unedited
    stream, `x'` from the edited one. Tokens that a router sends elsewhere in one of the two add
    nothing.

    Returns:
        A probe whose value per input group is `C`; 0 as long as nothing before it was edited.

    Example:
        >>> probe = cross_moment()
        >>> clean, edited = torch.tensor([[1.0], [2.0]]), torch.tensor([[1.0], [1.0]])
        >>> seen = Seen(edited, None, None, clean, {}, None)
        >>> probe.finish(probe.update(probe.init(""), seen))
        tensor([[0.5000]])

    Reference: Arai and Ichikawa, 2025, arXiv:2504.09629, the differences formed in float32.
    """

    def update(state: State, seen: Seen) -> State:
        x = seen.inputs.float()
        missed = torch.zeros_like(x) if seen.clean is None else seen.clean.float() - x
        total = missed.T @ x if state[0] is None else torch.addmm(state[0], missed.T, x)
        return total, state[1] + len(x)

    def finish(state: State) -> Tensor:
        assert state[0] is not None
        return state[0] / max(state[1], 1)

    return Probe("input", lambda key: (None, 0), update, finish, clean=True)


@method("measure", paper="arXiv:2503.01820", needs=("attention_received",))
def attended_moment() -> Probe:
    """Second moment of an input group in which tokens count by the attention they receive.

    Returns:
        A probe whose value per input group is `H`; the plain second moment where the layer has no
        attention, and where `attention_received` does not run beside it.

    Example:
        >>> probe, weights = attended_moment(), torch.tensor([[1.0, 1.0]])
        >>> fed = {"attention_received": weights}
        >>> rows = torch.tensor([[1.0, 2.0], [3.0, 0.0]])
        >>> seen = Seen(rows, None, None, None, fed, None, owners=torch.zeros(2))
        >>> probe.finish(probe.update(probe.init(""), seen))
        tensor([[5., 1.],
                [1., 2.]])

    Reference: Sung et al., 2025, arXiv:2503.01820.
    """
    return second_moment(weights="attention_received")


@method("measure", paper="arXiv:2306.00978")
def mean_magnitude() -> Probe:
    """Mean size of what an input group receives, channel by channel: `mean |x_i|`, `[in]`.

    Returns:
        A probe whose value per input group is a vector.

    Example:
        >>> probe = mean_magnitude()
        >>> seen = Seen(torch.tensor([[1.0, -2.0], [3.0, 0.0]]), None, None, None, {}, None)
        >>> probe.finish(probe.update(probe.init(""), seen))
        tensor([2., 1.])

    Reference: Lin et al., 2023, arXiv:2306.00978.
    """

    def update(state: State, seen: Seen) -> State:
        sizes = seen.inputs.float().abs().sum(0)
        return sizes if state[0] is None else state[0] + sizes, state[1] + len(seen.inputs)

    def finish(state: State) -> Tensor:
        assert state[0] is not None
        return state[0] / max(state[1], 1)

    return Probe("input", lambda key: (None, 0), update, finish)


@method("measure", paper="arXiv:2211.10438")
def largest_magnitude() -> Probe:
    """Largest size of what an input group receives, channel by channel: `max |x_i|`, `[in]`.

    Returns:
        A probe whose value per input group is a vector; one token decides it.

    Example:
        >>> probe = largest_magnitude()
        >>> seen = Seen(torch.tensor([[1.0, -2.0], [3.0, 0.0]]), None, None, None, {}, None)
        >>> probe.finish(probe.update(probe.init(""), seen))
        tensor([3., 2.])

    Reference: Xiao et al., 2022, arXiv:2211.10438.
    """

    def update(state: Tensor | None, seen: Seen) -> Tensor:
        sizes = seen.inputs.float().abs().amax(0)
        return sizes if state is None else torch.maximum(state, sizes)

    return Probe("input", lambda key: None, update, lambda state: state)


#: bins of a histogram of magnitudes, per octave and in all, from 2^-40 up
OCTAVE, BINS = 64, 64 * 80


@method("measure", paper="arXiv:2408.14690")
def magnitude_quantiles() -> Probe:
    """Sizes that every thousandth of the entries of an input group do not reach, within 1.1%.

    Returns:
        A probe whose value per input group is `[1001]`: at place `n` the magnitude below which
        `n / 1000` of all entries lie; 0 at place 0.

    Example:
        >>> probe, rows = magnitude_quantiles(), torch.arange(1.0, 101.0)[:, None]
        >>> seen = Seen(rows, None, None, None, {}, None)
        >>> found = probe.finish(probe.update(probe.init(""), seen))
        >>> bool(49 < found[500] < 52), len(found)
        (True, 1001)

    Reference: Liu et al., 2024, arXiv:2408.14690.
    """

    def update(state: Tensor | None, seen: Seen) -> Tensor:
        sizes = seen.inputs.detach().float().abs().clamp_min(2.0**-40)
        bins = ((sizes.log2() + 40) * OCTAVE).long().clamp(0, BINS - 1)
        counts = torch.bincount(bins.flatten(), minlength=BINS)
        return counts if state is None else state + counts

    def finish(counts: Tensor) -> Tensor:
        below = counts.double().cumsum(0)
        wanted = torch.linspace(0, 1, 1001, dtype=torch.float64, device=below.device) * below[-1]
        places = torch.searchsorted(below, wanted, right=True).clamp_max(BINS - 1)
        found = torch.exp2(places / OCTAVE - 40)
        found[0] = 0.0
        return found

    return Probe("input", lambda key: None, update, finish)


@method("measure")
def second_moment_diagonal() -> Probe:
    """Diagonal of the second moment, `mean x_i^2`, `[in]`: what an importance matrix holds.

    Returns:
        A probe whose value per input group is a vector.

    Example:
        >>> probe = second_moment_diagonal()
        >>> seen = Seen(torch.tensor([[1.0, 2.0], [3.0, 0.0]]), None, None, None, {}, None)
        >>> probe.finish(probe.update(probe.init(""), seen))
        tensor([5., 2.])
    """

    def update(state: State, seen: Seen) -> State:
        squares = seen.inputs.float().square().sum(0)
        return squares if state[0] is None else state[0] + squares, state[1] + len(seen.inputs)

    def finish(state: State) -> Tensor:
        assert state[0] is not None
        return state[0] / max(state[1], 1)

    return Probe("input", lambda key: (None, 0), update, finish)


@method("measure", paper="arXiv:2401.15024")
def stream_moment() -> Probe:
    """Second moment of the stream before a layer: `(1/n) sum_t x_t x_t^T`, `[dim, dim]`.

    Returns:
        A probe whose value per layer is the moment over all tokens that are no padding.

    Example:
        >>> probe = stream_moment()
        >>> x = torch.tensor([[[1.0, 2.0], [3.0, 0.0]]])
        >>> probe.finish(probe.update(probe.init(""), Seen(x, x, None, None, {}, None)))
        tensor([[5., 1.],
                [1., 2.]])

    Reference: Ashkboos et al., 2024, arXiv:2401.15024.
    """

    def update(state: State, seen: Seen) -> State:
        x = by_token(seen.inputs)
        rows = x.flatten(0, 1) if seen.mask is None else x[seen.mask.bool()]
        return add_rows(state, rows)

    def finish(state: State) -> Tensor:
        assert state[0] is not None
        return state[0] / max(state[1], 1)

    return Probe("layer", lambda key: (None, 0), update, finish)
