"""Patching over a whole grid of sites: many sites share one forward, each in rows of its own."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils._pytree import tree_map

from layerwise.core.errors import LayerwiseError
from layerwise.core.intervene import cache, run
from layerwise.core.network import Network
from layerwise.core.sites import At, Change, Intervention, Several, sites

Batch = Mapping[str, Tensor]
#: the network's output for the prompts -> a number for each of them, or one for all
Metric = Callable[[Any], Tensor]


def activation_patching(
    network: Network,
    clean: Batch,
    corrupted: Batch,
    metric: Metric,
    where: Sequence[At],
    rows: int = 64,
) -> Float[Tensor, " sites"]:
    """How much of the clean answer one clean activation brings back: what suffices.

    `(M_patched - M_corrupted) / (M_clean - M_corrupted)`, `M` the mean of the metric over prompts:
    0 nothing, 1 all of it. Swap the two batches to see what is necessary. All runs have the same
    batch layout, so that rounding does not pass for an effect.

    Args:
        network: the opened model.
        clean: prompts that are answered right.
        corrupted: as many of the same length, token under token.
        metric: such as `lambda out: out.logits[:, -1, right] - out.logits[:, -1, wrong]`.
        where: the sites, such as `sites(network, "in", positions=range(7))`.
        rows: prompts in one forward; more are faster and take more memory.

    Returns:
        A score per site, in their order; float64.

    Raises:
        LayerwiseError: the batches differ in shape, or the metric does not tell them apart.

    Example:
        >>> import layerwise
        >>> from layerwise.intervene import activation_patching, sites
        >>> network = layerwise.open("demo").load()
        >>> clean, other = ({"input_ids": torch.tensor([[5, 6, n]])} for n in (7, 8))
        >>> where = sites(network, "in", positions=[None])
        >>> activation_patching(network, clean, other, lambda o: o.logits[:, -1, 9], where)[3]
        tensor(1., dtype=torch.float64)
    """
    _check_alike(clean, corrupted)
    slots = _slots(clean, len(where), rows)
    kept, right = _taken(network, clean, where, metric, slots)
    wrong = _taken(network, corrupted, (), metric, slots)[1]
    above, below = right.mean(1), wrong.mean(1)
    patched = _put(network, corrupted, list(zip(where, kept, strict=True)), metric, slots)
    slot = torch.arange(len(where)) % len(below)
    return (patched.mean(1) - below[slot]) / _apart(above - below)[slot]


def attribution_patching(
    network: Network, clean: Batch, corrupted: Batch, metric: Metric, where: Sequence[At]
) -> Float[Tensor, " sites"]:
    """Activation patching to first order, for all sites in two forwards and one backward.

    `sum (x_clean - x_corrupted) dM/dx / (M_clean - M_corrupted)`, the gradient at the corrupted
    run. Exact where the metric is linear in the site; poor for the stream through norms and
    saturated attention, better for heads and parts.

    Args:
        network: the opened model.
        clean: prompts that are answered right.
        corrupted: as many of the same length, token under token.
        metric: differentiable, as for `activation_patching`.
        where: the sites.

    Returns:
        A score per site, in their order; float64.

    Raises:
        LayerwiseError: the batches differ in shape, or the metric does not tell them apart.

    Reference: Nanda, 2023, attribution patching; Kramar et al., 2024, arXiv:2403.00745.
    """
    _check_alike(clean, corrupted)
    right, wrong = cache(network, clean, where), cache(network, corrupted, where, grad=True)
    with torch.enable_grad():
        below = metric(wrong.output).double().mean()
        gradients = torch.autograd.grad(below, [wrong[at] for at in where], allow_unused=True)
    scale = _apart((metric(right.output).double().mean() - below.detach())[None])[0]
    found = [
        torch.zeros(()) if g is None else ((right[at] - wrong[at].detach()) * g).double().sum()
        for at, g in zip(where, gradients, strict=True)
    ]
    return torch.stack(found).double().cpu() / scale


def back_patching(
    network: Network,
    batch: Batch,
    metric: Metric,
    positions: Several = None,
    rows: int = 64,
) -> Float[Tensor, "source target prompts"]:
    """Give a layer what a later layer of the same run made, and let the rest run again.

    The state after layer `source` takes the place of the one after `target <= source`; where both
    are one layer, nothing changes. NaN where the target is later.

    Args:
        network: the opened model.
        batch: the prompts.
        metric: a number for each prompt.
        positions: whose states are moved; None is all.
        rows: prompts in one forward.

    Returns:
        The metric of every pair and prompt; float64. The best pair *of each prompt* is an oracle
        over about `layers^2 / 2` tries: report the best pair for all prompts beside it.

    Reference: Biran et al., 2024, arXiv:2406.12775.
    """
    where = sites(network, "out", positions=[positions])
    pairs = [(s, t) for s in range(len(where)) for t in range(s + 1)]
    values = moved(
        network, batch, batch, [(where[s], where[t]) for s, t in pairs], metric, rows=rows
    )
    found = values.new_full((len(where), len(where), values.shape[1]), torch.nan)
    for (source, target), value in zip(pairs, values, strict=True):
        found[source, target] = value
    return found


def moved(
    network: Network,
    source: Batch,
    target: Batch,
    moves: Sequence[tuple[At, At]],
    metric: Metric,
    rows: int = 64,
) -> Float[Tensor, "moves prompts"]:
    """The metric of a target run in which one site holds what the source run has at another.

    Args:
        network: the opened model.
        source: where values are taken from.
        target: where they are put; as many prompts.
        moves: pairs (site in the source, site in the target).
        metric: a number for each prompt, or one for all.
        rows: prompts in one forward.
    """
    slots = _slots(target, len(moves), rows)
    kept, _ = _taken(network, source, [at for at, _ in moves], metric, slots)
    put = [(at, value) for (_, at), value in zip(moves, kept, strict=True)]
    return _put(network, target, put, metric, slots)


def _slots(batch: Batch, count: int, rows: int) -> int:
    """How often a forward repeats the prompts; every site has a slot, rows of its own."""
    most = max(1, rows // len(next(iter(batch.values()))))
    forwards = max(1, -(-count // most))
    return max(1, -(-count // forwards))


def _taken(
    network: Network, batch: Batch, where: Sequence[At], metric: Metric, slots: int
) -> tuple[list[Tensor], Float[Tensor, "slots prompts"]]:
    """What a run has at every site, in the slot of that site, and the metric of every slot."""
    prompts = len(next(iter(batch.values())))
    kept: dict[int, Tensor] = {}
    keep = [
        Intervention(at, _keeping(kept, i, _place(i % slots, prompts)))
        for i, at in enumerate(where)
    ]
    output = run(network, _repeated(batch, slots), keep)
    values = torch.stack([_of_slot(output, i, prompts, slots, metric) for i in range(slots)])
    return [kept[i] for i in range(len(where))], values


def _put(
    network: Network, batch: Batch, puts: Sequence[tuple[At, Tensor]], metric: Metric, slots: int
) -> Float[Tensor, "sites prompts"]:
    """The metric with every value put at its site, each in its own slot."""
    prompts = len(next(iter(batch.values())))
    found: list[Tensor] = []
    for start in range(0, len(puts), slots):
        part = puts[start : start + slots]
        edits = [
            Intervention(at, _putting(value, _place(i, prompts)))
            for i, (at, value) in enumerate(part)
        ]
        output = run(network, _repeated(batch, slots), edits)
        found += [_of_slot(output, i, prompts, slots, metric) for i in range(len(part))]
    return torch.stack(found)


def _place(slot: int, prompts: int) -> slice:
    return slice(slot * prompts, (slot + 1) * prompts)


def _of_slot(output: Any, slot: int, prompts: int, slots: int, metric: Metric) -> Tensor:
    """The metric of the rows of a slot, which it sees as if they were all."""
    place, total = _place(slot, prompts), slots * prompts
    here = tree_map(
        lambda t: t[place] if isinstance(t, Tensor) and t.shape[:1] == (total,) else t, output
    )
    return metric(here).detach().double().cpu().expand(prompts)


def _repeated(batch: Batch, times: int) -> dict[str, Tensor]:
    return {k: v.repeat(times, *[1] * (v.ndim - 1)) for k, v in batch.items()}


def _keeping(kept: dict[int, Tensor], number: int, place: slice) -> Change:
    def keep(value: Tensor) -> Tensor:
        kept[number] = value[place].clone()
        return value

    return keep


def _putting(new: Tensor, place: slice) -> Change:
    def put(value: Tensor) -> Tensor:
        return torch.cat([value[: place.start], new.to(value), value[place.stop :]])

    return put


def _check_alike(clean: Batch, corrupted: Batch) -> None:
    shapes = [{key: list(value.shape) for key, value in b.items()} for b in (clean, corrupted)]
    if shapes[0] != shapes[1]:
        raise LayerwiseError(
            "patching",
            allowed="a clean and a corrupted batch of the same shape, token under token",
            found=f"{shapes[0]} and {shapes[1]}",
            fix="choose prompts with as many tokens",
        )


def _apart(difference: Tensor) -> Tensor:
    if (difference == 0).any():
        raise LayerwiseError(
            "patching",
            allowed="a metric that differs between the clean and the corrupted run",
            found="the same value for both",
            fix="choose another metric, or prompts that are answered unlike",
        )
    return difference
