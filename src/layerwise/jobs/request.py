"""What a user asks of the planner, and what it answers."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from layerwise.core.damage import Damage, Menu
from layerwise.core.fan import Engine
from layerwise.core.method import find
from layerwise.core.network import Network
from layerwise.core.plan import DataSpec, Identity, Plan, Step
from layerwise.core.stats import Scores
from layerwise.jobs.session import Budget

#: what makes layers narrower than they are, as dense checkpoints can be
NARROWER = frozenset({"width", "expert"})


class Request(NamedTuple):
    """What a user asks of the planner."""

    model: str | Path
    budget: Budget
    target: str = "compressed-tensors"
    method: str = ""
    score: str = ""
    allocator: str = "knapsack"
    data: DataSpec = DataSpec()
    keep: tuple[str, ...] = ()
    settings: Mapping[str, Mapping[str, Any]] = {}
    device: str = "auto"
    dtype: str = "auto"
    engine: Engine = Engine()
    rewrite: str = ""
    parts: tuple[str, ...] = ()
    allow: tuple[str, ...] = ("bits",)

    @property
    def rewrites(self) -> tuple[Step, ...]:
        """The steps of `rewrite`, such as `rotate_stream+awq`, with what was set of each."""
        names = [name for name in self.rewrite.split("+") if name]
        found = [find(name, "rewrite").name for name in names]
        return tuple(Step(name, self.options(name)) for name in found)

    @property
    def narrows(self) -> bool:
        """Whether the budget may make layers narrower."""
        return not NARROWER.isdisjoint(self.allow)

    def options(self, name: str) -> dict[str, Any]:
        """What `--set name.option=value` said of a method, by its name or an alias."""
        found = dict(self.settings.get(name, {}))
        for key in self.settings.keys() - {name, "menu"}:
            found |= self.settings[key] if find(key).name == name else {}
        return found


class Planned(NamedTuple):
    """A plan, the menus and damage behind it, and what it is expected to cost.

    `bits` and `zeros` are of a weight of the matrices that may change, on average; `note` says
    what a search went through, and `edge` has a row for every plan that was weighed.
    """

    plan: Plan
    rows: list[dict[str, Any]]
    nbytes: int
    menus: Mapping[str, Menu]
    damage: Damage | None
    scores: Scores | None
    original: int
    bits: float | None = None
    zeros: float = 0.0
    note: str = ""
    edge: Sequence[Mapping[str, Any]] = ()


def identity(network: Network) -> Identity:
    """Which model this is."""
    return Identity(network.checkpoint.structure, network.checkpoint.weights)
