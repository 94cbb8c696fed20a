"""What happens further up when a layer is left out, or stands in for another one."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from layerwise.core.errors import LayerwiseError
from layerwise.core.method import Size, method
from layerwise.core.stack import Stack
from layerwise.core.stats import Figures, Stats


def places_of(length: int, count: int) -> list[int]:
    """Positions at which the future begins, spread over a prompt.

    Example:
        >>> places_of(64, 4)
        [8, 16, 32, 48]
    """
    found = list(range(8, max(length - 4, 9), 8))
    return sorted({found[i * len(found) // count] for i in range(count)})


def _forwards(size: Size, chosen: Mapping[str, Any]) -> str:
    times = chosen["prompts"] * (1 + size.layers * chosen["places"])
    return f"runs the network {times} times on one document"


@method("describe", paper="arXiv:2505.13898", cost=_forwards)
def skip_effect(
    stack: Stack, stats: Stats, *, rerun: Any, prompts: int = 4, places: int = 2
) -> Figures:
    r"""How much leaving out a layer for earlier tokens changes what later tokens compute.

    For layer `s` and position `t` the layer's output at positions `1..t-1` is replaced by its
    input. The effect on layer `l` is `|c_l - c'_l| / |c_l|` with `c_l = h_{l+1} - h_l`, and on the
    output `|softmax(z) - softmax(z')|_2`, each the largest over positions from `t` on, over the
    tried `t`, and over prompts.

    Args:
        stack: the last stack of the network.
        stats: not used.
        rerun: given; runs a batch with some layers' outputs replaced.
        prompts: batches that are tried; the largest effect grows with their number.
        places: positions `t` per prompt. Each costs a forward per layer.

    Returns:
        `later`, the mean of the effect over the layers above, and `output`; a map of the effect of
        every layer (row) on every other.

    Reference: Csordas et al., 2025, arXiv:2505.13898.
    """
    keys = [layer.key for layer in stack.layers]
    table = torch.zeros(len(keys), len(keys), dtype=torch.float64)
    output = torch.zeros(len(keys), dtype=torch.float64)
    for number in range(min(prompts, rerun.count)):
        clean = rerun(number)
        for t in places_of(clean.logits.shape[1], places):
            for s, key in enumerate(keys):
                changed = rerun(number, {key: skipped(t)})
                effects = [_effect(clean, changed, k, t) for k in keys]
                table[s] = torch.maximum(table[s], torch.stack(effects).double().cpu())
                gap = changed.logits[:, t:].float().softmax(-1) - clean.logits[
                    :, t:
                ].float().softmax(-1)
                output[s] = max(output[s], gap.norm(dim=-1).max().item())
    found = {
        key: {"output": output[s].item()}
        | ({"later": table[s, s + 1 :].mean().item()} if s + 1 < len(keys) else {})
        for s, key in enumerate(keys)
    }
    note = f"largest over {min(prompts, rerun.count)} batches and {places} places each"
    return Figures(found, note, {"effect": table})


def skipped(place: int) -> Callable[[Tensor, Tensor], Tensor]:
    """Hand on the input at positions from 1 up to a place, the output elsewhere."""
    return lambda x, y: torch.cat([y[:, :1], x[:, 1:place], y[:, place:]], 1)


def _effect(clean: Any, changed: Any, key: str, t: int) -> Tensor:
    a = (clean.after[key] - clean.before[key])[:, t:].float()
    b = (changed.after[key] - changed.before[key])[:, t:].float()
    return ((a - b).norm(dim=-1) / a.norm(dim=-1).clamp_min(1e-6)).max()


@method(
    "describe",
    paper="arXiv:2412.11299",
    cost=lambda size, chosen: (
        f"trains {size.layers} maps through the network, {chosen['steps']} steps each"
    ),
)
def task_match(
    stack: Stack,
    stats: Stats,
    *,
    rerun: Any,
    at: int = -1,
    steps: int = 30,
    rate: float = 0.01,
) -> Figures:
    """How well a layer can stand in for another when the map between them is trained on the task.

    The state after layer `at` is replaced by `h W + b`, `h` the state after another layer; `W`, `b`
    start as the identity and are trained by Adam for the loss of the network's answer, everything
    else frozen. A low loss does not say that layers are alike: see `direct_match`.

    Args:
        stack: the last stack of the network.
        stats: not used.
        rerun: given; runs a batch with some layers' outputs replaced.
        at: which layer is replaced, from 0; -1 is the middle.
        steps: of training, a batch each; the last batch is kept for the figure.
        rate: of Adam.

    Returns:
        `loss` in nats with the trained map from every layer; for the stack `loss` as it is.

    Raises:
        LayerwiseError: there are fewer than two batches with labels.

    Reference: Balogh and Jelasity, 2024, arXiv:2412.11299, whose warning it is.
    """
    keys = [layer.key for layer in stack.layers]
    target = keys[at if at >= 0 else len(keys) // 2]
    if rerun.count < 2 or rerun(0).labels is None:
        raise LayerwiseError(
            "task_match",
            allowed="two batches or more, with the wanted answers",
            found=f"{rerun.count} batches",
            fix="give more text, with --samples",
        )
    clean = [rerun(i) for i in range(rerun.count)]
    whole = _loss(clean[-1]).item()
    found: dict[str, dict[str, float]] = {}
    for key in keys:
        dim = (clean[0].after[key].shape[-1], clean[0].after[target].shape[-1])
        weight = torch.eye(*dim, device=clean[0].logits.device, requires_grad=True)
        bias = torch.zeros(dim[1], device=clean[0].logits.device, requires_grad=True)
        chosen = torch.optim.Adam([weight, bias], lr=rate, weight_decay=1e-5)

        def ran(i: int, key: str = key, w: Tensor = weight, b: Tensor = bias) -> Tensor:
            states = clean[i].after[key].detach()
            mapped = (states.float() @ w + b).to(states.dtype)
            return _loss(rerun(i, {target: lambda x, y: mapped}))

        with torch.enable_grad():
            for step in range(steps):
                gradients = torch.autograd.grad(ran(step % (rerun.count - 1)), [weight, bias])
                weight.grad, bias.grad = gradients
                chosen.step()
        with torch.no_grad():
            found[key] = {"loss": ran(rerun.count - 1).item()}
    found[stack.name] = {"loss": whole}
    return Figures(found, f"in the place of {target}; {steps} steps, one batch kept apart")


def _loss(ran: Any) -> Tensor:
    logits = ran.logits.float().flatten(0, 1)
    return torch.nn.functional.cross_entropy(logits, ran.labels.flatten(), ignore_index=-100)
