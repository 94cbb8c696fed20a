"""Size against quality: one point per compared model, its interval as a whisker."""

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

from layerwise.report.figures import (
    Figure,
    Text,
    byte_unit,
    figure,
    log_ticks,
    number,
    ticks,
    words,
)

HEIGHT = 300
LABEL = 0.42  # of the width, so that labels stay apart on a narrow page too
TITLES = {
    "kl": "KL to the original, nats per token",
    "loss": "Loss, nats per token",
}
MARKS = {
    "plan": '<circle r="5.5"/>',
    "naive": '<path d="M0-7 7 0 0 7-7 0z"/>',
    "original": '<circle r="5"/>',
    "other": '<rect x="-4.5" y="-4.5" width="9" height="9"/>',
}


class Point(NamedTuple):
    """A model's bytes and its figure; `exact` marks the original, whose KL is 0."""

    name: str
    nbytes: float
    found: Figure
    text: Text
    exact: bool = False


class Scale(NamedTuple):
    """Values to heights in pixels from the top; on a logarithm, zero is at the foot."""

    low: float
    high: float
    log: bool

    def y(self, value: float) -> float:
        """Pixels from the top."""
        if self.log:
            if value <= 0:
                return HEIGHT
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return HEIGHT * (1 - min(max(share, 0), 1))

    def ticks(self) -> list[float]:
        """Values to write at the axis."""
        return log_ticks(self.low, self.high) if self.log else ticks(self.low, self.high)


def mark_of(name: str) -> str:
    """The class that gives a model its mark and colour, here and in the table."""
    return name if name in MARKS else "other"


def plot(rows: Sequence[Mapping[str, Any]]) -> str:
    """The figure as HTML, or an empty string where no row has both a size and a quality."""
    field = "kl" if any(figure(row.get("kl")) for row in rows) else "loss"
    points = points_of(rows, field)
    if not points:
        return ""
    scale = scale_of(points, field)
    most = max(p.nbytes for p in points)
    unit, name = byte_unit(most)
    right = most * 1.06 / unit
    title = TITLES[field] + (" (logarithmic, 0 at the foot)" if scale.log else "")
    says = f"{title}, against size: " + "; ".join(f"{p.name} {p.text}" for p in points)
    return (
        f'<figure class="plot"><figcaption>{escape(title)} <span class="dim">lower is better; '
        "bars are 95% intervals over documents</span></figcaption>"
        f'<svg class="area" role="img" aria-label="{escape(says)}" height="{HEIGHT}">'
        f"{_grid(scale)}{_sizes(right, name)}{_marks(points, scale, right * unit)}</svg></figure>"
    )


def points_of(rows: Sequence[Mapping[str, Any]], field: str) -> list[Point]:
    """The rows that can be drawn."""
    points = []
    for row in rows:
        nbytes, found = figure(row.get("bytes")), figure(row.get(field))
        name = str(row.get("name", ""))
        if field == "kl" and name == "original" and nbytes:
            points.append(Point(name, nbytes.value, Figure(0.0), Text("0, by definition"), True))
        elif nbytes and found and math.isfinite(found.value):
            points.append(Point(name, nbytes.value, found, words(found)))
    return points if any(not p.exact for p in points) else []


def scale_of(points: Sequence[Point], field: str) -> Scale:
    """Linear from zero for a KL, around the values for a loss; logarithmic where they spread."""
    values = [x for p in points if not p.exact for x in p.found.reach]
    low, high = min(values), max(values)
    if low > 0 and high / low > 8:
        return Scale(low * (low / high) ** 0.25, high * (high / low) ** 0.06, True)
    if field == "kl" and low >= 0:
        return Scale(0, high * 1.12 or 1, False)
    pad = 0.12 * (high - low) or 0.1 * abs(high) or 1
    return Scale(low - pad, high + pad, False)


def _grid(scale: Scale) -> str:
    values = scale.ticks()
    decimals = next(d for d in range(12) if d == 11 or _short(values, d))
    drawn = []
    for value in values:
        if scale.log and scale.y(value) > HEIGHT - 18:
            continue
        y = f"{scale.y(value):.1f}"
        digits = 1 - math.floor(math.log10(value)) if scale.log else decimals
        text = f"{value:.6g}" if scale.log and value >= 1e-4 else number(value, digits)
        drawn.append(f'<line class="grid" x1="0" x2="100%" y1="{y}" y2="{y}"/>')
        drawn.append(f'<text class="tick end" x="-10" y="{y}">{text}</text>')
    if scale.log:
        drawn.append(f'<text class="tick end" x="-10" y="{HEIGHT}">0</text>')
    return "".join(drawn)


def _short(values: Sequence[float], decimals: int) -> bool:
    return all(abs(round(v, decimals) - v) <= 1e-6 * abs(v) for v in values)


def _sizes(right: float, unit: str) -> str:
    drawn = [f'<line class="axis" x1="0" x2="100%" y1="{HEIGHT}" y2="{HEIGHT}"/>']
    for value in ticks(0, right):
        x = f"{100 * value / right:.2f}%"
        drawn.append(f'<line class="axis" x1="{x}" x2="{x}" y1="{HEIGHT}" y2="{HEIGHT + 5}"/>')
        drawn.append(f'<text class="tick mid" x="{x}" y="{HEIGHT + 18}">{value:.6g}</text>')
    drawn.append(f'<text class="tick end" x="100%" y="{HEIGHT + 38}">size, {unit}</text>')
    return "".join(drawn)


def _marks(points: Sequence[Point], scale: Scale, right: float) -> str:
    shares = [p.nbytes / right for p in points]
    leftward = [share > 0.6 for share in shares]
    heights = _spread([scale.y(p.found.value) for p in points], shares, leftward)
    order = sorted(range(len(points)), key=lambda i: points[i].name == "plan")
    labels = [_label(points[i], scale, right, heights[i], leftward[i]) for i in order]
    return "".join(labels + [_mark(points[i], scale, right) for i in order])


def _spread(
    heights: Sequence[float], shares: Sequence[float], leftward: Sequence[bool]
) -> list[float]:
    """Where the labels go: at their points, moved apart as far as two lines of text need."""
    starts = [x - LABEL if left else x for x, left in zip(shares, leftward, strict=True)]
    gap = min(36.0, (HEIGHT - 36) / max(len(heights), 1))
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    placed = dict(enumerate(heights))

    def settle(indices: Sequence[int], sign: int, end: float) -> None:
        done: list[int] = []
        for i in indices:
            near = [placed[j] for j in done if abs(starts[i] - starts[j]) < LABEL]
            bounds = [sign * end, *(sign * y + gap for y in near), sign * placed[i]]
            placed[i] = sign * max(bounds)
            done.append(i)

    settle(order, 1, 2.0)
    settle(order[::-1], -1, HEIGHT - 34.0)
    return [placed[i] for i in range(len(heights))]


def _label(point: Point, scale: Scale, right: float, height: float, leftward: bool) -> str:
    y, sign = scale.y(point.found.value), -1 if leftward else 1
    leader = ""
    if abs(height - y) > 6:
        leader = f'<path class="leader" d="M{sign * 8} 0L{sign * 15} {height - y:.1f}"/>'
    place = f'x="{sign * 18}" class="{"end" if leftward else "start"}'
    inside = (
        f'{leader}<text {place} name" y="{height - y:.1f}">{escape(point.name)}</text>'
        f'<text {place} value" y="{height - y + 15:.1f}">{escape(str(point.text))}</text>'
    )
    return _at(point, scale, right, inside)


def _mark(point: Point, scale: Scale, right: float) -> str:
    y, whisker = scale.y(point.found.value), ""
    if point.found.low is not None and point.found.high is not None:
        top, foot = scale.y(point.found.high) - y, scale.y(point.found.low) - y
        ends = f"M-5 {top:.1f}H5M-5 {foot:.1f}H5"
        whisker = f'<path class="whisker" d="M0 {top:.1f}V{foot:.1f}{ends}"/>'
    return _at(point, scale, right, whisker + MARKS[mark_of(point.name)])


def _at(point: Point, scale: Scale, right: float, inside: str) -> str:
    x, y = f"{100 * point.nbytes / right:.2f}%", f"{scale.y(point.found.value):.1f}"
    says = f"{point.name}: {point.nbytes:,.0f} bytes, {point.text}"
    return (
        f'<svg class="point {mark_of(point.name)}" x="{x}" y="{y}"><title>{escape(says)}</title>'
        f"{inside}</svg>"
    )
