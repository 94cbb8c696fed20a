"""What a search walks on, and what it leaves behind."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple


class Space(NamedTuple):
    """Hashable states: a start, the moves out of each, and which states are goals.

    With `optional` every state is acceptable and a search stops when moves no longer improve.
    """

    start: Any
    moves: Callable[[Any], list[Any]]
    goal: Callable[[Any], bool]
    optional: bool = False


@dataclass
class Trace:
    """The evaluations of a search in order, and its result."""

    state: Any
    value: float = float("inf")
    values: dict[Any, float] = field(default_factory=dict)

    def ask(
        self, evaluate: Callable[[Sequence[Any]], list[float]], states: Sequence[Any]
    ) -> list[float]:
        """Evaluate states, each once, those that are new together."""
        new = [state for state in dict.fromkeys(states) if state not in self.values]
        self.values |= zip(new, evaluate(new) if new else [], strict=True)
        return [self.values[state] for state in states]

    def close(self, space: Space) -> "Trace":
        """Settle on the best goal that was seen, else on the start."""
        goals = [s for s in self.values if space.optional or space.goal(s)] or [space.start]
        self.state = min(goals, key=lambda s: self.values[s])
        self.value = self.values[self.state]
        return self
