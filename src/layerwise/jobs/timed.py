"""How fast shorter and narrower networks decode on this machine: measured, not assumed."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from layerwise.core.machine import check_memory
from layerwise.core.open import rewired
from layerwise.core.width import narrowed_config
from layerwise.jobs.forecast import memory_of_models
from layerwise.jobs.measure import speeds
from layerwise.jobs.narrow import Candidate, Dense
from layerwise.jobs.units import wiring_without

#: rounds of every comparison; of what was asked for, what the spread of a few rounds may take
ROUNDS, CLOSE = 5, 0.97


class Clock:
    """The original with random weights, which take as long, and others beside it."""

    def __init__(self, dense: Dense, batches: Sequence[Any]) -> None:
        check_memory(memory_of_models(dense.network, 2))
        self.dense, self.batches = dense, batches
        self.original = self._built(dense.whole)

    def speed(self, candidate: Candidate) -> float:
        """Tokens per second over those of the original: decoded, or read where none are decoded.

        The median of interleaved rounds, at batch 1 behind 128 tokens.
        """
        found = speeds([self.original, self._built(candidate)], self.batches, ROUNDS)
        before, after = (decode or prefill for prefill, decode in found)
        return after / before

    def _built(self, candidate: Candidate) -> nn.Module:
        network = self.dense.network
        order = wiring_without(network, candidate.gone)
        config = (rewired(network, order) if order else network).model.config
        shape = narrowed_config(config, self.dense.fields(candidate))
        module: nn.Module = type(network.model)(shape)
        return nn.Module.to(module, network.device, network.dtype).eval()

    def times(self, sets: Sequence[tuple[str, ...]]) -> Callable[[Candidate], float]:
        """Predicted time of a candidate as a share of the original's, from a few that are measured.

        Every width at half of its units, and the shortest network: what they save is a line.
        """
        whole, depth = self.dense.whole, len(self.dense.network.layers())
        shortest = max(sets, key=len)
        layer = (1 - 1 / self.speed(Candidate(shortest, whole.units))) / len(shortest or "-")
        saved = {}
        for width in self.dense.widths:
            if not width.read:  # a token runs as many experts among fewer
                saved[width.name] = 0.0
                continue
            half = whole._replace(units={**whole.units, width.name: width.units // 2})
            saved[width.name] = 2 * (1 - 1 / self.speed(half))

        def time(candidate: Candidate) -> float:
            left = 1 - len(candidate.gone) / depth
            shares = ((w, 1 - candidate.units[w.name] / w.units) for w in self.dense.widths)
            narrower = sum(saved[w.name] * share for w, share in shares)
            return 1 - layer * len(candidate.gone) - left * narrower

        return time
