"""Which experts go first: by several saliencies, of which the one is taken that measures best."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from layerwise.core.errors import LayerwiseError
from layerwise.core.find_experts import find_experts, least_experts
from layerwise.core.method import find
from layerwise.core.network import Network
from layerwise.core.stats import Scores
from layerwise.core.width import Width
from layerwise.jobs.contest import Contest
from layerwise.jobs.narrow import Candidate, Dense
from layerwise.jobs.request import Request
from layerwise.jobs.scoring import merged, stats_for
from layerwise.jobs.session import Progress

#: ways to say how much an expert adds, where none is asked for
WAYS = ("gated", "total", "norm", "frequency")


def able_experts(network: Network) -> list[Width]:
    """The experts of a network, and how few of them it can have."""
    found = find_experts(network)
    return [width._replace(least=least_experts(network, width)) for width in found]


def saliencies(
    request: Request, network: Network, progress: Progress, ways: Sequence[str] = WAYS
) -> list[Scores]:
    """How much every expert adds, in the ways that there are or the one that is asked for.

    Raises:
        LayerwiseError: the score that is asked for is none of experts, or they cannot be watched.
    """
    method = find(request.score or "expert_saliency", "score")
    if "expert_use" not in method.needs:
        raise LayerwiseError(
            f"--score {request.score}",
            allowed="expert_saliency, which says how much an expert adds",
            found=f"{method.name}, which scores no experts",
            fix="leave --score out, or set expert_saliency.by",
        )
    options = request.options(method.name)
    several = "by" in method.options and "by" not in options
    chosen = [options | {"by": way} for way in ways] if several else [options]
    stats = stats_for(request, network, method.needs, progress)
    found = [merged([method.bind(o)(s, stats) for s in network.stacks]) for o in chosen]
    if not found[0].values:
        raise LayerwiseError(
            f"--allow expert for {type(network.module).__name__}",
            allowed="experts in a module that is given tokens, numbers of experts and gates",
            found="no call of that kind",
            fix="write `units` into a plan by hand, or allow width or layer",
        )
    return found


def best_saliency(
    dense: Dense, found: Sequence[Scores], candidate: Candidate, contest: Contest, tell: Progress
) -> Scores:
    """The saliency by which a candidate has the least KL."""
    if len(found) == 1:
        return found[0]
    measured: dict[int, float] = {}
    for number, scores in enumerate(found):
        plan = replace(dense, saliency=scores).plan(candidate)
        measured[number] = contest.roughly(plan).estimate("kl").value
        tell("choosing experts", number + 1, len(found))
    return found[min(measured, key=lambda number: measured[number])]


def at_random(like: Scores, generator: torch.Generator) -> Scores:
    """A saliency of the same experts that knows nothing of them."""
    values = {key: torch.rand((), generator=generator).item() for key in like.values}
    return replace(like, values=values, origin="chance")
