"""Greedy search over any space of moves."""

from collections.abc import Callable, Sequence
from typing import Any

from layerwise.core.method import method
from layerwise.core.search import Space, Trace


@method("search")
def greedy(
    space: Space,
    evaluate: Callable[[Sequence[Any]], list[float]],
    limit: int,
    *,
    patience: int = 0,
) -> Trace:
    """Take the best move, again and again, until the space says that it is enough.

    Args:
        space: where to start, which moves there are, and when a state is a goal.
        evaluate: states -> their losses; less is better. None is evaluated twice.
        limit: how many evaluations there may be.
        patience: how many moves in a row may fail to improve where no goal asks for them.

    Returns:
        The best state that is a goal, its value, and every evaluation in order.

    Example:
        >>> space = Space((3, 2), lambda s: [(s[0] - 1, s[1]), (s[0], s[1] - 1)],
        ...               lambda s: sum(s) <= 3)
        >>> greedy(space, lambda states: [s[0] ** 2 + s[1] for s in states], 100).state
        (1, 2)
    """
    trace = Trace(space.start)
    state, waited = space.start, 0
    (best,) = trace.ask(evaluate, [state])
    passed = set()
    while not space.goal(state) and len(trace.values) < limit and waited <= patience:
        passed.add(state)
        ahead = [move for move in space.moves(state) if move not in passed]
        moves = ahead[: limit - len(trace.values)]
        if not moves:
            break
        value, number = min((v, i) for i, v in enumerate(trace.ask(evaluate, moves)))
        state = moves[number]
        waited = waited + 1 if space.optional and value >= best else 0
        best = min(best, value)
    return trace.close(space)
