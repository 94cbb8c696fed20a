"""What calls of a network cost on this machine, by how many layers and tokens they run."""

import statistics
import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from layerwise.core.network import Network
from layerwise.jobs.decoding import Session

#: sizes of a forward whose time is measured; others are interpolated
SIZES = (1, 2, 3, 5, 9, 17)


class Costs(NamedTuple):
    """Seconds on this machine: of a call with its end and head, and of a forward of all layers by
    its number of tokens; and whether a verification goes on from the states of the draft."""

    call: float
    depth: int
    forward: tuple[float, ...]
    keeps: bool = True

    def of(self, tokens: float, layers: int) -> float:
        """A call that runs so many layers on so many tokens."""
        whole = float(np.interp(tokens, SIZES, self.forward))
        return self.call + max(whole - self.call, 0.0) * layers / self.depth

    def of_round(self, drafted: float, exit: int) -> float:
        """Drafting so many tokens by an exit, and verifying them."""
        rest = (drafted, self.depth - exit) if self.keeps else (drafted + 1, self.depth)
        return drafted * self.of(1, exit) + self.of(*rest)


def measured_costs(network: Network, prompt: Sequence[int], repeats: int = 15) -> Costs:
    """Time calls of different depth and length in turns; medians."""
    depth = len(network.stacks[-1].wiring)
    session = Session(network, range(1, depth))
    times: dict[int, list[float]] = {size: [] for size in (0, *SIZES)}
    with torch.inference_mode():
        session.start(prompt)
        for _ in range(repeats + 1):
            for size, found in times.items():
                began = time.perf_counter()
                if size:
                    session.feed(list(prompt[:1]) * size)
                else:
                    with session.drafting():
                        session.feed(prompt[:1])
                session.cut(len(prompt))
                found.append(time.perf_counter() - began)
    medians = {size: statistics.median(found[1:]) for size, found in times.items()}
    layer = max(medians[1] - medians[0], 0.0) / max(depth - 1, 1)
    forward = np.maximum.accumulate([medians[size] for size in SIZES])
    call = max(medians[0] - layer, 0.0)
    return Costs(call, depth, tuple(forward.tolist()), session.keeps)
