"""What it costs to leave layers or parts out, measured: alone, beside others, beside fewer bits."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import combinations, pairwise
from typing import Any

from layerwise.core.damage import Damage
from layerwise.core.fan import fan_out
from layerwise.core.network import Network
from layerwise.core.plan import Step
from layerwise.jobs.request import Request
from layerwise.jobs.scoring import counting, trials_for
from layerwise.jobs.session import Progress

#: chains by group, and the layers or parts that are gone
Tried = tuple[Mapping[str, tuple[Step, ...]], Collection[str]]


def tried(
    request: Request, network: Network, tasks: Sequence[Tried], what: str, progress: Progress
) -> list[float]:
    """KL on the select split of chains, just rounded, without some layers or parts."""
    tick = counting(progress, what, len(tasks))
    run = partial(_tried, trials_for(request, network).chains)
    return [kl for kl, _ in fan_out(run, tasks, request.engine, tick)]


def _tried(chains: Any, task: Tried) -> tuple[float, float]:
    return chains(*task)


def with_leaving(
    damage: Damage, layers: Sequence[str], request: Request, network: Network, progress: Progress
) -> Damage:
    """The damage of layers or parts that go, and of neighbours that go together."""
    alone, pairs = layers_alone(layers, request, network, progress)
    return replace(
        damage,
        values={**damage.values, **{layer: (0.0, kl) for layer, kl in alone.items()}},
        importance={**damage.importance, **alone},
        pairs=pairs,
    )


def layers_alone(
    layers: Sequence[str], request: Request, network: Network, progress: Progress
) -> tuple[dict[str, float], dict[tuple[str, str], float]]:
    """KL without every layer, and what two neighbours that go cost beyond the sum of both."""
    pairs = list(pairwise(layers))
    tasks: list[Tried] = [({}, gone) for gone in (*((layer,) for layer in layers), *pairs)]
    found = tried(request, network, tasks, "leaving layers out", progress)
    alone = dict(zip(layers, found, strict=False))
    both = dict(zip(pairs, found[len(layers) :], strict=True))
    return alone, {(a, b): kl - alone[a] - alone[b] for (a, b), kl in both.items()}


def as_measured(damage: Damage, gone: Sequence[str], kl: float) -> Damage:
    r"""The damage with units predicted to cost `kl` together, `n` of them.

    What is missing of it, `kl - sum_i d_i - sum_{i<j} d_ij`, is shared out evenly over their
    `n (n - 1) / 2` pairs.

    Example:
        >>> plain = Damage({u: (0.0, 1.0) for u in "abc"}, {})
        >>> as_measured(plain, "abc", 4.5).pairs
        {('a', 'b'): 0.5, ('a', 'c'): 0.5, ('b', 'c'): 0.5}
    """
    pairs = list(combinations(gone, 2))
    held = sum(damage.values[unit][-1] for unit in gone)
    more = kl - held - sum(damage.pairs.get(pair, 0.0) for pair in pairs)
    changed = {pair: damage.pairs.get(pair, 0.0) + more / len(pairs) for pair in pairs}
    return replace(damage, pairs={**damage.pairs, **changed})
