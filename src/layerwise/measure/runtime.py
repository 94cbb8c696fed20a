"""What runs inside a layer: how its heads look at positions, which of its neurons fire."""

from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor

from layerwise.core.method import method
from layerwise.core.stats import Probe, Seen
from layerwise.core.stream import Attention
from layerwise.core.tokens import NONE_DRAWN, Drawn, drawn, kept

#: rows of the attention matrix that are held at a time, of all documents
ROWS = 128
#: sampled rows with their entropies per head and inner products of heads; documents, tokens
Heads = tuple[Drawn, int, int]


@method("measure", aliases=("head_cosine",), paper="arXiv:2605.20441")
def head_patterns(*, tokens: int = 512) -> Probe:
    r"""How alike the attention heads of a layer are, and how spread out each one looks.

    `entropy` is the mean over rows and heads of `-sum_j P log P` in nats,
    `entropy_spread` its standard deviation between heads; `cosine` the mean cosine between the
    patterns of two heads, over all rows; `gap` the gap between the two largest eigenvalues of the
    matrix of cosines. Two heads of random scores have a cosine of `floor` at this length if they
    may look back only: nothing below it says anything. Probabilities are computed anew from
    queries and keys, so the network runs as it is.

    Args:
        tokens: at most so many tokens of all documents, chosen by a hash, whose rows are looked at.

    Returns:
        A probe whose value per layer has these; nothing where the layer has no attention, or one
        that is not computed by scaled dot-product attention.

    Reference: Verma, 2026, arXiv:2605.20441; by the author's later note the two readouts predict
    nothing beyond step count, loss and weight norm: a readout, no detector.
    """

    def update(state: Heads, seen: Seen) -> Heads:
        shape = seen.inputs.shape[:2]
        calls = [
            a
            for a in seen.attention
            if (*a.query.shape[::2], a.key.shape[-2]) == (*shape, shape[1])
        ]
        if not calls:
            return state
        keep = kept(seen.inputs, seen.mask)
        rows = drawn(state[0], keep, tokens, lambda at: _looks(calls[0], at, shape[1]), seen.total)
        return rows, state[1] + len(keep), state[2] + int(keep.sum())

    def finish(state: Heads) -> dict[str, float]:
        rows, documents, count = state
        if not rows.held:
            return {}
        each, gram = (x.double().mean(0) for x in rows.ordered().held)
        size = gram.diagonal().sqrt()
        cosine = gram / torch.outer(size, size)
        heads = len(cosine)
        found = {"entropy": each.mean().item(), "entropy_spread": each.std(correction=0).item()}
        if heads > 1:
            values = torch.linalg.eigvalsh(cosine)
            found["cosine"] = ((cosine.sum() - heads) / (heads * (heads - 1))).item()
            found["gap"] = (values[-1] - values[-2]).item()
            found["floor"] = causal_floor(round(count / documents))
        return found

    start = (NONE_DRAWN, 0, 0)
    return Probe("layer", lambda key: start, update, finish, watch=("attention",), figures=True)


def _looks(call: Attention, at: Tensor, length: int) -> tuple[Tensor, ...]:
    """Entropies `[rows, head]` and inner products `[rows, head, head]` at places of a batch."""
    document, row = at // length, at % length
    count = document.bincount(minlength=len(call.query))
    order = document.argsort(stable=True)
    place = torch.arange(len(at), device=at.device) - (count.cumsum(0) - count)[document[order]]
    rows = at.new_zeros(len(count), max(int(count.max()), 1))  # as many of every document
    rows[document[order], place] = row[order]
    looks = [_look(call, some) for some in rows.split(max(1, ROWS // len(rows)), dim=1)]
    mine = torch.empty_like(at)
    mine[order] = document[order] * rows.shape[1] + place
    return tuple(torch.cat(x, 1).flatten(0, 1)[mine] for x in zip(*looks, strict=True))


def _look(call: Attention, rows: Tensor) -> tuple[Tensor, Tensor]:
    p = call.probabilities(rows).transpose(1, 2)  # [document, rows, head, keys]
    return torch.special.entr(p).sum(3), p @ p.mT


@cache
def causal_floor(length: int, pairs: int = 64) -> float:
    """Mean cosine between two causal heads whose scores are independent standard normal numbers.

    Example:
        >>> round(causal_floor(16), 1)
        0.7
    """
    generator = torch.Generator().manual_seed(0)
    shape = (2, max(1, min(pairs, 2**22 // length**2)), length, length)
    scores = torch.randn(shape, generator=generator)
    ahead = torch.ones(length, length, dtype=torch.bool).triu(1)
    a, b = scores.masked_fill(ahead, -torch.inf).softmax(-1).flatten(2)
    return torch.cosine_similarity(a, b, dim=-1).mean().item()


@method("measure", paper="arXiv:2409.02877")
def neuron_means(*, inputs: str = "") -> Probe:
    """Mean size of every neuron over the tokens of each document: `mean_t |x_t|`.

    Neurons are the inputs of a matrix; those of a feed-forward part are what its last matrix
    receives. Magnitudes, since gated neurons have a sign.

    Args:
        inputs: only input groups whose name ends so, such as `mlp.down`; all without it.

    Returns:
        A probe whose value per input group is `[documents, neurons]`, and `[0]` where its rows
        are not the layer's tokens, as inside experts.

    Example:
        >>> x, owners = torch.tensor([[1.0], [-3.0], [5.0]]), torch.tensor([0, 0, 1])
        >>> probe = neuron_means()
        >>> seen = Seen(x, None, None, None, {}, None, owners=owners)
        >>> probe.finish(probe.update(probe.init("decoder/0/mlp.down"), seen))
        tensor([[2.],
                [5.]])
    """

    def update(state: tuple[Tensor, ...] | None, seen: Seen) -> tuple[Tensor, ...] | None:
        if state is None or seen.owners is None:
            return state
        count = torch.bincount(seen.owners.long())
        parts = seen.inputs.abs().split(count.tolist())  # owners ascend
        return (*state, torch.stack([part.float().mean(0).cpu() for part in parts]))

    def finish(state: tuple[Tensor, ...] | None) -> Float[Tensor, "..."]:
        return torch.cat(state) if state else torch.zeros(0)

    return Probe("input", lambda key: () if key.endswith(inputs) else None, update, finish)
