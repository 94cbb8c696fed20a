"""Feed-forward parts of several experts, of which a router chooses a few for every token."""

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from layerwise.core.adapters import truncated
from layerwise.core.errors import LayerwiseError
from layerwise.core.method import method
from layerwise.core.routing import mixture

#: name of a matrix and what it receives -> what is added to its output
Added = Callable[[str, Tensor], Tensor | float]


class FeedForward(nn.Module):
    """`f(x) = D (silu(G x) * U x)`."""

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.gate = nn.Linear(dim, width, bias=False)
        self.up = nn.Linear(dim, width, bias=False)
        self.down = nn.Linear(width, dim, bias=False)

    def forward(
        self, x: Float[Tensor, "*batch dim"], added: Added = lambda name, x: 0.0
    ) -> Float[Tensor, "*batch dim"]:
        """The part's output, with something added to that of every matrix."""
        gate = F.silu(self.gate(x) + added("gate", x))
        inner = gate * (self.up(x) + added("up", x))
        return self.down(inner) + added("down", inner)

    def matrices(self) -> dict[str, Tensor]:
        """The matrices by their names."""
        return {"gate": self.gate.weight, "up": self.up.weight, "down": self.down.weight}


class LowRankExpert(nn.Module):
    """A part that others have too, with `B A` of its own added to every matrix; `B` begins at 0."""

    def __init__(self, shared: FeedForward, rank: int) -> None:
        super().__init__()
        self.shared = shared
        self.a, self.b = nn.ParameterDict(), nn.ParameterDict()
        for name, weight in shared.matrices().items():
            out, width = weight.shape
            self.a[name] = nn.Parameter(torch.randn(rank, width) / width**0.5)
            self.b[name] = nn.Parameter(torch.zeros(out, rank))

    def added(self, name: str, x: Tensor) -> Tensor:
        """`B A x` of one matrix."""
        return x @ self.a[name].T @ self.b[name].T

    def forward(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        """The part's output."""
        return self.shared(x, self.added)


class MixtureSlot(nn.Module):
    """`y = s sum_e p_e f_e(x)` over the `active` experts with the largest `p = softmax(R x)`.

    With `mix` weights the sum is over what the experts add to the shared matrices, for every
    token: `y = f(x; W + s sum_e p_e B_e A_e)`. The two are the same for one expert. The constant
    `scale` is what makes gates begin at 1, or at shares of 1.
    """

    def __init__(
        self,
        experts: nn.ModuleList,
        dim: int,
        active: int,
        mix: Literal["outputs", "weights"] = "outputs",
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        if not 1 <= active <= len(experts):
            raise LayerwiseError(
                "slot, option 'active'",
                allowed=f"1 to {len(experts)} experts",
                found=active,
                fix="run fewer, or make more",
            )
        self.experts, self.active, self.mix, self.scale = experts, active, mix, scale
        self.router = nn.Linear(dim, len(experts), bias=False)
        #: `E sum_e m_e P_e` of the last call: the share of tokens whose first choice is an expert,
        #: times its mean weight; 1 where all are alike
        self.balance = torch.ones(())

    def forward(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        """The mixture's output."""
        scores = self.router(x)
        shares = scores.float().softmax(-1).flatten(0, -2)  # [tokens, experts]
        first = F.one_hot(shares.argmax(-1), len(self.experts)).float().mean(0)
        self.balance = len(self.experts) * (first * shares.mean(0)).sum()
        if self.mix == "outputs":
            y = mixture(x, scores, self.active, lambda e, rows: self.experts[e](rows))
            return self.scale * y
        kept = shares.topk(self.active)
        weights = torch.zeros_like(shares).scatter(1, kept.indices, self.scale * kept.values).to(x)
        rows = x.reshape(-1, x.shape[-1])  # [tokens, dim]

        def added(name: str, z: Tensor) -> Tensor:
            made = [expert.added(name, z) for expert in self.experts]  # type: ignore[operator]
            return torch.einsum("te,ted->td", weights, torch.stack(made, 1))

        first_expert: Any = self.experts[0]
        return first_expert.shared(rows, added).reshape(x.shape)


def merged(slot: MixtureSlot, rank: int) -> FeedForward:
    """One part in the place of low-rank experts: `W + P_r`, the nearest of `mean_e B_e A_e`.

    The products are averaged, not their factors; the mean has a rank up to `E r`.

    Args:
        slot: its experts share a part.
        rank: of the product, by singular values.

    Example:
        >>> from transformers import LlamaConfig
        >>> config = LlamaConfig(hidden_size=8, intermediate_size=16, num_attention_heads=2)
        >>> slot = low_rank_experts(config, count=2)
        >>> x = torch.randn(1, 3, 8)
        >>> torch.allclose(merged(slot, 4)(x), slot.experts[0](x), atol=1e-6)  # B is 0 as yet
        True
    """
    experts: list[Any] = list(slot.experts)
    own: FeedForward = experts[0].shared
    made = FeedForward(own.gate.in_features, own.gate.out_features)
    with torch.no_grad():
        for name, weight in own.matrices().items():
            mean = torch.stack([expert.b[name] @ expert.a[name] for expert in experts]).mean(0)
            made.matrices()[name].copy_(weight + truncated(mean, rank).dense())
    return made


@method("slot", aliases=("widenet",), paper="arXiv:2107.11817")
def expert_parts(config: Any, *, count: int = 4, active: int = 2, width: int = 0) -> MixtureSlot:
    """A feed-forward part of `count` experts, each of its own matrices.

    `y = E sum_e p_e f_e(x)`, `f_e(x) = D_e (silu(G_e x) * U_e x)`.

    Args:
        config: a configuration of transformers; its `hidden_size` and `intermediate_size`.
        count: how many experts there are.
        active: how many run for each token.
        width: neurons of an expert; 0 for the `intermediate_size` shared out over the active ones.

    Raises:
        LayerwiseError: more are active than there are.

    Example:
        >>> from transformers import LlamaConfig
        >>> config = LlamaConfig(hidden_size=8, intermediate_size=16, num_attention_heads=2)
        >>> slot = expert_parts(config, count=4)
        >>> slot(torch.randn(1, 3, 8)).shape
        torch.Size([1, 3, 8])

    Reference: Xue et al., 2021, arXiv:2107.11817, where one such part is shared by all layers, and
    only their norms are their own. Without noise and without a capacity that drops tokens; the
    factor `E` is ours: while a router knows nothing, the active experts are a part of full width.
    """
    width = width or config.intermediate_size // max(active, 1)
    experts = [FeedForward(config.hidden_size, width) for _ in range(count)]
    return MixtureSlot(nn.ModuleList(experts), config.hidden_size, active, scale=count)


@method("slot", aliases=("mixture_of_loras",), paper="arXiv:2512.12880")
def low_rank_experts(
    config: Any,
    *,
    count: int = 4,
    active: int = 2,
    rank: int = 8,
    mix: Literal["outputs", "weights"] = "outputs",
) -> MixtureSlot:
    """A feed-forward part whose experts share its matrices, and each add products of low rank.

    `y = s sum_e p_e f(x; W + B_e A_e)`, or with `mix` weights `y = f(x; W + s sum_e p_e B_e A_e)`,
    where `s = E / active`.

    Args:
        config: a configuration of transformers; its `hidden_size` and `intermediate_size`.
        count: how many experts there are.
        active: how many run for each token.
        rank: of what an expert adds to a matrix.
        mix: what the router's weights stand before.

    Raises:
        LayerwiseError: more are active than there are.

    Example:
        >>> from transformers import LlamaConfig
        >>> config = LlamaConfig(hidden_size=8, intermediate_size=16, num_attention_heads=2)
        >>> slot = low_rank_experts(config, rank=2)
        >>> slot(torch.randn(1, 3, 8)).shape
        torch.Size([1, 3, 8])

    Reference: Nouriborji, Rohanian and Rohanian, 2025, arXiv:2512.12880, whose mixture is of
    outputs; `merged` is its merge for inference, of products and not of factors. The factor `s` is
    ours: while a router knows nothing, the shares of the active experts sum to 1.
    """
    shared = FeedForward(config.hidden_size, config.intermediate_size)
    experts = [LowRankExpert(shared, rank) for _ in range(count)]
    scale = count / max(active, 1)
    return MixtureSlot(nn.ModuleList(experts), config.hidden_size, active, mix, scale)
