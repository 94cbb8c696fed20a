"""What the network would say if it ended early: lenses, and where a token's state stops growing."""

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from layerwise.core.method import Size, method
from layerwise.core.quality import divergence
from layerwise.core.stack import Stack
from layerwise.core.stats import Figures, Stats
from layerwise.core.tokens import Sample

#: the network's own end: states `[tokens, dim]` after its last layer -> logits `[tokens, classes]`
Tail = Callable[[Tensor], Tensor]
CHUNK = 128


def layer_states(stack: Stack, stats: Stats) -> dict[str, Tensor]:
    """States of the sample by layer; `input` is what enters the stack."""
    samples: dict[str, Sample] = stats.along("token_sample", stack)
    first = next(iter(samples.values())).before
    return {"input": first, **{key: s.after for key, s in samples.items()}}


class Answer(NamedTuple):
    """What the network says of some tokens: log-probabilities, the five likeliest, the first."""

    logp: Float[Tensor, "tokens classes"]
    top: Tensor
    choice: Tensor


def answer_of(logits: Float[Tensor, "tokens classes"]) -> Answer:
    """The network's answer, prepared once for all layers that are compared with it."""
    logp = logits.float().log_softmax(-1)
    top = logp.topk(min(5, logp.shape[-1])).indices
    return Answer(logp, top, top[:, :1])


def compared(final: Answer, early: Float[Tensor, "tokens classes"]) -> Float[Tensor, "tokens five"]:
    """Per token: KL of an early answer from the final one, overlap, entropy, rank of the answer.

    Returns:
        `[tokens, 5]`: `sum p_l log(p_l / p_L)`, `|top5 and top5| / 5`, entropy in nats, rank of
        the final answer (1 is first), and whether both have the same first choice.
    """
    logq = early.float().log_softmax(-1)
    q = logq.exp()
    top = logq.topk(final.top.shape[1]).indices
    overlap = (final.top[:, :, None] == top[:, None]).any(-1).float().mean(-1)
    entropy = -(q * logq).sum(-1)
    kl = (q * (logq - final.logp)).sum(-1)
    rank = 1 + (logq > logq.gather(1, final.choice)).sum(-1)
    same = top[:, 0] == final.choice[:, 0]
    return torch.stack([kl, overlap, entropy, rank.float(), same.float()], 1).double()


NAMES: tuple[str, ...] = ("kl", "overlap", "entropy", "rank", "agree")


@method("describe", aliases=("logit_lens",), paper="arXiv:2505.13898", needs=("token_sample",))
def lens(stack: Stack, stats: Stats, *, tail: Tail) -> Figures:
    """The network's own end on the states after every layer, against its answer, on a sample.

    Everything after the last layer is replayed as it is, final norm with statistics of the state
    that it is given, scales, caps and head; so at the last layer it is the network's answer.

    Args:
        stack: the last stack of the network.
        stats: with `token_sample`.
        tail: given; the network's end.

    Returns:
        Per layer means over tokens: `kl`, `KL(p_l || p_L)` in nats; `overlap` of the five likeliest
        tokens; `entropy` of `p_l` in nats; `rank` of the final answer; `agree`, the share of tokens
        with the same first choice. A map of `kl` by layer and token; its first row is the input.

    Reference: nostalgebraist, 2020; Csordas et al., 2025, arXiv:2505.13898, for KL and overlap.
    """
    states = layer_states(stack, stats)
    *_, last = states.values()
    table = {key: [] for key in states}
    for start in range(0, len(last), CHUNK):
        logits = tail(last[start : start + CHUNK])
        final = answer_of(logits)
        for key, x in states.items():
            if len(x) == len(last) and x.shape[1] == last.shape[1]:
                early = logits if x is last else tail(x[start : start + CHUNK])
                table[key].append(compared(final, early))
    rows = {key: torch.cat(parts) for key, parts in table.items() if parts}
    found: dict[str, dict[str, float]] = {
        k: dict(zip(NAMES, r.mean(0).tolist(), strict=True)) for k, r in rows.items()
    }
    entered = found.pop("input", {})
    values = {key: found.get(key, {}) for key in states if key != "input"}
    kl = torch.stack([row[:, 0] for row in rows.values()])
    note = f"{len(last)} tokens; the embedding itself has a KL of {entered.get('kl', 0):.3g}"
    return Figures(values, note, {"kl": kl})


def _training(size: Size, chosen: Mapping[str, Any]) -> str:
    """Three forwards of the network's end per step and chunk of tokens, in passes over the data."""
    steps = chosen["steps"] * 3 * CHUNK * size.layers
    passes = steps * size.outside / (size.inside * size.tokens)
    return f"trains {size.layers - 1} maps: about {passes:.2g} passes"


@method("describe", paper="arXiv:2303.08112", needs=("token_sample",), cost=_training)
def tuned_lens(
    stack: Stack, stats: Stats, *, tail: Tail, steps: int = 60, rate: float = 0.1
) -> Figures:
    """The lens through a trained affine map per layer, on tokens that it was not trained on.

    `logits = tail(h + A h + b)` with `A`, `b` from 0, so an untrained one is the logit lens;
    trained for `KL(p_L || q_l)` on the tokens of even documents by gradient descent with Nesterov
    momentum 0.9, weight decay 1e-3, gradients of norm at most 1, a rate that falls to 0.

    Args:
        stack: the last stack of the network.
        stats: with `token_sample`; more tokens give a better map.
        tail: given; the network's end.
        steps: of training, per layer.
        rate: at the start.

    Returns:
        `kl`, `KL(p_L || q_l)` in nats on odd documents, and `kl_plain`, that without the map.

    Reference: Belrose et al., 2023, arXiv:2303.08112; far fewer tokens than the authors use.
    """
    states = layer_states(stack, stats)
    samples = stats.along("token_sample", stack)
    odd = next(iter(samples.values())).where[:, 0] % 2 == 1
    keys, last = list(samples), states[list(samples)[-1]]
    found: dict[str, dict[str, float]] = {key: {} for key in keys}
    for key in keys[:-1]:
        x = states[key]
        if x.shape != last.shape or odd.all() or not odd.any():
            continue
        map_ = translator(x[~odd], last[~odd], tail, steps, rate)
        with torch.no_grad():
            pair = (
                _forward_kl(tail, map_(x[odd]), last[odd]),
                _forward_kl(tail, x[odd], last[odd]),
            )
        found[key] = {"kl": pair[0].item(), "kl_plain": pair[1].item()}
    note = f"{int((~odd).sum())} tokens trained on, {int(odd.sum())} measured"
    return Figures(found, note)


def _forward_kl(tail: Tail, x: Tensor, last: Tensor) -> Tensor:
    logq = tail(x).float().log_softmax(-1)
    with torch.no_grad():
        logp = tail(last).float().log_softmax(-1)
    return divergence(logp, logq).mean()


def translator(
    x: Float[Tensor, "tokens dim"],
    last: Float[Tensor, "tokens dim"],
    tail: Tail,
    steps: int,
    rate: float,
) -> Callable[[Tensor], Tensor]:
    """A map `h -> h + A h + b` trained so that the tail says of `x` what it says of `last`."""
    a = torch.zeros(x.shape[1], x.shape[1], device=x.device, requires_grad=True)
    b = torch.zeros(x.shape[1], device=x.device, requires_grad=True)
    scale = x.float().square().mean().sqrt()

    def mapped(h: Tensor) -> Tensor:
        return (h.float() + h.float() @ a + b * scale).to(h.dtype)

    chosen = torch.optim.SGD([a, b], lr=rate, momentum=0.9, nesterov=True, weight_decay=1e-3)
    falling = torch.optim.lr_scheduler.LambdaLR(chosen, lambda step: 1 - step / max(steps, 1))
    with torch.enable_grad():
        for step in range(steps):
            start = step * CHUNK % max(len(x) - CHUNK + 1, 1)
            rows = slice(start, start + CHUNK)
            chosen.zero_grad()
            _forward_kl(tail, mapped(x[rows]), last[rows]).backward()
            torch.nn.utils.clip_grad_norm_([a, b], 1.0)
            chosen.step()
            falling.step()
    return mapped


@method("describe", aliases=("lac",), paper="arXiv:2505.14467", needs=("token_sample",))
def voids(
    stack: Stack,
    stats: Stats,
    *,
    tail: Tail,
    prompt: int,
    alpha: float = 0.8,
    rule: Literal["range", "fall"] = "range",
) -> Figures:
    r"""Layers in which a token's norm grows little: `d_l < alpha (max_{j<l} d_j - min_{j<l} d_j)`.

    `d_l = |h_{l+1}| - |h_l|` per token; `fall` calls a layer a void where the norm falls, as the
    published trace does. Nothing is skipped: the state of the last active layer (what enters the
    stack if there is none) is read out by the network's end, which is an exit, not a speed-up.

    Args:
        stack: the last stack of the network.
        stats: with `token_sample`.
        tail: given; the network's end.
        prompt: given; tokens of a document that are its prompt, the rest its response; 0 if none
            was generated.
        alpha: share of the range so far.
        rule: `range` or `fall`.

    Returns:
        `active` per layer, the share of tokens for which it is none, with `active_prompt` and
        `active_response`; for the stack `used`, the mean share of layers, and of the read-out
        `kl` (nats) and `agree` with the network's answer. A map of active layers by token.

    Reference: Shemiranifar, 2025, arXiv:2505.14467. The first layer is active where `d >= 0`.
    """
    states = layer_states(stack, stats)
    same = {k: x for k, x in states.items() if x.shape == states[list(states)[-1]].shape}
    if len(same) != len(states):
        return Figures({k: {} for k in states if k != "input"}, "needs layers that keep the shape")
    stacked = torch.stack(list(states.values()))  # [boundary, tokens, dim]
    active = active_layers(stacked.float().norm(dim=-1).diff(dim=0), alpha, rule)
    where = next(iter(stats.along("token_sample", stack).values())).where
    phases = {"": torch.ones_like(where[:, 0], dtype=torch.bool)}
    if prompt:
        phases |= {"_prompt": where[:, 1] < prompt, "_response": where[:, 1] >= prompt}
    found: dict[str, dict[str, float]] = {}
    for row, key in zip(active, list(states)[1:], strict=True):
        shares = {f"active{p}": row[m].double().mean().item() for p, m in phases.items() if m.any()}
        found[key] = shares
    numbers = torch.arange(1, len(active) + 1)[:, None]
    last = (active * numbers).amax(0)
    read = stacked[last, torch.arange(len(where))]
    parts = [
        compared(answer_of(tail(stacked[-1][i : i + CHUNK])), tail(read[i : i + CHUNK]))
        for i in range(0, len(where), CHUNK)
    ]
    means = torch.cat(parts).mean(0)
    used = {f"used{p}": active[:, m].double().mean().item() for p, m in phases.items() if m.any()}
    found[stack.name] = {**used, "kl": means[0].item(), "agree": means[4].item()}
    return Figures(
        found, f"{len(where)} tokens, alpha {alpha}, {rule}", {"active": active.double()}
    )


def active_layers(growth: Float[Tensor, "layers tokens"], alpha: float, rule: str) -> Tensor:
    """Which layers are no voids, per token.

    Example:
        >>> d = torch.tensor([[3.0], [1.0], [-1.0], [2.0]])
        >>> active_layers(d, 0.8, "range")[:, 0].tolist()
        [True, True, False, False]
    """
    before = torch.zeros_like(growth[:1])
    if rule == "range" and len(growth) > 1:
        span = growth.cummax(0).values - growth.cummin(0).values
        before = torch.cat([before, span[:-1]])
    return growth >= alpha * before
