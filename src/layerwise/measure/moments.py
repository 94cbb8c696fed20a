"""Second moments of what a matrix receives."""

import torch
from jaxtyping import Float
from torch import Tensor

from layerwise.core.method import method
from layerwise.core.stats import Probe, Seen

State = tuple[Tensor | None, int]


@method("measure", paper="arXiv:2210.17323")
def second_moment(*, weights: str = "") -> Probe:
    r"""Second moment of an input group: `H = (1/n) sum_t w_t x_t x_t^T`, `[in, in]`, in float32.

    Args:
        weights: a probe whose emitted values weigh the tokens; every token counts 1 without it.

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
        weight = seen.fed[weights].reshape(-1, 1) if weights else 1.0
        return add_rows(state, seen.inputs.float() * weight**0.5)

    def finish(state: State) -> Tensor:
        assert state[0] is not None
        return state[0] / max(state[1], 1)

    return Probe("input", lambda key: (None, 0), update, finish)


def add_rows(state: State, rows: Float[Tensor, "tokens in"]) -> State:
    """Add `rows^T rows` to the running sum."""
    x = rows.float()
    total = x.T @ x if state[0] is None else torch.addmm(state[0], x.T, x)
    return total, state[1] + len(x)


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
