"""How alike the states of all layers are, and how their variance is spread over directions."""

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

from layerwise.report.embed import embedded, short
from layerwise.report.figures import SUPERSCRIPTS
from layerwise.report.standout import Relation


class Spectrum(NamedTuple):
    """Values by rank of every layer, largest first: (rank, value) by key."""

    title: str
    unit: str
    curves: Mapping[str, Sequence[tuple[int, float]]]


def alike_section(section: Mapping[str, Any]) -> str:
    """Maps of layers by layers, painted by the page's script."""
    maps: Sequence[Relation] = section.get("maps") or []
    drawn = []
    for m in maps:
        shape = f"{len(m.rows)} by {len(m.columns)}"
        drawn.append(
            f'<figure class="map"><figcaption>{escape(m.title)}</figcaption><div class="square">'
            f'<canvas tabindex="0" role="img" aria-label="{escape(m.title)}, {shape}"></canvas>'
            f'<div class="xs">{_ticks("left", m.columns)}</div>'
            f'<div class="ys">{_ticks("top", m.rows)}</div></div></figure>'
        )
    return (
        '<p class="lead">Each square compares the states after two layers, whatever rotation lies '
        "between them: dark blocks are runs of layers that keep what they got.</p>"
        '<noscript><p class="note">The maps need scripts.</p></noscript>'
        '<p class="readout script" aria-live="polite">&nbsp;</p>'
        f'<div class="maps">{"".join(drawn)}</div>{embedded("maps", [m._asdict() for m in maps])}'
    )


def _ticks(side: str, keys: Sequence[str], most: int = 8) -> str:
    """The names of some layers, at the middle of their rows or columns."""
    every = math.ceil(len(keys) / most)
    return "".join(
        f'<span style="{side}:{100 * (i + 0.5) / len(keys):.1f}%">{escape(short(key))}</span>'
        for i, key in enumerate(keys)
        if i % every == 0
    )


def spectra_section(section: Mapping[str, Any]) -> str:
    """One drawing per kind of spectrum, in it one curve per layer."""
    drawn = "".join(map(_drawing, section.get("spectra") or ()))
    if not drawn:
        return '<p class="note">No states were kept.</p>'
    return (
        '<p class="lead">Along each principal direction, largest first; a curve per layer, from '
        "pale (first) to dark (last). A curve that falls late uses many directions. "
        '<span class="script">The chosen layer is in colour.</span></p>'
        f'<div class="maps">{drawn}</div>'
    )


def _drawing(given: Spectrum) -> str:
    """Curves on two logarithmic scales."""
    points = [(r, v) for curve in given.curves.values() for r, v in curve if v > 0]
    if not points:
        return ""
    right = max(max(r for r, _ in points), 2)
    top = math.ceil(math.log10(max(v for _, v in points)))
    foot = max(math.floor(math.log10(min(v for _, v in points))), top - 6)
    high = max(top - foot, 1)

    def at(rank: float, value: float) -> str:
        y = 400 * (top - max(math.log10(value), foot)) / high
        return f"{1000 * math.log(rank) / math.log(right):.0f} {y:.0f}"

    count = max(len(given.curves) - 1, 1)
    paths = "".join(
        f'<path d="M{"L".join(at(r, v) for r, v in curve if v > 0)}" data-key="{escape(key)}" '
        f'style="--t:{100 * i / count:.0f}"><title>{escape(key)}</title></path>'
        for i, (key, curve) in enumerate(given.curves.items())
    )
    xs = "".join(
        f'<span style="left:{100 * math.log(r) / math.log(right):.1f}%">{r}</span>'
        for r in (10**k for k in range(6))
        if r <= right
    )
    ys = "".join(
        f'<span style="top:{100 * (top - p) / high:.1f}%">{_power(p)}</span>'
        for p in range(foot, top + 1)
    )
    return (
        f'<figure class="spectrum"><figcaption>{escape(given.title)} '
        f'<span class="dim">{escape(given.unit)} by rank</span></figcaption><div class="frame">'
        '<svg viewBox="0 0 1000 400" preserveAspectRatio="none" role="img" aria-label="'
        f'{escape(given.title)}, {escape(given.unit)} of {len(given.curves)} layers">{paths}</svg>'
        f'<div class="xs">{xs}</div><div class="ys">{ys}</div></div></figure>'
    )


def _power(power: int) -> str:
    return f"{10.0**power:g}" if abs(power) < 4 else f"10{str(power).translate(SUPERSCRIPTS)}"
