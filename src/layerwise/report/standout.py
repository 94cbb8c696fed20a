"""Layers that look droppable, fragile or redundant, each with its evidence in a sentence."""

import math
import shlex
from collections.abc import Mapping, Sequence
from itertools import pairwise
from statistics import median
from typing import Any, Literal, NamedTuple

from layerwise.report.figures import Figure, figure, number, words

#: layers that a stack needs for a comparison
FEW = 4
#: how far from the median, in median deviations of a Gaussian, a layer stands apart
APART = 3.0
#: a difference of CKA that is worth a sentence
LEAST = 0.002
Kind = Literal["droppable", "fragile", "redundant"]


class Relation(NamedTuple):
    """A figure between all pairs of `rows` and `columns`, which are keys of layers or `input`."""

    title: str
    rows: Sequence[str]
    columns: Sequence[str]
    values: Sequence[Sequence[float]]


class Finding(NamedTuple):
    """What some layers look like; `apart` if they are clear of the others."""

    kind: Kind
    layers: tuple[str, ...]
    sentence: str
    apart: bool


class Findings(NamedTuple):
    """What stands out, and for each kind the command that puts it to the test."""

    found: list[Finding]
    proof: Mapping[str, str]


def stand_out(
    model: str, rows: Sequence[Mapping[str, Any]], relations: Sequence[Relation]
) -> Findings:
    """What the figures hint at; only a measured edit proves it.

    Args:
        model: its name in the commands.
        rows: a row of figures per layer, by the names of the methods.
        relations: how alike the states before and after all layers are.

    Returns:
        At most three findings of each kind and stack, and a command per kind.
    """
    stacks: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        stacks.setdefault(str(row["layer"]).rpartition("/")[0], []).append(row)
    found: list[Finding] = []
    for mine in stacks.values():
        if len(mine) >= FEW:
            fragile = _fragile(mine)
            spared = {key for one in fragile for key in one.layers}
            found += [*_droppable(mine, spared), *fragile]
    found += [one for relation in relations for one in _redundant(relation)]
    return Findings(found, _proof(shlex.quote(model), len(rows), found))


def _proof(model: str, depth: int, found: Sequence[Finding]) -> dict[str, str]:
    """A command per kind: a search that measures the loss, and what becomes of what is spared."""
    spared = next((f.layers[0] for f in found if f.kind == "fragile"), "")
    keep = f" --keep {shlex.quote(f'{spared}/*')}" if spared else ""
    span = next((len(f.layers) for f in found if f.kind == "redundant"), 1)
    return {
        "droppable": f"layerwise compress {model} --depth {depth - 1} --out shorter",
        "fragile": f"layerwise compress {model} --bits 3{keep} --out spared",
        "redundant": f"layerwise compress {model} --depth {max(depth - span, 1)} --out shorter",
    }


class _Measured(NamedTuple):
    """One figure over the layers of a stack, by layer."""

    figures: Mapping[str, Figure]

    def others(self, key: str) -> float:
        """The median of all layers but one."""
        return median(f.value for k, f in self.figures.items() if k != key)

    def apart(self, key: str) -> bool:
        """Whether a layer is far from the others, by their median and median deviation."""
        rest = [f.value for k, f in self.figures.items() if k != key]
        middle = median(rest)
        spread = 1.4826 * median(abs(x - middle) for x in rest)
        return abs(self.figures[key].value - middle) > max(APART * spread, 1e-9 * abs(middle))

    def overlaps(self, key: str) -> int:
        """How many other layers have an interval that meets this one's."""
        low, high = _ends(self.figures[key])
        ends = [_ends(f) for k, f in self.figures.items() if k != key]
        return sum(a <= high and b >= low for a, b in ends)

    def sorted(self) -> list[str]:
        """Layers from the smallest value."""
        return sorted(self.figures, key=lambda k: self.figures[k].value)


def _ends(f: Figure) -> tuple[float, float]:
    return (f.value if f.low is None else f.low, f.value if f.high is None else f.high)


def _measured(rows: Sequence[Mapping[str, Any]], name: str) -> _Measured | None:
    found = {str(r["layer"]): f for r in rows if (f := figure(r.get(name)))}
    found = {k: f for k, f in found.items() if math.isfinite(f.value)}
    return _Measured(found) if len(found) >= FEW else None


def _against(found: _Measured, key: str) -> str:
    """A value with its interval against the median of the others."""
    middle = words(Figure(found.others(key)))
    return f"{words(found.figures[key])} against a median of {middle} over the other layers"


def _droppable(rows: Sequence[Mapping[str, Any]], spared: set[str]) -> list[Finding]:
    change, effect = _measured(rows, "block_influence"), _measured(rows, "skip_effect.output")
    if change is None:
        return []
    found = []
    for key in [k for k in change.sorted() if k not in spared][: 1 + (len(rows) > 8)]:
        apart = change.apart(key) and change.figures[key].value < change.others(key)
        said = f"turns what passes through it least: block influence {_against(change, key)}."
        if found:
            said = f"is next: block influence {_against(change, key)}."
        near = change.overlaps(key)
        if change.figures[key].low is not None and near:
            layers = "one other layer" if near == 1 else f"{near} other layers"
            said += f" The intervals of {layers} overlap with its own, so the order is not settled."
        if effect is not None and key in effect.figures:
            said += f" Leaving it out moves the output by {_against(effect, key)}."
        found.append(Finding("droppable", (key,), said, apart))
    return found


def _fragile(rows: Sequence[Mapping[str, Any]]) -> list[Finding]:
    found: list[Finding] = []
    effect = _measured(rows, "skip_effect.output")
    if effect is not None:
        key = effect.sorted()[-1]
        said = f"is missed most when it is left out: the output moves by {_against(effect, key)}."
        found.append(Finding("fragile", (key,), said, effect.apart(key)))
    change = _measured(rows, "block_influence")
    if change is not None:
        key = change.sorted()[-1]
        said = f"turns what passes through it most: block influence {_against(change, key)}."
        found.append(Finding("fragile", (key,), said, change.apart(key)))
    return [*found, *_massive(rows), *_decisive(rows)]


def _massive(rows: Sequence[Mapping[str, Any]]) -> list[Finding]:
    """The layer after which one token is much longer than the others."""
    norms = _measured(rows, "spread.largest_norm")
    if norms is None:
        return []
    keys = list(norms.figures)
    steps = {b: norms.figures[b].value / norms.figures[a].value for a, b in pairwise(keys)}
    key = max(steps, key=lambda k: steps[k])
    if steps[key] < 3 or norms.figures[key].value < 10:
        return []
    said = (
        f"makes a massive token: behind it the longest state is {words(norms.figures[key])} times "
        f"as long as the median one, before it {words(norms.figures[keys[keys.index(key) - 1]])}."
        " Rounding what feeds such a token tends to cost most."
    )
    return [Finding("fragile", (key,), said, True)]


def _decisive(rows: Sequence[Mapping[str, Any]]) -> list[Finding]:
    """The layer over which the early answer comes nearest to the final one."""
    kl = _measured(rows, "lens.kl")
    if kl is None:
        return []
    keys = list(kl.figures)
    steps = {b: kl.figures[a].value - kl.figures[b].value for a, b in pairwise(keys)}
    falls = _Measured({k: Figure(v) for k, v in steps.items()})
    key = max(steps, key=lambda k: steps[k])
    if steps[key] <= 0:
        return []
    before, after = kl.figures[keys[keys.index(key) - 1]], kl.figures[key]
    said = (
        f"does most for the answer: read out early (lens), it is {words(before)} nats from the "
        f"final one before this layer and {words(after)} after it; the median step of the others "
        f"is {words(Figure(falls.others(key)))}."
    )
    return [Finding("fragile", (key,), said, falls.apart(key))]


def _redundant(relation: Relation) -> list[Finding]:
    """The runs of layers whose states before and after are most alike, a short and a long one."""
    count = len(relation.values) - 1
    if count < FEW or relation.rows[0] != "input":
        return []
    found: list[Finding] = []
    for length in dict.fromkeys((2, max(2, round(count / 4)))):
        spans = {i: relation.values[i][i + length] for i in range(count - length + 1)}
        spans = {i: v for i, v in spans.items() if math.isfinite(v)}
        if len(spans) < FEW:
            continue
        start = max(spans, key=lambda i: spans[i])
        rest = [v for i, v in spans.items() if i != start]
        middle = median(rest)
        if spans[start] - middle < LEAST:
            continue
        spread = 1.4826 * median(abs(v - middle) for v in rest)
        layers = tuple(relation.rows[start + 1 : start + length + 1])
        alike = number(spans[start], 3)
        said = (
            f"leave the states as they find them, up to a rotation and scale: CKA {alike} between "
            f"what enters the first and what leaves the last, against a median of "
            f"{number(middle, 3)} over all runs of {length} layers."
        )
        found.append(Finding("redundant", layers, said, spans[start] - middle > APART * spread))
    return found
