"""What runs inside a layer: how its heads look at positions, which of its neurons fire."""

from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor

from layerwise.core.method import method
from layerwise.core.stats import Probe, Seen
from layerwise.core.stream import Attention
from layerwise.core.tokens import in_each, kept

#: rows of the attention matrix that are held at a time, of all documents
ROWS = 128
#: sums over the rows of each document of entropies and of inner products of heads; how many
#: documents, rows and tokens these were
Heads = tuple[tuple[tuple[Tensor, Tensor], ...], int, int, int]


@method("measure", aliases=("head_cosine",), paper="arXiv:2605.20441")
def head_patterns(*, documents: int = 16, rows: int = 32) -> Probe:
    r"""How alike the attention heads of a layer are, and how spread out each one looks.

    `entropy` is the mean over rows and heads of `-sum_j P log P` in nats,
    `entropy_spread` its standard deviation between heads; `cosine` the mean cosine between the
    patterns of two heads, over all rows; `gap` the gap between the two largest eigenvalues of the
    matrix of cosines. Two heads of random scores have a cosine of `floor` at this length if they
    may look back only: nothing below it says anything. Probabilities are computed anew from
    queries and keys, so the network runs as it is.

    Args:
        documents: only the first so many are looked at.
        rows: tokens of each whose rows are looked at, chosen by a hash.

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
        found, begun, count, tokens = state
        keep = kept(seen.inputs, seen.mask)[: max(documents - begun, 0)]
        if not len(keep):
            return state
        at, counts = in_each(keep, begun, rows)
        more = _looks(calls[0], at, counts)
        return (
            (*found, *zip(*more, strict=True)),
            begun + len(keep),
            count + int(counts.sum()),
            tokens + int(keep.sum()),
        )

    def finish(state: Heads) -> dict[str, float]:
        found, documents, count, tokens = state
        if not found:
            return {}
        each, gram = (torch.stack(x).sum(0) / count for x in zip(*found, strict=True))
        size = gram.diagonal().sqrt()
        cosine = gram / torch.outer(size, size)
        heads = len(cosine)
        figures = {"entropy": each.mean().item(), "entropy_spread": each.std(correction=0).item()}
        if heads > 1:
            values = torch.linalg.eigvalsh(cosine)
            figures["cosine"] = ((cosine.sum() - heads) / (heads * (heads - 1))).item()
            figures["gap"] = (values[-1] - values[-2]).item()
            figures["floor"] = causal_floor(round(tokens / documents))
        return figures

    start = ((), 0, 0, 0)
    return Probe("layer", lambda key: start, update, finish, watch=("attention",), figures=True)


def _looks(call: Attention, at: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Entropies `[document, head]` and inner products `[document, head, head]`, summed over the
    rows at some places of every document that count."""
    size = max(1, ROWS // len(at))
    pieces = zip(at.split(size, dim=1), counts.split(size, dim=1), strict=True)
    looks = [_look(call, *piece) for piece in pieces]
    entropies, products = (torch.stack(x).double().sum(0).cpu() for x in zip(*looks, strict=True))
    return entropies, products


def _look(call: Attention, at: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    p = call.probabilities(at).transpose(1, 2)  # [document, rows, head, keys]
    p = p.masked_fill(~counts[:, :, None, None], 0)
    return torch.special.entr(p).sum((1, 3)), (p @ p.mT).sum(1)


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
