"""What happens further up when a layer is left out, or stands in for another one."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from layerwise.core.errors import LayerwiseError
from layerwise.core.method import Size, method
from layerwise.core.sites import At, Cache, Intervention
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
    times = chosen["prompts"] * (1 + size.layers * max(chosen["places"], 1))
    return f"runs the network {times} times on one document"


@method("describe", paper="arXiv:2505.13898", cost=_forwards)
def skip_effect(
    stack: Stack,
    stats: Stats,
    *,
    rerun: Any,
    prompts: int = 4,
    places: int = 2,
    part: str = "",
    direct: bool = False,
) -> Figures:
    r"""How much leaving out a layer for earlier tokens changes what later tokens compute.

    For layer `s` and position `t` the layer's output at positions `1..t-1` is replaced by its
    input. The effect on layer `l` is `|c_l - c'_l| / |c_l|` with `c_l = h_{l+1} - h_l`, and on the
    output `|softmax(z) - softmax(z')|_2`, each the largest over positions from `t` on, over the
    tried `t`, and over prompts.

    Args:
        stack: the last stack of the network.
        stats: not used.
        rerun: given; runs a batch with changes.
        prompts: batches that are tried; the largest effect grows with their number.
        places: positions `t` per prompt. Each costs a forward per layer. 0 leaves the layer out at
            all positions, and looks at all of them.
        part: what is left out: `attention`, `mlp` ...; the whole layer without it.
        direct: what was left out is missing in the input of every later layer, but does not change
            what the layers between them add.

    Returns:
        `later`, the mean of the effect over the layers above, and `output`; a map of the effect of
        every layer (row) on every other.

    Raises:
        LayerwiseError: a layer has no such part.

    Reference: Csordas et al., 2025, arXiv:2505.13898. `direct` says nothing of the output.
    """
    keys = [layer.key for layer in stack.layers]
    table, output = (torch.zeros(len(keys), n, dtype=torch.float64) for n in (len(keys), 1))
    sites = [At(key, side) for key in keys for side in ("in", "out")]
    also = [At(key, part) for key in keys if part]
    for number in range(min(prompts, rerun.count)):
        clean = rerun.edited(number, [], [*sites, *also])
        length = clean[sites[0]].shape[1]
        for t in places_of(length, places) if places else [0]:
            where = range(1, t) if t else range(length)
            for s in range(len(keys)):
                without = left_out(clean, keys[s:], where, part, direct)
                changed = rerun.edited(number, without, sites)
                effects = [_effect(clean, changed, k, t) for k in keys]
                table[s] = torch.maximum(table[s], torch.stack(effects).double().cpu())
                gap = _said(changed, t) - _said(clean, t)
                output[s] = max(output[s].item(), gap.norm(dim=-1).max().item())
    found = {
        key: ({} if direct else {"output": output[s].item()})
        | ({"later": table[s, s + 1 :].mean().item()} if s + 1 < len(keys) else {})
        for s, key in enumerate(keys)
    }
    over = f"{min(prompts, rerun.count)} batches and {places or 'all'} places each"
    return Figures(found, f"{part or 'layers'} left out; largest over {over}", {"effect": table})


def left_out(
    clean: Cache, keys: Sequence[str], where: range, part: str, direct: bool
) -> list[Intervention]:
    """Edits that leave the first of some layers, or a part of it, out at some positions.

    Directly: every later layer gets its own input less what the first one added there.
    """
    into = clean[At(keys[0], "in")]
    if not direct:
        there = At(keys[0], part or "out", where)
        new = torch.zeros_like(clean[At(keys[0], part)]) if part else into
        return [Intervention(there, lambda here: new[:, where.start : where.stop])]
    gift = clean[At(keys[0], part)] if part else clean[At(keys[0], "out")] - into
    missing = torch.zeros_like(gift)
    missing[:, where.start : where.stop] = gift[:, where.start : where.stop]
    return [_given(At(key, "in"), clean[At(key, "in")] - missing) for key in keys[1:]]


def _given(at: At, value: Tensor) -> Intervention:
    return Intervention(at, lambda here: value)


def _said(ran: Cache, t: int) -> Tensor:
    return ran.output.logits[:, t:].float().softmax(-1)


def _effect(clean: Cache, changed: Cache, key: str, t: int) -> Tensor:
    a, b = ((ran[At(key, "out")] - ran[At(key, "in")])[:, t:].float() for ran in (clean, changed))
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
    _check_answers(rerun)
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


def _check_answers(rerun: Any) -> None:
    """To train needs one batch with wanted answers, to judge another."""
    if rerun.count < 2 or rerun(0).labels is None:
        raise LayerwiseError(
            "task_match",
            allowed="two batches or more, with the wanted answers",
            found=f"{rerun.count} batches",
            fix="give more text, with --samples",
        )


def _loss(ran: Any) -> Tensor:
    logits = ran.logits.float().flatten(0, 1)
    return torch.nn.functional.cross_entropy(logits, ran.labels.flatten(), ignore_index=-100)
