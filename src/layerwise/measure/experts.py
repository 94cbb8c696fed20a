"""What every expert of a layer was asked for, and what it gave."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from layerwise.core.method import method
from layerwise.core.stats import Probe, Seen


class Routed(NamedTuple):
    """A call of a module of experts: its tokens, and the experts and gates of each of them."""

    module: nn.Module
    x: Float[Tensor, "tokens dim"]
    chosen: Int[Tensor, "tokens active"]
    gates: Float[Tensor, "tokens active"]

    def apart(self) -> Float[Tensor, "tokens active dim"]:
        """What each expert of a token adds to the output, gate included: the sum, taken apart."""
        tokens, active = self.chosen.shape
        rows = self.x.flatten(0, -2).repeat_interleave(active, 0)  # [tokens * active, dim]
        rows = rows[(None,) * (self.x.ndim - 2)]  # as many axes as the module is used to
        gave = self.module.forward(rows, self.chosen.reshape(-1, 1), self.gates.reshape(-1, 1))
        return gave.reshape(tokens, active, -1)


@contextmanager
def routed_calls() -> Iterator[list[Routed]]:
    """The calls of modules that get tokens, and as many whole numbers as weights for each."""
    found: list[Routed] = []

    def note(module: nn.Module, args: tuple) -> None:
        if len(args) != 3 or not all(isinstance(a, Tensor) and a.ndim > 1 for a in args):
            return
        x, chosen, gates = args
        whole = not chosen.is_floating_point() and gates.is_floating_point()
        if whole and chosen.shape == gates.shape == (x.shape[:-1].numel(), gates.shape[-1]):
            found.append(Routed(module, x, chosen, gates))

    hook = register_module_forward_pre_hook(note)
    try:
        yield found
    finally:
        hook.remove()


@method("measure", paper="arXiv:2510.13999")
def expert_use() -> Probe:
    r"""How many tokens came to every expert of a layer, and how much it gave them.

    `n_e`, `sum_t g_e(x_t) ||f_e(x_t)||` and `sum_t ||f_e(x_t)||` over the tokens that are routed
    to expert `e`, with the gate `g` that its output is multiplied by. The layer is replayed on what
    it is about to receive, and its experts once more, each for itself.

    Returns:
        A probe whose value per layer is `[experts, 3]`, up to the last expert that a token came to;
        without rows where a layer has no experts that stock code calls with tokens, numbers of
        experts and gates.

    Example:
        >>> double = lambda x, chosen, gates: gates * (1 + chosen) * x
        >>> module = nn.Identity()
        >>> module.forward = double
        >>> chosen, gates = torch.tensor([[0, 1]]), torch.tensor([[0.75, 0.25]])
        >>> counted(Routed(module, torch.tensor([[3.0, 4.0]]), chosen, gates), None)
        tensor([[ 1.0000,  3.7500,  5.0000],
                [ 1.0000,  2.5000, 10.0000]], dtype=torch.float64)

    Reference: Lasby et al., 2025, arXiv:2510.13999.
    """

    def update(state: Tensor, seen: Seen) -> Tensor:
        assert seen.replay is not None
        with routed_calls() as calls:
            seen.replay()
        for call in calls:
            state = _sum(state, counted(call, seen.mask))
        return state

    return Probe("call", lambda key: torch.zeros(0, 3), update, lambda state: state)


def counted(call: Routed, mask: Tensor | None) -> Float[Tensor, "experts columns"]:
    """Tokens, weighted norms and norms of the experts of one call; masked tokens do not count."""
    gates = call.gates.double().abs()
    weighted = call.apart().double().norm(dim=-1)
    rows = torch.stack([torch.ones_like(weighted), weighted, weighted / gates], -1)
    rows = rows.masked_fill((gates == 0)[..., None], 0.0)  # an expert that was not asked
    if mask is not None and mask.numel() == len(rows):
        rows = rows * mask.reshape(-1, 1, 1)
    total = rows.new_zeros(int(call.chosen.max()) + 1, 3)
    return total.index_add(0, call.chosen.flatten(), rows.flatten(0, 1)).cpu()


def _sum(one: Tensor, two: Tensor) -> Tensor:
    """The sum of two tables, of which one may have fewer rows."""
    rows = max(len(one), len(two))
    pad = torch.nn.functional.pad
    first, second = (pad(t.double(), (0, 0, 0, rows - len(t))) for t in (one, two))
    return first + second
