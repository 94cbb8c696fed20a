"""Small inline drawings for the rows of a table: cells of a layer, bars, points with whiskers.

Positions are percentages of the drawing's width, so it may be as wide as its place allows while
text and strokes keep their size.
"""

import math
import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import NamedTuple

from layerwise.core.plan import GONE
from layerwise.report.figures import Figure, words

AS_IS = 16
NUMBERED = 24


class Cell(NamedTuple):
    """One cell of a layer's bar: colour class, few characters, and what it says on hover."""

    color: str
    text: str
    title: str


def bits_of(label: str) -> int | None:
    """Bits per weight that a label names: 16 for "as is", `None` where it names none.

    Example:
        >>> bits_of("gptq 3 bits g128"), bits_of("as is"), bits_of("rank 64")
        (3, 16, None)
    """
    found = re.search(r"(\d+) bits?\b", label)
    if found:
        return int(found.group(1))
    return AS_IS if label.strip() in ("", "as is", "as it is") else None


def bits_color(label: str) -> str:
    """The colour class of a label: b1 to b8, b16, bx where it names no bits, or gone."""
    if label == GONE:
        return "gone"
    bits = bits_of(label)
    if bits is None:
        return "bx"
    return f"b{max(bits, 1) if bits <= 8 else AS_IS}"


def bits_cells(layer: str, groups: Mapping[str, str], columns: Sequence[str]) -> list[Cell | None]:
    """The cells of one layer, `None` where it has no such group."""
    cells: list[Cell | None] = []
    for name in columns:
        label = groups.get(name)
        if label is None:
            cells.append(None)
            continue
        bits = bits_of(label)
        text = "" if bits is None or bits == AS_IS else str(bits)
        cells.append(Cell(bits_color(label), text, f"{layer} {name}: {label or 'as is'}"))
    return cells


def bar_of_cells(cells: Sequence[Cell | None], says: str) -> str:
    """One layer: cells side by side on the residual stream, which runs on to the next layer."""
    drawn, step = [], 100 / max(len(cells), 1)
    for i, cell in enumerate(cells):
        if cell is None:
            continue
        text = ""
        if cell.text and len(cells) <= NUMBERED:
            text = f'<text x="{(i + 0.5) * step:.3f}%" y="50%">{escape(cell.text)}</text>'
        drawn.append(
            f'<g class="{cell.color}"><title>{escape(cell.title)}</title>'
            f'<rect x="{i * step:.3f}%" y="10%" width="{step:.3f}%" height="80%"/>{text}</g>'
        )
    return _row(says, "".join(drawn), "row" if len(cells) <= NUMBERED else "row dense")


def bar_dropped(says: str) -> str:
    """A layer that is gone: an outline through which the residual stream runs unchanged."""
    return _row(
        says,
        f'<g class="gone"><title>{escape(says)}</title>'
        '<rect x="0.2%" y="12%" width="99.6%" height="76%" rx="2"/>'
        '<text x="50%" y="50%">dropped</text></g>',
    )


def _row(says: str, inside: str, kind: str = "row") -> str:
    spine = '<line class="spine" x1="50%" x2="50%" y1="0" y2="100%"/>'
    return f'<svg class="{kind}" role="img" aria-label="{escape(says)}">{spine}{inside}</svg>'


def bar(value: float, most: float, whole: float | None, says: str) -> str:
    """A value from zero, before a pale bar of what it was once."""
    most = max(most, 1e-300)
    track = "" if whole is None else _rect("track", whole / most)
    return _mark(says, f"{track}{_rect('fill', value / most)}")


def _rect(color: str, share: float) -> str:
    width = 100 * min(max(share, 0), 1)
    return f'<rect class="{color}" x="0" y="25%" height="50%" width="{width:.2f}%"/>'


def dot(found: Figure, low: float, high: float, says: str) -> str:
    """A value, with its interval where there is one, between the ends of its column."""

    def at(x: float) -> str:
        return f"{4 + 92 * min(max((x - low) / (high - low), 0), 1) if high > low else 50:.2f}%"

    whisker = ""
    if found.low is not None and found.high is not None:
        ends = f'x1="{at(found.low)}" x2="{at(found.high)}"'
        whisker = f'<line class="whisker" {ends} y1="50%" y2="50%"/>'
    track = '<line class="track" x1="0" x2="100%" y1="50%" y2="50%"/>'
    return _mark(says, f'{track}{whisker}<circle cx="{at(found.value)}" cy="50%" r="3.2"/>')


def _mark(says: str, inside: str) -> str:
    return f'<svg class="mark" aria-hidden="true"><title>{escape(says)}</title>{inside}</svg>'


def ratio_strip(found: Figure, name: str) -> str:
    """A ratio with its interval on a logarithmic line on which 1 is marked."""
    reach = [x for x in found.reach if x > 0]
    if not reach or found.value <= 0 or not math.isfinite(found.value):
        return ""
    low, high = min(*reach, 0.5) / 1.25, max(*reach, 1.0) * 1.25

    def at(x: float) -> str:
        return f"{100 * math.log(min(max(x, low), high) / low) / math.log(high / low):.2f}%"

    def label(x: float, y: int, kind: str, text: str) -> str:
        share = math.log(x / low) / math.log(high / low)
        anchor = "start" if share < 0.3 else "end" if share > 0.7 else "mid"
        return f'<text class="{kind} {anchor}" x="{at(x)}" y="{y}">{escape(text)}</text>'

    text = words(found)
    whisker = ""
    if found.low is not None and found.high is not None:
        ends = f'x1="{at(found.low)}" x2="{at(found.high)}"'
        whisker = f'<line class="whisker" {ends} y1="30" y2="30"/>'
    says = f"{name}, plan over naive: {text}"
    return (
        f'<svg class="ratio" role="img" aria-label="{escape(says)}"><title>{escape(says)}</title>'
        '<line class="axis" x1="0" x2="100%" y1="30" y2="30"/>'
        f'<line class="one" x1="{at(1)}" x2="{at(1)}" y1="16" y2="44"/>'
        f'{whisker}<circle cx="{at(found.value)}" cy="30" r="5"/>'
        f"{label(1, 58, 'small', '1, as naive')}{label(found.value, 14, 'value', str(text))}</svg>"
    )
