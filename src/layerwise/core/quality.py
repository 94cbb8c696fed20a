"""Quality per document and its uncertainty: loss, KL and agreement on the same positions."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from layerwise.core.task import labels_of


class Estimate(NamedTuple):
    """A value with its 95% bootstrap interval over documents."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}]"


@dataclass(frozen=True)
class Quality:
    """Sums per document: predicted tokens, loss and KL in nats, and agreeing top choices."""

    tokens: np.ndarray
    loss: np.ndarray
    kl: np.ndarray
    agree: np.ndarray

    def estimate(self, field: str) -> Estimate:
        """Mean per token of `loss`, `kl` or `agree`."""
        return ratio(getattr(self, field), self.tokens)

    def against(self, other: "Quality", field: str = "kl") -> Estimate:
        """This one's sum over the other's, both resampled together."""
        return ratio(getattr(self, field), getattr(other, field))

    def rise(self, original: "Quality") -> Estimate:
        """Rise of the loss over the original's, paired by document."""
        return ratio(self.loss - original.loss, self.tokens)


def ratio(above: np.ndarray, below: np.ndarray, draws: int = 2000) -> Estimate:
    """`sum(above) / sum(below)` with the 2.5% and 97.5% quantiles over resampled documents."""
    rng = np.random.default_rng(0)
    chosen = rng.integers(0, len(above), (draws, len(above)))
    drawn = above[chosen].sum(1) / np.maximum(below[chosen].sum(1), 1e-300)
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Estimate(float(above.sum() / max(below.sum(), 1e-300)), float(low), float(high))


def divergence(
    logp: Float[Tensor, "*rows classes"], logq: Float[Tensor, "*rows classes"]
) -> Float[Tensor, "*rows"]:
    """`KL(p || q) = sum_c p(c) (log p(c) - log q(c))` of every row, in nats.

    Example:
        >>> p, q = torch.tensor([0.5, 0.5]), torch.tensor([0.25, 0.75])
        >>> divergence(p.log(), q.log())
        tensor(0.1438)
    """
    return (logp.exp() * (logp - logq)).sum(-1)


def compare(
    original: Float[Tensor, "rows classes"] | None,
    edited: Float[Tensor, "rows classes"],
    labels: Int[Tensor, " rows"] | None,
) -> Float[Tensor, "rows 4"]:
    """Count, loss, KL(original || edited) and agreement of every row of an answer.

    In float32, where the edited network was computed. Where nobody knows the labels, they are what
    the original answers.
    """
    q = edited.float().log_softmax(-1)
    p = q if original is None else original.to(q.device).float().log_softmax(-1)
    wanted = p.argmax(-1) if labels is None else labels.to(q.device)
    loss = -q.gather(-1, wanted[:, None])[:, 0]
    kl = divergence(p, q)
    agree = (p.argmax(-1) == q.argmax(-1)).to(loss)
    return torch.stack([torch.ones_like(loss), loss, kl, agree], 1).double().cpu()


def measure_quality(
    batches: Sequence[Any], original: Callable[[Any], Tensor], *edited: Callable[[Any], Tensor]
) -> tuple[Quality, ...]:
    """Run all models side by side on every document, batch -> answer, and gather the sums.

    The first one is the original, whose own quality comes first. A batch is one document, but
    where its inputs get one answer each, they are.
    """
    sums: list[list[Tensor]] = [[] for _ in (original, *edited)]
    with torch.no_grad():
        for batch in batches:
            before, labels = original(batch), labels_of(batch)
            inputs = len(next(iter(batch.values())))
            compared = [compare(None, before, labels)]
            compared += [compare(before, model(batch), labels) for model in edited]
            for rows, found in zip(sums, compared, strict=True):
                rows.extend(found if len(found) == inputs else [found.sum(0)])
    gathered = (torch.stack(rows).numpy().T for rows in sums)
    return tuple(Quality(n, loss, np.maximum(kl, 0.0), agree) for n, loss, kl, agree in gathered)
