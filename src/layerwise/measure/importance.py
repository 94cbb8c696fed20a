"""How important each token is for the layer that is about to run."""

import torch
from jaxtyping import Float
from torch import Tensor

from layerwise.core.method import method
from layerwise.core.stats import Probe, Seen
from layerwise.core.stream import Attention, AttentionWatch

#: rows of the attention matrix that are held at a time, of all documents
ROWS = 256
#: weights of the last batch, sum of the shares of all documents, and how many there were
State = tuple[Tensor | None, float, int]


@method("measure", paper="arXiv:2503.01820")
def attention_received(*, low: float = 0.01) -> Probe:
    r"""Weight of every token: the attention that it receives, from `low` to 1, mean 1.

    `r_k = sum over heads and queries of P[head, query, key k]`; within a document `r` is mapped
    onto `low` to 1 and divided by its mean. The layer is replayed on what it is about to receive.

    Args:
        low: of the token that receives least, before the mean is taken out; 1 weighs all alike.

    Returns:
        A probe that emits `[batch, seq]` for other probes. Its own value per layer is the share of
        tokens that in effect count, `(sum r)^2 / (n sum r^2)`, mean over documents: near `1 / n`
        where an attention sink takes all. All tokens weigh 1 where the layer has no attention by
        scaled dot products among its own tokens.

    Example:
        >>> normalised(torch.tensor([[0.2, 0.6, 0.4]]), torch.ones(1, 3), 0.005)
        tensor([[0.0100, 1.9900, 1.0000]])

    Reference: Sung et al., 2025, arXiv:2503.01820. As in their code the weight enters the second
    moment once; the paper's formula has its square. Their `low` is 0.005 on rotated weights, 0.1 on
    others were found to be best.
    """

    def update(state: State, seen: Seen) -> State:
        weights = weigh(seen)
        kept = weights.new_ones(weights.shape) if seen.mask is None else seen.mask
        shares = weights.sum(1).square() / (kept.sum(1) * weights.square().sum(1))
        return weights, state[1] + shares.sum().item(), state[2] + len(shares)

    def weigh(seen: Seen) -> Tensor:
        assert seen.replay is not None
        shape = seen.inputs.shape[:2]
        with AttentionWatch() as watch:
            seen.replay()
        own = [c for c in watch.calls if (len(c.query), c.key.shape[-2]) == tuple(shape)]
        own = [c for c in own if c.query.shape[-2] == shape[1]]
        mask = torch.ones(shape, device=seen.inputs.device) if seen.mask is None else seen.mask
        if not own:
            return mask.float()
        return normalised(_received(own[0], mask), mask, low)

    return Probe(
        "call",
        lambda key: (None, 0.0, 0),
        update,
        lambda state: state[1] / max(state[2], 1),
        emit=lambda state: state[0],
    )


def normalised(
    received: Float[Tensor, "batch seq"], mask: Tensor, low: float
) -> Float[Tensor, "batch seq"]:
    """Every document from `low` to 1, then to mean 1; what is alike everywhere weighs 1."""
    kept = mask.bool()
    least = received.masked_fill(~kept, torch.inf).amin(1, keepdim=True)
    most = received.masked_fill(~kept, -torch.inf).amax(1, keepdim=True)
    spread = most - least
    share = torch.where(spread > 0, (received - least) / spread, torch.ones_like(received))
    found = (low + (1 - low) * share) * kept
    return found / (found.sum(1, keepdim=True) / kept.sum(1, keepdim=True).clamp_min(1))


def _received(call: Attention, mask: Tensor) -> Float[Tensor, "batch seq"]:
    """Attention that every key receives from all heads and from the queries that count."""
    found = torch.zeros(mask.shape, device=mask.device)
    for rows in torch.arange(mask.shape[1], device=mask.device).split(max(1, ROWS // len(mask))):
        p = call.probabilities(rows.expand(len(mask), -1))
        found += torch.einsum("bhrk,br->bk", p, mask[:, rows].to(p.dtype))
    return found
