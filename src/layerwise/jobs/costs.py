"""What calls of a network cost on this machine, by how many layers and tokens they run."""

import statistics
import time
from collections.abc import Sequence
from contextlib import nullcontext
from typing import NamedTuple

import numpy as np
import torch

from layerwise.core.network import Network
from layerwise.jobs.decoding import Session

#: sizes of a forward whose time is measured; others are interpolated
SIZES = (1, 2, 3, 5, 9, 17)


class Rounds(NamedTuple):
    """Means of a round: tokens that are written and proposed; shares of these that stay, and of
    rounds in which all do."""

    written: float
    drafted: float
    stays: float = 1.0
    whole: float = 1.0


class Costs(NamedTuple):
    """Seconds on this machine: of a call with its end and head, of a forward of all layers by its
    number of tokens, and of a copy of a cache that cannot be cut; and whether a verification can go
    on from the states of a draft."""

    call: float
    depth: int
    forward: tuple[float, ...]
    keeps: bool = True
    copy: float | None = None

    def of(self, tokens: float, layers: int) -> float:
        """A call that runs so many layers on so many tokens."""
        whole = float(np.interp(tokens, SIZES, self.forward))
        return self.call + max(whole - self.call, 0.0) * layers / self.depth

    def of_round(self, rounds: Rounds, exit: int, again: bool = False) -> float:
        """Drafting tokens by an exit, and verifying them by the rest or `again` by all.

        Where the cache cannot be cut, it is copied before both, and what stays is run again.
        """
        kept, drafted = self.keeps and not again, rounds.drafted
        rest = (drafted, self.depth - exit) if kept else (drafted + 1, self.depth)
        seconds = drafted * self.of(1, exit) + self.of(*rest)
        if self.copy is not None:
            cut = 1 - rounds.whole
            seconds += 2 * self.copy + cut * self.of(rounds.written, self.depth)
        return seconds


def measured_costs(network: Network, prompt: Sequence[int], repeats: int = 15) -> Costs:
    """Time calls of different depth and length in turns; medians."""
    depth = len(network.stacks[-1].wiring)
    session = Session(network, range(1, depth))
    times: dict[int, list[float]] = {size: [] for size in (0, *SIZES)}
    copies: list[float] = []
    with torch.inference_mode():
        session.start(prompt)
        for _ in range(repeats + 1):
            for size, found in times.items():
                block = nullcontext() if size else session.drafting()
                marked = time.perf_counter()
                session.past.mark()
                began = time.perf_counter()
                copies.append(began - marked)
                with block:
                    session.feed(list(prompt[:1]) * max(size, 1))
                found.append(time.perf_counter() - began)
                session.past.back(len(prompt))
    medians = {size: statistics.median(found[1:]) for size, found in times.items()}
    layer = max(medians[1] - medians[0], 0.0) / max(depth - 1, 1)
    forward = np.maximum.accumulate([medians[size] for size in SIZES])
    call = max(medians[0] - layer, 0.0)
    copy = None if session.past.cuts else statistics.median(copies)
    return Costs(call, depth, tuple(forward.tolist()), session.keeps, copy)
