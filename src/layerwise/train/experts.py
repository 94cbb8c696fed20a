"""A feed-forward part learns to give with a few of its neurons what it gave with all."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from layerwise.core.instead import holding, tensor_of
from layerwise.core.plan import Experts
from layerwise.core.routing import Mixed, Neurons, Routed, neurons_of
from layerwise.core.stack import Layer

#: tokens on which errors of what was trained on are told
TOLD = 2048
#: of the mean of the squared inputs, added to every one of them where a router is fitted
RIDGE = 1e-3


class Fitted(NamedTuple):
    """What came of a part, by names inside its layer.

    `covered` is the mean weight of the `k` first experts of a token, and `errors` are those of
    the output, of tokens trained on and of others, relative to its square; both for every `k`.
    """

    module: str
    tensors: dict[str, Tensor]
    routed: Routed
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
    """Cut a part into experts, and train these: `min |sum_e f_e(x) - FFN(x)|^2 / |FFN(x)|^2`.

    Neurons are sorted by the mean of their energy `a_i^2 |down_i|^2`, and the experts begin as
    slices of them. The router is a regression: `R x + b` is nearest to `log |f_e(x)|^2`, so that
    its softmax foresees the experts' shares of the energy. The sum is over the `active` experts of
    the largest. With all of them, and no steps, it is the dense part.

    Args:
        layer: with its weights in float32; it is not changed.
        seen: what comes to the part, to train on.
        held: the same of other texts.
        how: the number of experts, steps and rate.
        active: how many experts a token is to run.
        dtype: in which the result is stored.
        seed: of the batches.

    Raises:
        LayerwiseError: the layer has no such part.

    Reference: Kim et al., 2024, arXiv:2408.04278 (LaDiMo), for the local distillation; slices,
    their order and the router are ours.
    """
    neurons, generator = neurons_of(layer), torch.Generator().manual_seed(seed)
    module = layer.module.get_submodule(neurons.module)
    wanted, order = module(seen), energy_of(module, neurons, seen).argsort(descending=True)
    leaves = {
        name: tensor_of(module, name).detach().index_select(axis, order)
        for name, axis in neurons.axes.items()
    }

    def run(rows: Tensor, count: int) -> Tensor:
        with holding(module, leaves):
            used = Routed(routed.router, routed.bias, count)
            return Mixed(module, module.forward, used, neurons)(rows)

    routed = Routed(seen.new_zeros(how.count, seen.shape[1]), seen.new_zeros(how.count), active)
    with holding(module, leaves):
        routed = router_for(Mixed(module, module.forward, routed, neurons), seen, how, dtype)
    with torch.enable_grad():
        optimizer = torch.optim.Adam([t.requires_grad_() for t in leaves.values()], lr=how.rate)
        for step in range(how.steps):
            rows = torch.randint(len(seen), (how.batch,), generator=generator)
            y = wanted[rows]
            for group in optimizer.param_groups:
                group["lr"] = how.rate * (1 - step / how.steps)
            optimizer.zero_grad()
            ((run(seen[rows], active) - y).square().sum() / y.square().sum()).backward()
            optimizer.step()
    leaves = {name: tensor.detach().to(dtype).to(seen) for name, tensor in leaves.items()}
    shares = routed.scores(held).softmax(-1).sort(-1, descending=True).values
    some, others = (seen[:TOLD], wanted[:TOLD]), (held, module(held))
    errors = [
        (_error(run(some[0], k), some[1]), _error(run(others[0], k), others[1]))
        for k in range(1, how.count + 1)
    ]
    tensors = {f"{neurons.module}.{name}": tensor for name, tensor in leaves.items()}
    return Fitted(neurons.module, tensors, routed, shares.cumsum(-1).mean(0), errors)


def energy_of(
    module: nn.Module, neurons: Neurons, seen: Float[Tensor, "tokens dim"]
) -> Float[Tensor, " neurons"]:
    """`mean a_i^2 |down_i|^2`: how much every neuron adds to the output, on its own."""
    activity: list[Tensor] = []
    owner = module.get_submodule(neurons.down.rpartition(".")[0])
    hook = owner.register_forward_pre_hook(lambda m, args: activity.append(args[0]))
    try:
        module(seen)
    finally:
        hook.remove()
    squares = activity[0].square().reshape(-1, neurons.size).mean(0)
    down = tensor_of(module, neurons.down).movedim(neurons.axes[neurons.down], 0)
    return squares * down.flatten(1).square().sum(1)


def router_for(
    mixed: Mixed, seen: Float[Tensor, "tokens dim"], how: Experts, dtype: torch.dtype
) -> Routed:
    """The regression of `log |f_e(x)|^2` on `x` and 1; on 1 alone if tokens are not `routed`."""
    made = [mixed.expert(e, seen).square().sum(-1) for e in range(how.count)]
    energy = torch.stack(made, 1).clamp_min(1e-12).log().double()  # [tokens, experts]
    x = torch.cat([seen * how.routed, torch.ones_like(seen[:, :1])], 1).double()
    squares = x.T @ x
    ridge = RIDGE * squares.diagonal().mean() * torch.eye(len(squares)).to(squares)
    found = torch.linalg.solve(squares + ridge, x.T @ energy).T.to(dtype).to(seen)
    return Routed(found[:, :-1].contiguous(), found[:, -1].contiguous(), mixed.routed.active)


def _error(found: Tensor, wanted: Tensor) -> float:
    return ((found - wanted).square().sum() / wanted.square().sum().clamp_min(1e-30)).item()
