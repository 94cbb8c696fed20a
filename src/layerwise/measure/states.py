"""States that are kept: of some tokens, or one per document."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from layerwise.core.method import method
from layerwise.core.stats import Probe, Seen
from layerwise.core.tokens import NONE_DRAWN, Drawn, Sample, by_token, drawn, kept


@method("measure")
def token_sample(*, tokens: int = 512) -> Probe:
    """States of at most `tokens` tokens before and after every layer, the same in all layers.

    A token's document and position decide by a hash whether it is kept, so that neither the cut
    into batches nor padding matters. Memory: `2 * tokens * dim` numbers per layer.

    Args:
        tokens: how many are kept.

    Returns:
        A probe whose value per layer is a `Sample`, ordered by document and position.

    Example:
        >>> seen = Seen(torch.zeros(2, 9, 4), torch.ones(2, 9, 4), None, None, {}, None)
        >>> probe = token_sample(tokens=5)
        >>> probe.finish(probe.update(probe.init("decoder/0"), seen)).after.shape
        torch.Size([5, 4])
    """

    def update(state: Drawn, seen: Seen) -> Drawn:
        assert seen.output is not None
        before, after = (by_token(x).flatten(0, 1) for x in (seen.inputs, seen.output))
        same = len(before) == len(after)  # none before where the layer moves positions
        before = before if same else after.new_zeros(len(after), 0)
        keep = kept(seen.output, seen.mask)
        return drawn(state, keep, tokens, lambda at: (before[at], after[at]), seen.total)

    def finish(state: Drawn) -> Sample:
        ordered = state.ordered()
        return Sample(ordered.where, *ordered.held)

    return Probe("layer", lambda key: NONE_DRAWN, update, finish)


Pooling = Literal["mean", "last", "first", "max", "unit"]


@method("measure")
def pooled_states(*, how: Pooling = "mean") -> Probe:
    """One state per document before and after every layer: its mean, last, first or largest token.

    Args:
        how: `mean` and `max` over the tokens that are no padding, the `first` or `last` of them, or
            `unit`, the mean of tokens less their mean and divided by their norm.

    Returns:
        A probe whose value per layer is a `Sample` whose rows are documents; its `where` holds the
        document and the number of its tokens.

    Example:
        >>> x = torch.tensor([[[1.0], [4.0], [9.0]]])
        >>> probe = pooled_states()
        >>> seen = Seen(x, -x, torch.tensor([[1, 1, 0]]), None, {}, None)
        >>> probe.finish(probe.update(probe.init("decoder/0"), seen)).after
        tensor([[-2.5000]])
    """

    def update(state: tuple[Sample, ...], seen: Seen) -> tuple[Sample, ...]:
        assert seen.output is not None
        keep = kept(seen.output, seen.mask)
        before, after = (by_token(x) for x in (seen.inputs, seen.output))
        same = before.shape[:2] == after.shape[:2]
        first = pool(before, keep, how) if same else before.new_zeros(len(keep), 0)
        count = sum(len(part.where) for part in state)
        document = torch.arange(count, count + len(keep))
        where = torch.stack([document, keep.sum(1).cpu()], 1)
        return (*state, Sample(where, first.float().cpu(), pool(after, keep, how).float().cpu()))

    def finish(state: tuple[Sample, ...]) -> Sample:
        return Sample(*(torch.cat(parts) for parts in zip(*state, strict=True)))

    return Probe("layer", lambda key: (), update, finish)


@method("measure")
def first_states() -> Probe:
    """The state of every document's first token, where encoders put what stands for all of it.

    Returns:
        `pooled_states` of the first token.
    """
    return pooled_states(how="first")


@method("measure")
def largest_states() -> Probe:
    """The largest value of every dimension over a document's tokens.

    Returns:
        `pooled_states` of the maximum; padding is left out, not taken for 0.
    """
    return pooled_states(how="max")


@method("measure", paper="arXiv:2305.04940")
def place_states(*, every: int = 8, bins: int = 16) -> Probe:
    """A document's states after every layer by place: sums over positions that share a weight.

    `s_b = sum_{t in bin b} h_t / T` with `every` positions to a bin, the last one taking the rest:
    `sum_b w_b s_b` is any weighting of tokens by position, in steps.

    Args:
        every: positions in a bin; 1 has a weight for each.
        bins: how many bins. Memory: `documents * bins * dim` numbers per layer.

    Returns:
        A probe whose value per layer is `[documents, bins, dim]`.

    Example:
        >>> x = torch.tensor([[[1.0], [2.0], [3.0]]])
        >>> probe = place_states(every=1, bins=2)
        >>> probe.finish(probe.update(probe.init(""), Seen(x, x, None, None, {}, None)))[0, :, 0]
        tensor([0.3333, 1.6667])
    """

    def update(state: tuple[Tensor, ...], seen: Seen) -> tuple[Tensor, ...]:
        assert seen.output is not None
        keep, rows = kept(seen.output, seen.mask), by_token(seen.output)
        place = ((keep.long().cumsum(1) - 1).clamp_min(0) // every).clamp_max(bins - 1)
        weight = keep.double() / keep.double().sum(1, keepdim=True).clamp_min(1)
        picks = torch.nn.functional.one_hot(place, bins) * weight[..., None]  # [batch, seq, bins]
        return (*state, (picks.mT @ rows.double()).float().cpu())

    return Probe("layer", lambda key: (), update, torch.cat)


def pool(
    rows: Float[Tensor, "batch seq dim"], keep: Tensor, how: Pooling
) -> Float[Tensor, "batch dim"]:
    """One row per document."""
    if how == "mean":
        count = keep.sum(1, keepdim=True).clamp_min(1)
        rows = rows if keep.all() else rows.masked_fill(~keep[..., None], 0)
        wide = torch.promote_types(rows.dtype, torch.float32)
        return rows.sum(1, dtype=wide).double() / count
    if how == "unit":
        centred = rows.double() - pool(rows, keep, "mean")[:, None]
        return pool(torch.nn.functional.normalize(centred, dim=-1), keep, "mean")
    if how == "max":
        return rows.masked_fill(~keep[..., None], -torch.inf).amax(1)
    count = keep.long().cumsum(1)
    place = count.argmax(1) if how == "last" else (count == 1).long().argmax(1)
    return rows[torch.arange(len(rows), device=rows.device), place]
