"""A feed-forward part learns to give with a few of its neurons what it gave with all."""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from layerwise.core.instead import holding, tensor_of
from layerwise.core.plan import Experts
from layerwise.core.routing import Mixed, Routed, neurons_of
from layerwise.core.stack import Layer

#: tokens on which errors of what was trained on are told
TOLD = 2048


class Fitted(NamedTuple):
    """What came of a part, by names inside its layer.

    `covered` is the mean weight of the `k` first experts of a token, and `errors` are those of
    the output, of tokens trained on and of others, relative to its square; both for every `k`.
    """

    module: str
    tensors: dict[str, Tensor]
    router: Tensor
    covered: Float[Tensor, " experts"]
    errors: list[tuple[float, float]]


def fit_experts(
    layer: Layer,
    seen: Float[Tensor, "tokens dim"],
    held: Float[Tensor, "others dim"],
    how: Experts,
    active: int,
    dtype: torch.dtype,
    seed: int = 0,
) -> Fitted:
    """Cut a part into experts, and train these and a router: `min |M(x) - FFN(x)|^2 / |FFN(x)|^2`.

    The experts begin as slices of the neurons, and the router with nearly nothing. In every step
    tokens run `active` experts, one more, or one less. Without steps all experts together are the
    dense part.

    Args:
        layer: with its weights in float32; it is not changed.
        seen: what comes to the part, to train on.
        held: the same of other texts.
        how: the number of experts, steps and rate.
        active: how many experts a token is to run.
        dtype: in which the result is stored.
        seed: of the router and the batches.

    Raises:
        LayerwiseError: the layer has no such part.

    Reference: Kim et al., 2024, LaDiMo, of which only the local distillation is public; slices,
    gates and the number of active experts in a step are ours.
    """
    neurons, generator = neurons_of(layer), torch.Generator().manual_seed(seed)
    module = layer.module.get_submodule(neurons.module)
    wanted = module(seen)
    leaves = {name: tensor_of(module, name).detach().clone() for name in neurons.axes}
    noise = torch.randn(how.count, seen.shape[1], generator=generator) if how.steps else None
    router = 0.0 if noise is None else 0.1 * noise / math.sqrt(seen.shape[1])
    router = torch.zeros(how.count, seen.shape[1]).add_(router).to(seen)

    def run(rows: Tensor, count: int) -> Tensor:
        with holding(module, leaves):
            return Mixed(module, module.forward, Routed(router, count), neurons)(rows)

    learned = [*leaves.values(), router]
    with torch.enable_grad():
        optimizer = torch.optim.Adam([t.requires_grad_() for t in learned], lr=how.rate)
        for step in range(how.steps):
            rows = torch.randint(len(seen), (how.batch,), generator=generator)
            count = active + int(torch.randint(-1, 2, (), generator=generator))
            y = wanted[rows]
            lost = run(seen[rows], min(max(count, 1), how.count)) - y
            for group in optimizer.param_groups:
                group["lr"] = how.rate * (1 - step / how.steps)
            optimizer.zero_grad()
            (lost.square().sum() / y.square().sum()).backward()
            optimizer.step()
    with torch.no_grad():
        for tensor in learned:
            tensor.requires_grad_(False).copy_(tensor.to(dtype))
        shares = (held @ router.T).softmax(-1).sort(-1, descending=True).values
        some, others = (seen[:TOLD], wanted[:TOLD]), (held, module(held))
        errors = [
            (_error(run(some[0], k), some[1]), _error(run(others[0], k), others[1]))
            for k in range(1, how.count + 1)
        ]
    tensors = {f"{neurons.module}.{name}": tensor for name, tensor in leaves.items()}
    return Fitted(neurons.module, tensors, router, shares.cumsum(-1).mean(0), errors)


def _error(found: Tensor, wanted: Tensor) -> float:
    return ((found - wanted).square().sum() / wanted.square().sum().clamp_min(1e-30)).item()
