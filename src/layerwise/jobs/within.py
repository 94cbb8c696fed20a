"""The fewest bytes with which a plan stays within a KL that is measured, not believed."""

from typing import Any

from layerwise.core.damage import cost, total
from layerwise.core.errors import LayerwiseError
from layerwise.core.method import find
from layerwise.core.network import Network
from layerwise.core.target import Target
from layerwise.jobs.bits import assemble, chosen, least_bytes, priced
from layerwise.jobs.contest import contest_on
from layerwise.jobs.joint import menus_with_layers, priced_with_layers
from layerwise.jobs.menus import make_menus, units, worth_it
from layerwise.jobs.request import Planned, Request
from layerwise.jobs.session import Progress

#: plans that are solved and measured at most; the share of the matrices' bytes that two sizes
#: must differ by
SOLVED, STEP = 8, 0.004


def plan_within(request: Request, network: Network, target: Target, progress: Progress) -> Planned:
    """The smallest plan of an allocator whose measured KL is within the budget.

    Sizes are bisected, not in the middle but where the predicted damage, corrected by what the
    last plan came to over its own prediction, meets the bound. Every plan on the way is solved on
    a little text and measured on the select split; the upper end of its interval must be within
    the bound. The smallest that is, is taken.

    Raises:
        LayerwiseError: none that was measured is within the bound; the nearest is told.
    """
    bound = request.budget.kl or 0.0
    groups = {g.key: g for g in units(network, target)}
    if {"layer", "part"} & {*request.allow}:
        menus = menus_with_layers(request, network, target, groups)
        _, offer = priced_with_layers(request, network, target, menus, groups, progress)
    else:
        menus = worth_it(make_menus(request, network, target))
        offer = priced(request, network, target, menus, groups, progress)
    contest = contest_on(request, network)
    low, high = least_bytes(menus) - 1, cost(menus, dict.fromkeys(menus, 0)) + 1
    step = max(1, int(STEP * high))
    ratio = float(offer.scores is not None and offer.scores.nats)
    rows: list[dict[str, Any]] = []
    best: Planned | None = None

    def predicted(size: int) -> float:
        return total(offer.damage, menus, chosen(request, offer, size))

    def guess() -> int:
        """The least size between both that is predicted to be within the bound."""
        if not ratio:
            return (low + high) // 2
        below, above, middle = low, high, low + 1
        while above - below > step:
            fits = predicted(middle) * ratio <= bound
            below, above = (below, middle) if fits else (middle, above)
            middle = (below + above) // 2
        return above

    while len(rows) < SOLVED and high - low > step:
        least = low + (step if rows else 1)
        choice = chosen(request, offer, max(least, min(guess(), high - step)))
        found = assemble(request, network, target, menus, offer.damage, choice, offer.scores)
        believed = total(offer.damage, menus, choice)
        kl = contest.roughly(found.plan).estimate("kl")
        within = kl.high <= bound
        rows.append(_row(found, believed, kl))
        progress("solving plans", len(rows), SOLVED)
        size = cost(menus, choice)
        best, low, high = (found, low, size) if within else (best, max(size, least), high)
        ratio = kl.high / believed if believed > 0 else 0.0
    if best is None:
        nearest = min(rows, key=lambda row: row["high"])
        raise LayerwiseError(
            "budget",
            allowed=f"a KL that a plan was measured to have, such as --kl {nearest['high']:.2g}",
            found=f"--kl {bound}",
            fix="raise it, allow larger options with --set menu.bits, or pin matrices with --keep",
        )
    rows[[row["bytes"] for row in rows].index(best.nbytes)]["chosen"] = True
    return best._replace(edge=rows)


def _row(planned: Planned, predicted: float, kl: Any) -> dict[str, Any]:
    words = f"{planned.bits:.2f} bits" if planned.bits else f"{planned.nbytes} bytes"
    gone = sum(row["option"] == "left out" for row in planned.rows)
    return {
        "plan": f"{words}, {gone} layer{'s' * (gone > 1)} left out" if gone else words,
        "bytes": planned.nbytes,
        "predicted": predicted,
        "expected": kl.value,
        "high": kl.high,
        "chosen": False,
    }


def check_within(request: Request) -> None:
    """What a bound on the KL can be met with.

    Raises:
        LayerwiseError: the request asks for something else.
    """
    search = request.score and find(request.score).family == "search"
    asked = {
        f"--allow {','.join(request.allow)}": request.narrows,
        f"--rewrite {request.rewrite}": bool(request.rewrite),
        f"--parts {'+'.join(request.parts)}": bool(request.parts),
        f"--score {request.score}": search,
        f"--target {request.target} without --method": not request.method,
    }
    wrong = [what for what, so in asked.items() if so]
    if wrong:
        raise LayerwiseError(
            f"--kl {request.budget.kl}",
            allowed="layers, bits, ranks and zeros that an allocator chooses",
            found=", ".join(wrong),
            fix="leave that out, or give a size: --bits, --size or --bytes",
        )
