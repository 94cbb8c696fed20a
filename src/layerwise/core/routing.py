"""A feed-forward part whose neurons lie in experts, of which each token runs a few.

An expert is a slice of the neurons, so the experts of a part are its own matrices, cut, and all of
them together are the dense part.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from layerwise.core.errors import LayerwiseError
from layerwise.core.instead import holding, tensor_of
from layerwise.core.stack import Layer


@dataclass(frozen=True)
class Routed:
    """Scores `R x + b` of experts, and how many of them each token runs."""

    router: Float[Tensor, "experts dim"]
    bias: Float[Tensor, " experts"]
    active: int

    def scores(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch experts"]:
        """What the router says of every token."""
        return x @ self.router.T + self.bias

    def tensors(self) -> dict[str, Tensor]:
        """The record as it is stored."""
        return {"router": self.router, "bias": self.bias, "active": torch.tensor([self.active])}


class Neurons(NamedTuple):
    """The neurons of a part: its module in the layer, and where they lie in its parameters.

    `down` is the parameter that reads them.
    """

    module: str
    size: int
    axes: Mapping[str, int]
    down: str


def neurons_of(layer: Layer) -> Neurons:
    """Where the neurons of a layer's feed-forward part lie.

    Raises:
        LayerwiseError: it has none that is one module with matrices up, perhaps gate, and down.
    """
    for part in layer.parts:
        mine = [m for m in layer.matrices if m.part == part.name]
        down = next((m for m in mine if m.role == "down"), None)
        if part.mixes or len(part.modules) != 1 or down is None or down.expert is not None:
            continue
        axes = {m.parameter: int(m.transposed == (m is not down)) for m in mine}
        if any(m is not down and m.shape[0] != down.shape[1] for m in mine):
            continue
        known = dict(layer.module.named_parameters())
        stems = [m.parameter.rpartition(".")[0] for m in mine if m is not down]
        axes |= {f"{stem}.bias": 0 for stem in stems if f"{stem}.bias" in known}
        root = f"{part.modules[0]}."
        if all(name.startswith(root) for name in axes):
            own = {name.removeprefix(root): axis for name, axis in axes.items()}
            return Neurons(part.modules[0], down.shape[1], own, down.parameter.removeprefix(root))
    raise LayerwiseError(
        f"experts of {layer.key}",
        allowed="a feed-forward part in one module, with matrices up, perhaps gate, and down",
        found=", ".join(f"{m.part}.{m.role}" for m in layer.matrices[:12]),
        fix="convert layers that have one",
    )


def mixture(
    x: Float[Tensor, "*batch dim"],
    scores: Float[Tensor, "*batch experts"],
    active: int,
    expert: Callable[[int, Tensor], Tensor],
    gated: bool = True,
) -> Float[Tensor, "*batch dim"]:
    """`y = sum_e p_e f_e(x)` over the `active` experts with the largest `p = softmax(scores)`.

    Args:
        x: tokens.
        scores: of the experts for every token.
        active: how many run for each token.
        expert: number and rows `[tokens, dim]` -> what it makes of them.
        gated: `p_e` before every `f_e`; else 1.

    Example:
        >>> scores = torch.tensor([[0.0, 5.0, 9.0]])
        >>> mixture(torch.ones(1, 2), scores, 2, lambda e, rows: 10**e * rows, gated=False)
        tensor([[110., 110.]])
    """
    rows = x.reshape(-1, x.shape[-1])  # [tokens, dim]
    shares = scores.reshape(len(rows), -1).float().softmax(-1)
    gates, chosen = shares.topk(active)
    total = rows.new_zeros(rows.shape)
    for e in range(shares.shape[1]):
        token, place = (chosen == e).nonzero(as_tuple=True)
        if len(token):
            made = expert(e, rows[token])
            made = gates[token, place, None].to(made) * made if gated else made
            total = total.index_add(0, token, made)
    return total.reshape(x.shape)


@dataclass
class Mixed:
    """A feed-forward module of which each token runs the slices that its router chooses."""

    module: nn.Module
    forward: Callable[..., Tensor]
    routed: Routed
    neurons: Neurons

    def __call__(self, x: Tensor) -> Tensor:
        """The module's output."""
        scores, active = self.routed.scores(x), self.routed.active
        return mixture(x, scores, active, self.expert, gated=False)

    def expert(self, number: int, rows: Tensor) -> Tensor:
        """What one slice of the neurons makes of some tokens."""
        width = self.neurons.size // len(self.routed.router)
        slices = {}
        for name, axis in self.neurons.axes.items():
            slices[name] = tensor_of(self.module, name).narrow(axis, number * width, width)
        with holding(self.module, slices), _as_wide(self.module, self.neurons.size, width):
            return self.forward(rows)


@contextmanager
def _as_wide(module: nn.Module, size: int, width: int) -> Iterator[None]:
    """Let modules that note how many neurons they have note fewer."""
    notes = [
        (vars(inner), name)
        for inner in module.modules()
        for name, value in vars(inner).items()
        if type(value) is int and value == size
    ]
    try:
        for held, name in notes:
            held[name] = width
        yield
    finally:
        for held, name in notes:
            held[name] = size


def route(layer: Layer, routed: Routed) -> None:
    """Let the feed-forward part of a layer run as a mixture.

    Raises:
        LayerwiseError: it cannot be cut into so many experts, or the router has another width.
    """
    neurons = neurons_of(layer)
    module = layer.module.get_submodule(neurons.module)
    experts, dim = routed.router.shape
    width = next(m.shape[1] for m in layer.matrices if m.part != "other" and m.role == "up")
    whole = neurons.size % experts == 0 and len(routed.bias) == experts
    if not whole or dim != width or not 1 <= routed.active <= experts:
        raise LayerwiseError(
            f"experts of {layer.key}",
            allowed=f"a router of {width} inputs, for a number of experts that divides "
            f"{neurons.size}, of which at least one is active",
            found=f"{experts} experts of {dim} inputs, {routed.active} active",
            fix="choose another number of experts",
        )
    place: dict[str, Any] = vars(module)
    if "forward" not in place:
        place["forward"] = Mixed(module, module.forward, routed, neurons)
