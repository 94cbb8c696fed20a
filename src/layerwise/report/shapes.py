"""How alike the states of all layers are, and how their variance is spread over directions."""

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from layerwise.report.embed import embedded, short
from layerwise.report.standout import Relation


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
    """One curve per layer: the share of variance along each principal direction."""
    curves: Mapping[str, Sequence[Any]] = section.get("curves") or {}
    points = [(r, v) for curve in curves.values() for r, v in curve if v > 0]
    if not points:
        return '<p class="note">No states were kept.</p>'
    right = max(max(r for r, _ in points), 2)
    top = math.ceil(math.log10(max(v for _, v in points)))
    foot = max(math.floor(math.log10(min(v for _, v in points))), top - 6)

    def at(rank: float, share: float) -> str:
        x = 1000 * math.log(rank) / math.log(right)
        y = 400 * (top - max(math.log10(share), foot)) / max(top - foot, 1)
        return f"{x:.0f} {y:.0f}"

    count = max(len(curves) - 1, 1)
    paths = "".join(
        f'<path d="M{"L".join(at(r, v) for r, v in curve if v > 0)}" data-key="{escape(key)}" '
        f'style="--t:{100 * i / count:.0f}"><title>{escape(key)}</title></path>'
        for i, (key, curve) in enumerate(curves.items())
    )
    ranks = [r for r in (1, 2, 5, 10, 20, 50, 100, 200, 500) if r <= right]
    xs = "".join(
        f'<span style="left:{100 * math.log(r) / math.log(right):.1f}%">{r}</span>' for r in ranks
    )
    ys = "".join(
        f'<span style="top:{100 * (top - p) / max(top - foot, 1):.1f}%">{_percent(p)}</span>'
        for p in range(foot, top + 1)
    )
    return (
        '<p class="lead">The share of the variance of the states after a layer along each of their '
        "principal directions, from pale (first) to dark (last). A curve that falls late uses many "
        'directions. <span class="script">The chosen layer is in colour.</span></p>'
        '<figure class="spectra"><div class="frame">'
        '<svg viewBox="0 0 1000 400" preserveAspectRatio="none" role="img" '
        f'aria-label="Spectra of {len(curves)} layers">{paths}</svg>'
        f'<div class="xs">{xs}</div><div class="ys">{ys}</div></div>'
        '<p class="ends"><span>share of variance</span><span>principal direction</span></p>'
        "</figure>"
    )


def _percent(power: int) -> str:
    return f"{100 * 10.0**power:g}%"
