"""Tables and curves of layers for a notebook."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

WIDTH, HEIGHT, MARGIN = 640, 160, 44
COLORS = ("#3366cc", "#cc5533", "#339966", "#9955aa", "#aa8833", "#338899", "#666666")


class Drawing(NamedTuple):
    """A picture that a notebook shows; `svg` is its source."""

    svg: str

    def _repr_html_(self) -> str:
        return self.svg


def framed(title: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """The page of a report in a frame, so that its style stays inside."""
    from layerwise.report.html import page

    sections = [
        {"kind": "stack", "title": "The stack", "layers": rows},
        {"kind": "figures", "title": "Every figure of every layer", "layers": rows},
    ]
    source = escape(page(title, sections), quote=True)
    return f'<iframe srcdoc="{source}" style="width:100%;height:900px;border:0"></iframe>'


def curves(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """One small plot per column over the layers, each on its own scale."""
    drawn = [_curve(rows, column, COLORS[i % len(COLORS)]) for i, column in enumerate(columns)]
    return "".join(x for x in drawn if x)


def _curve(rows: Sequence[Mapping[str, Any]], column: str, color: str) -> str:
    points = [(i, float(row[column])) for i, row in enumerate(rows) if column in row]
    if not points:
        return ""
    low, high = min(v for _, v in points), max(v for _, v in points)
    across, up = WIDTH - 2 * MARGIN, HEIGHT - 2 * MARGIN
    places = [
        (
            MARGIN + across * i / max(len(rows) - 1, 1),
            HEIGHT - MARGIN - up * (v - low) / ((high - low) or 1),
        )
        for i, v in points
    ]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    dots = "".join(
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{color}">'
        f"<title>{escape(str(rows[i]['layer']))}: {v:.4g}</title></circle>"
        for (x, y), (i, v) in zip(places, points, strict=True)
    )
    texts = ((8, "start", column), (HEIGHT - MARGIN + 16, "start", str(rows[0]["layer"])))
    words = "".join(f'<text x="{MARGIN}" y="{y + 8}">{escape(t)}</text>' for y, _, t in texts)
    words += f'<text x="{WIDTH - MARGIN}" y="{HEIGHT - MARGIN + 24}" text-anchor="end">'
    words += f"{escape(str(rows[-1]['layer']))}</text>"
    for y, value in ((MARGIN, high), (HEIGHT - MARGIN, low)):
        words += f'<text x="{MARGIN - 6}" y="{y + 4}" text-anchor="end">{value:.3g}</text>'
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" role="img" '
        f'aria-label="{escape(column)} by layer" style="font:12px sans-serif;fill:currentColor">'
        f'<polyline points="{line}" fill="none" stroke="{color}" stroke-width="2"/>'
        f"{dots}{words}</svg>"
    )
