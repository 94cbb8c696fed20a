"""Figures over layers as strips: a row per figure, a cell per layer, each row on its own scale."""

import math
from collections.abc import Mapping, Sequence
from html import escape
from statistics import quantiles
from typing import Any, NamedTuple

from layerwise.report.embed import FAR, embedded, short
from layerwise.report.figures import DASH, Figure, column_decimals, figure, words

#: what a row says beside its figures
NO_FIGURE = ("layer", "parts", "bytes", "matrices")
#: the group of measures that are one figure
SINGLE = "in and out"
#: figures of a group that are shown at first
SHOWN = 5
#: layers up to which a cell holds its number, and beyond which not every layer is named
NUMBERED, NAMED = 14, 40


class Strip(NamedTuple):
    """One figure over all layers; `low` and `high` end its scale, `signed` puts 0 in the middle."""

    key: str
    group: str
    name: str
    figures: Sequence[Figure | None]
    low: float
    high: float
    signed: bool

    def place(self, value: float) -> float:
        """Where a value is on the scale: 0 to 100, or -100 to 100 around 0."""
        if self.signed:
            most = max(abs(self.low), abs(self.high)) or 1.0
            return 100 * min(max(value / most, -1), 1)
        span = self.high - self.low
        return 100 * min(max((value - self.low) / span, 0), 1) if span > 0 else 50.0

    def beyond(self, value: float) -> bool:
        """Whether a value is off the scale."""
        if self.signed:
            return abs(value) > max(abs(self.low), abs(self.high))
        return not self.low <= value <= self.high


def strips(rows: Sequence[Mapping[str, Any]]) -> list[Strip]:
    """Every figure that any layer has; measures with one figure stand first.

    Example:
        >>> [s.name for s in strips([{"layer": "a/0", "lens.kl": 1.0, "update_norm": 0.5}])]
        ['update norm', 'kl']
    """
    keys = dict.fromkeys(k for row in rows for k in row if k not in NO_FIGURE)
    found = []
    for key in sorted(keys, key=lambda k: ("." in k, k != "block_influence")):
        figures = [figure(row.get(key)) for row in rows]
        known = [f.value for f in figures if f and math.isfinite(f.value)]
        if known:
            group, _, name = key.rpartition(".")
            low, high = scale_of(known)
            signed = min(known) < 0 < max(known)
            name = name.replace("_", " ")
            found.append(Strip(key, group or SINGLE, name, figures, low, high, signed))
    return found


def scale_of(values: Sequence[float]) -> tuple[float, float]:
    """The ends of a scale: those of the values, but Tukey's fences where some are far beyond.

    Example:
        >>> scale_of([1.0, 2.0, 3.0, 4.0]), scale_of([1.0, 2.0, 3.0, 4.0, 100.0])
        ((1.0, 4.0), (1.0, 10.0))
    """
    low, high = min(values), max(values)
    if len(values) < 5:
        return low, high
    first, _, third = quantiles(values, n=4, method="inclusive")
    reach = 3 * (third - first)
    return (max(low, first - reach), min(high, third + reach)) if reach else (low, high)


def figures_section(section: Mapping[str, Any]) -> str:
    """The strips of all figures, with what each group is."""
    rows = section.get("layers") or []
    found = strips(rows)
    if not found:
        return '<p class="note">No figures.</p>'
    keys = [str(row["layer"]) for row in rows]
    says: Mapping[str, str] = section.get("groups") or {}
    groups: dict[str, list[Strip]] = {}
    for strip in found:
        groups.setdefault(strip.group, []).append(strip)
    ordered = [strip for group in groups.values() for strip in group]
    bodies = "".join(_body(name, mine, says, keys) for name, mine in groups.items())
    data = {
        "layers": keys,
        "columns": [
            {
                **{k: getattr(s, k) for k in ("key", "group", "name", "low", "high", "signed")},
                "values": [None if f is None else float(f"{f.value:.6g}") for f in s.figures],
            }
            for s in ordered
        ],
    }
    kind = " numbers" if len(keys) <= NUMBERED else " dense" if len(keys) > NAMED else ""
    return (
        f'<p class="lead">Left to right from input to output; every row on its own scale. '
        '<span class="script">Sort the layers by a row with its name; read a cell with the pointer '
        "or the arrow keys.</span></p>"
        f"{_legend(found)}"
        f'<p class="readout script" aria-live="polite">&nbsp;</p>'
        f'<div class="scroll" tabindex="0" role="region" aria-label="Figures by layer">'
        f'<table class="strips{kind}" role="grid" style="--n:{len(keys)}">'
        f"{_head(keys)}{bodies}</table></div>{embedded('figures', data)}"
    )


def _legend(found: Sequence[Strip]) -> str:
    signed = any(s.signed for s in found)
    beyond = any(f and s.beyond(f.value) for s in found for f in s.figures)
    keys = '<span>low <i class="ramp"></i> high</span>'
    keys += '<span>below 0 <i class="ramp signed"></i> above</span>' if signed else ""
    keys += '<span><i class="cell beyond"></i>beyond the scale</span>' if beyond else ""
    return f'<p class="legend">{keys}</p>'


def _head(keys: Sequence[str]) -> str:
    stacks: dict[str, int] = {}
    for key in keys:
        stack = key.rpartition("/")[0]
        stacks[stack] = stacks.get(stack, 0) + 1
    named = "".join(
        f'<th scope="colgroup" colspan="{count}" class="first"><span>{escape(name)}</span></th>'
        for name, count in stacks.items()
    )
    first = _firsts(keys)
    every = 1 if len(keys) <= NAMED else 10
    cells = "".join(
        f'<th scope="col" data-i="{i}"{" class=first" * (i in first)} title="{escape(key)}">'
        f"<span{' class=tick' * (int(short(key)) % every == 0)}>{escape(short(key))}</span></th>"
        for i, key in enumerate(keys)
    )
    return (
        f'<thead><tr class="stacks"><td></td>{named}<td></td></tr>'
        f'<tr><th scope="col"><button type="button" data-order>layer</button></th>{cells}'
        '<th scope="col" class="range">range</th></tr></thead>'
    )


def _firsts(keys: Sequence[str]) -> set[int]:
    """Where a stack begins."""
    names = [key.rpartition("/")[0] for key in keys]
    return {i for i, name in enumerate(names) if i == 0 or names[i - 1] != name}


def _body(name: str, mine: Sequence[Strip], says: Mapping[str, str], keys: Sequence[str]) -> str:
    more = len(mine) - SHOWN
    button = (
        f'<button type="button" class="more script" aria-expanded="false">{more} more</button>'
        if more > 0
        else ""
    )
    said = f'<span class="dim">{escape(says.get(name, ""))}</span>'
    head = (
        f'<tr class="group"><th scope="rowgroup" colspan="{len(keys) + 2}"><div>'
        f"<b>{escape(name.replace('_', ' '))}</b>{said}{button}</div></th></tr>"
    )
    firsts = _firsts(keys)
    rows = "".join(_row(s, i >= SHOWN, firsts) for i, s in enumerate(mine))
    return f"<tbody>{head}{rows}</tbody>"


def _row(strip: Strip, extra: bool, firsts: set[int]) -> str:
    digits = column_decimals(strip.figures)
    cells = []
    for i, found in enumerate(strip.figures):
        kinds = ["first"] * (i in firsts)
        if found is None or not math.isfinite(found.value):
            cells.append(f'<td class="{" ".join([*kinds, "no"])}"><span>{DASH}</span></td>')
            continue
        place = strip.place(found.value)
        kinds += ["h"] * (abs(place) > FAR) + ["beyond"] * strip.beyond(found.value)
        kind = f' class="{" ".join(kinds)}"' if kinds else ""
        text = escape(words(Figure(found.value), decimals=digits).value)
        whole = f' title="{escape(str(words(found)))}"' if found.low is not None else ""
        cells.append(f'<td{kind} style="--t:{place:.0f}"{whole}><span>{text}</span></td>')
    known = [f.value for f in strip.figures if f and math.isfinite(f.value)]
    ends = [words(Figure(x)).value for x in (min(known), max(known))]
    kind = " ".join(["extra"] * extra + ["signed"] * strip.signed)
    return (
        f"<tr{f' class={chr(34)}{kind}{chr(34)}' if kind else ''}>"
        f'<th scope="row"><button type="button">{escape(strip.name)}</button></th>'
        f'{"".join(cells)}<td class="range">{escape(f" {DASH} ".join(ends))}</td></tr>'
    )
