"""What states matter for: replaced by a mean, moved there in steps, or by a fitted map."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from scipy.stats import spearmanr
from torch import Tensor

from layerwise.core.method import Size, method
from layerwise.core.quality import divergence
from layerwise.core.stack import Stack
from layerwise.core.stats import Figures, Stats
from layerwise.describe.geometry import local_map


def _forwards(size: Size, chosen: Mapping[str, Any]) -> str:
    times = chosen["prompts"] * (1 + size.layers * chosen["places"])
    return f"runs the network {times} times on one document"


@method("describe", paper="arXiv:2505.13898", cost=_forwards)
def erasure(
    stack: Stack, stats: Stats, *, rerun: Any, prompts: int = 2, places: int = 4, answer: int = 8
) -> Figures:
    r"""How much the end of a text hangs on one earlier state after a layer.

    The state after layer `l` at position `t` is replaced by the mean state there, over all tokens
    of the prompts. The effect is the largest `|softmax(z) - softmax(z')|_2` over the last `answer`
    positions, and over prompts.

    Args:
        stack: the last stack of the network.
        stats: not used.
        rerun: given; runs a batch with some layers' outputs replaced.
        prompts: batches that are tried.
        places: positions per prompt, evenly spread before the answer. Each costs a forward per
            layer.
        answer: positions at the end that are looked at.

    Returns:
        `largest` and `mean` over the tried positions; a map of layers by positions. The state that
        leaves the last layer reaches no later position: 0.

    Reference: Csordas et al., 2025, arXiv:2505.13898, with prompts in the place of their answers.
    """
    keys, count = [layer.key for layer in stack.layers], min(prompts, rerun.count)
    clean = [rerun(i) for i in range(count)]
    means = {
        key: torch.cat([ran.after[key].flatten(0, 1) for ran in clean]).mean(0) for key in keys
    }
    table = torch.zeros(len(keys), places, dtype=torch.float64)
    for number, ran in enumerate(clean):
        seq = ran.logits.shape[1]
        end = min(max(seq - answer, 1), seq - 1)
        plain = ran.logits[:, end:].float().softmax(-1)
        for column in range(places):
            t = column * end // places
            for row, key in enumerate(keys):
                changed = rerun(number, {key: lambda x, y, k=key, t=t: erased(y, means[k], t)})
                gap = changed.logits[:, end:].float().softmax(-1) - plain
                table[row, column] = max(table[row, column], gap.norm(dim=-1).max().item())
    found = {
        key: {"largest": row.max().item(), "mean": row.mean().item()}
        for key, row in zip(keys, table, strict=True)
    }
    return Figures(found, f"{count} batches, {places} positions each", {"effect": table})


def erased(
    states: Float[Tensor, "batch seq dim"], mean: Float[Tensor, " dim"], place: int
) -> Float[Tensor, "batch seq dim"]:
    """States with those of one position replaced.

    Example:
        >>> erased(torch.ones(1, 3, 1), torch.zeros(1), 1)[0, :, 0]
        tensor([1., 0., 1.])
    """
    found = states.clone()
    found[:, place] = mean.to(found)
    return found


def _gradients(size: Size, chosen: Mapping[str, Any]) -> str:
    times = size.layers * (chosen["steps"] + 1) * chosen["prompts"]
    return f"runs the network {times} times forward and backward on one document"


@method("describe", paper="arXiv:2505.13898", cost=_gradients)
def integrated_gradients(
    stack: Stack, stats: Stats, *, rerun: Any, prompts: int = 1, steps: int = 16
) -> Figures:
    r"""On which positions' states after a layer the network's last answer hangs.

    `a_t = (h_t - m) . mean_k dF/dh_t` at `m + (k - 1/2) / steps (h - m)`, `k` from 1: `F` is the
    log-probability of the network's own choice at the last position, `m` the mean state after the
    layer over the document. `sum_t a_t = F(h) - F(m)` but for the steps.

    Args:
        stack: the last stack of the network.
        stats: not used.
        rerun: given; runs a batch with some layers' outputs replaced.
        prompts: batches that are looked at.
        steps: of the integral. Each costs a forward and a backward pass per layer.

    Returns:
        `total`, `F(h) - F(m)` in nats; `gap`, what the sum misses of it; `last`, the share of
        `sum |a_t|` at the last position, which is 1 after the last layer; `back`, the mean distance
        in tokens from the end, weighed by `|a_t|`. A map of `|a_t|` by layer and position.

    Reference: Csordas et al., 2025, arXiv:2505.13898 (256 steps); Sundararajan et al., 2017.
    """
    keys, count = [layer.key for layer in stack.layers], min(prompts, rerun.count)
    rows: dict[str, list[Tensor]] = {key: [] for key in keys}
    maps = []
    for number in range(count):
        clean = rerun(number)
        choice = clean.logits[:, -1].argmax(-1)
        for key in keys:
            h = clean.after[key].detach()
            mean = h.mean(1, keepdim=True).expand_as(h)

            def chosen(
                x: Tensor, key: str = key, i: int = number, choice: Tensor = choice
            ) -> Tensor:
                logits = rerun(i, {key: lambda _, y: x}).logits[:, -1].float()
                return logits.log_softmax(-1).gather(1, choice[:, None]).sum()

            shares = path_attribution(chosen, h, mean, steps)  # [batch, seq]
            ends = chosen(h) - chosen(mean)
            size = shares.abs().sum(0) / shares.abs().sum().clamp_min(1e-300)
            back = torch.arange(len(size) - 1, -1, -1, device=size.device)
            figures = [ends, ends - shares.sum(), size[-1], (size * back).sum()]
            rows[key].append(torch.stack(figures).double().detach().cpu())
            if not number:
                maps.append(size.double().cpu())
    names: tuple[str, ...] = ("total", "gap", "last", "back")
    means = {key: torch.stack(found).mean(0).tolist() for key, found in rows.items()}
    values: dict[str, dict[str, float]] = {
        key: dict(zip(names, row, strict=True)) for key, row in means.items()
    }
    return Figures(values, f"{count} batches, {steps} steps", {"share": torch.stack(maps)})


def path_attribution(
    function: Any,
    states: Float[Tensor, "*shape dim"],
    start: Float[Tensor, "*shape dim"],
    steps: int,
) -> Float[Tensor, "*shape"]:
    """Integrated gradients of a number along the straight line from `start`, summed over `dim`.

    Example:
        >>> x = torch.tensor([[1.0, 2.0]])
        >>> path_attribution(lambda h: h.square().sum(), x, 0 * x, 4)
        tensor([5.])
    """
    total = torch.zeros_like(states, dtype=torch.float32)
    for k in range(steps):
        at = (start + (k + 0.5) / steps * (states - start)).detach().requires_grad_()
        with torch.enable_grad():
            total += torch.autograd.grad(function(at), at)[0].float()
    return ((states - start).float() * total / steps).sum(-1)


@method(
    "describe",
    paper="arXiv:2604.02459",
    needs=("token_sample",),
    cost=lambda size, chosen: (
        f"runs the network {chosen['prompts'] * (1 + size.layers)} times on one document"
    ),
)
def fit_effect(
    stack: Stack, stats: Stats, *, rerun: Any, prompts: int = 2, neighbors: int = 16
) -> Figures:
    r"""Whether the error of a layer's fitted token-wise map tells what the map does to the answer.

    The layer's output is replaced by `A(h) h`, a diagonal map fitted on the tokens of the sample
    that are nearest to `h`; `error = |r| / |u|` per token as in `update_fit`, `kl` the divergence
    of the answer at that token from the network's own, in nats.

    Args:
        stack: the last stack of the network.
        stats: with `token_sample`.
        rerun: given; runs a batch with some layers' outputs replaced.
        prompts: batches that are tried. Each costs a forward per layer.
        neighbors: tokens that a map is fitted on.

    Returns:
        Means of `error` and `kl`, and `spearman`, their rank correlation over tokens; for the stack
        `spearman` of the means over layers. First tokens are left out.

    Reference: arXiv:2604.02459, which does not say over which units; both are here.
    """
    samples = stats.along("token_sample", stack)
    keys = [k for k, s in samples.items() if s.before.shape == s.after.shape]
    found: dict[str, dict[str, float]] = {key: {} for key in samples}
    pairs: dict[str, list[Tensor]] = {key: [] for key in keys}
    for number in range(min(prompts, rerun.count)):
        clean = rerun(number)
        for key in keys:
            x, y = clean.before[key].flatten(0, 1).double(), clean.after[key].flatten(0, 1).double()
            sample = (samples[key].before.to(x), samples[key].after.to(x))
            fitted = local_map(*sample, neighbors, at=x)
            size = (y - x).norm(dim=1).clamp_min(1e-12)
            error = ((y - fitted).norm(dim=1) / size).view(clean.logits.shape[:2])
            changed = rerun(number, {key: lambda _, out, new=fitted: new.view_as(out).to(out)})
            logp, logq = (r.logits.double().log_softmax(-1) for r in (clean, changed))
            kl = divergence(logp, logq)
            pairs[key].append(torch.stack([error[:, 1:].flatten(), kl[:, 1:].flatten()]).cpu())
    for key, parts in pairs.items():
        error, kl = torch.cat(parts, 1)
        found[key] = {"error": error.mean().item(), "kl": kl.mean().item()}
        found[key] |= _ranked(error, kl)
    means = torch.tensor([[found[k]["error"], found[k]["kl"]] for k in keys]).T
    found[stack.name] = _ranked(*means) if len(keys) > 2 else {}
    tokens = sum(part.shape[1] for part in next(iter(pairs.values()), []))
    return Figures(found, f"{tokens} tokens; maps fitted on a sample without the token itself")


def _ranked(a: Tensor, b: Tensor) -> dict[str, float]:
    """Rank correlation; none where one side is constant."""
    if a.unique().numel() < 2 or b.unique().numel() < 2:
        return {}
    found: Any = spearmanr(a.numpy(), b.numpy())
    return {"spearman": float(found.statistic)}
