"""Quality per document and its uncertainty: loss, KL and agreement on the same positions."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor


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


def compare(
    original: Float[Tensor, "batch seq words"] | None,
    edited: Float[Tensor, "batch seq words"],
    ids: Int[Tensor, "batch seq"],
) -> tuple[float, float, float, float]:
    """Tokens, loss, KL(original || edited) and agreements of one document, in float32.

    `KL = sum_w p(w) (log p(w) - log q(w))`, summed over the positions that predict a token.
    """
    targets = ids[:, 1:].to(edited.device)
    q = edited[:, :-1].float().log_softmax(-1)
    loss = -q.gather(-1, targets[..., None]).double().sum().item()
    if original is None:
        return float(targets.numel()), loss, 0.0, float(targets.numel())
    p = original[:, :-1].float().log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1).double().sum().item()
    agree = (p.argmax(-1) == q.argmax(-1)).sum().item()
    return float(targets.numel()), loss, max(kl, 0.0), float(agree)


def measure_quality(
    batches: Sequence[Any],
    edited: Callable[[Any], Tensor],
    original: Callable[[Any], Tensor] | None = None,
) -> Quality:
    """Run both models on every document and gather the sums."""
    rows = []
    with torch.no_grad():
        for batch in batches:
            before = None if original is None else original(batch)
            rows.append(compare(before, edited(batch), batch["input_ids"]))
    tokens, loss, kl, agree = (np.array(column) for column in zip(*rows, strict=True))
    return Quality(tokens, loss, kl, agree)
