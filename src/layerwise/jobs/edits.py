"""Searching edits of weights: which group gets which option, by the loss that it gives."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from layerwise.core.damage import Choice, Menu, cost
from layerwise.core.errors import LayerwiseError
from layerwise.core.fan import fan_out
from layerwise.core.method import find
from layerwise.core.network import Network
from layerwise.core.plan import Step
from layerwise.core.search import Space
from layerwise.jobs.request import Request
from layerwise.jobs.scoring import counting, trials_for
from layerwise.jobs.session import Progress

#: edits of a state: groups and the numbers of their options
Edits = tuple[tuple[str, int], ...]


class Searched(NamedTuple):
    """The best choice that a search came by, how many it tried, and the loss before and after."""

    choice: Choice
    tried: int
    before: float
    after: float

    def __str__(self) -> str:
        return (
            f"{self.tried} edits tried, loss of the select split {self.before:.4f} before and "
            f"{self.after:.4f} with the best"
        )


def search_edits(
    request: Request,
    network: Network,
    menus: Mapping[str, Menu],
    limit: int,
    progress: Progress,
) -> Searched:
    """Edit one group after the other, each where the measured loss of the select split is least.

    No edit is taken that does not lower it. Options are tried without statistics, so that chains
    which use some are tried as what they are without.

    Raises:
        LayerwiseError: the network as it is exceeds the budget.
    """
    if cost(menus, dict.fromkeys(menus, 0)) > limit:
        raise LayerwiseError(
            f"--score {request.score}",
            allowed="a budget that the network as it is meets, such as --size 100%",
            found=", ".join(f"--{k} {v}" for k, v in request.budget.as_dict().items()),
            fix="search for a lower loss at full size, or allocate a smaller budget by a score",
        )
    trials = trials_for(request, network)
    places = [(g, i) for g, menu in menus.items() for i in range(1, len(menu.options))]
    tick = counting(progress, "trying edits", len(places))

    def chosen(edits: Edits) -> Choice:
        return {**dict.fromkeys(menus, 0), **dict(edits)}

    def chains(edits: Edits) -> dict[str, tuple[Step, ...]]:
        return {group: menus[group].options[number].chain for group, number in edits}

    def evaluate(states: Sequence[Edits]) -> list[float]:
        return fan_out(trials.loss, [chains(state) for state in states], request.engine, tick)

    def moves(edits: Edits) -> list[Any]:
        taken = dict(edits)
        ahead = (tuple(sorted((*edits, place))) for place in places if place[0] not in taken)
        return [state for state in ahead if cost(menus, chosen(state)) <= limit]

    method = find(request.score, "search")
    generator = torch.Generator().manual_seed(request.data.seed)
    search = method.bind(request.options(method.name), generator=generator)
    trace = search(Space((), moves, lambda edits: False, optional=True), evaluate, 10_000)
    return Searched(chosen(trace.state), len(trace.values) - 1, trace.values[()], trace.value)
