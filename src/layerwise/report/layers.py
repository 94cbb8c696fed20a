"""The table of layers: the stack drawn as a stack, and beside it what was found of each layer."""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

from layerwise.core.plan import GONE
from layerwise.report.figures import (
    DASH,
    Figure,
    Text,
    byte_unit,
    column_decimals,
    figure,
    size,
    words,
)
from layerwise.report.svg import (
    AS_IS,
    NUMBERED,
    Cell,
    bar,
    bar_dropped,
    bar_of_cells,
    bits_cells,
    bits_color,
    bits_of,
    dot,
)

COMPACT = 40
NARROW = 6


class Column(NamedTuple):
    """One measure over all layers: how it reads, how it is drawn, and the ends of its scale."""

    name: str
    figures: Sequence[Figure | None]
    texts: Sequence[Text | None]
    drawings: Sequence[str]
    ends: str


class Row(NamedTuple):
    """One layer: its key and its drawn bar."""

    key: str
    bar: str


def measure_column(name: str, given: Sequence[Any]) -> Column:
    """Bars from zero where zero is near the values; points between their ends where it is not."""
    figures = [figure(value) for value in given]
    digits = column_decimals(figures)
    texts = [None if f is None else words(f, decimals=digits) for f in figures]
    reach = [x for f in figures if f for x in f.reach] or [0.0]
    low, high = min(reach), max(reach)
    whiskered = any(f and f.low is not None for f in figures)
    from_zero = low >= 0 and low < 0.4 * high and not whiskered
    first, last = (words(Figure(x), decimals=digits).value for x in (low, high))
    ends = f"{'0' if from_zero else first} {DASH} {last}"

    def drawn(f: Figure | None, text: Text | None) -> str:
        if f is None or not math.isfinite(f.value):
            return ""
        says = f"{name}: {text}"
        return bar(f.value, high, None, says) if from_zero else dot(f, low, high, says)

    return Column(name, figures, texts, [drawn(*x) for x in zip(figures, texts, strict=True)], ends)


def size_column(now: Sequence[Any], before: Sequence[Any]) -> Column:
    """Bytes per layer, before a pale bar of the original's."""
    figures, wholes = [figure(v) for v in now], [figure(v) for v in before]
    most = max((f.value for f in (*figures, *wholes) if f), default=0.0)
    unit, name = byte_unit(most)
    digits = column_decimals(f and Figure(f.value / unit) for f in (*figures, *wholes))
    texts, drawings = [], []
    for found, whole in zip(figures, wholes, strict=True):
        texts.append(found and words(Figure(found.value), unit, decimals=digits))
        says = size(found.value) if found else "not known"
        says += f" of {size(whole.value)}" if whole else ""
        track = whole.value if whole else None
        drawings.append(bar(found.value if found else 0, most, track, says))
    return Column(
        f"size, {name}",
        figures,
        texts,
        drawings,
        f"0 {DASH} {words(Figure(most), unit, decimals=digits)}",
    )


def layer_table(rows: Sequence[Row], names: Sequence[str], columns: Sequence[Column]) -> str:
    """The table; its headers sort it, and a third click puts the layers back in their order."""
    compact = " compact" if len(rows) > COMPACT else ""
    heads = "".join(
        '<th scope="col" class="num">'
        f'<button type="button">{escape(c.name)}</button>'
        f'<span class="ends">{escape(c.ends)}</span></th>'
        for c in columns
    )
    end = '<tbody class="end"><tr><td></td><td><span>{}</span></td>{}</tr></tbody>'
    blank = f'<td colspan="{len(columns)}"></td>' if columns else ""
    body = "".join(_table_row(i, row, columns) for i, row in enumerate(rows))
    key = max((len(row.key) for row in rows), default=5)
    style = f"--columns:{len(columns)};--key:{min(max(key, 6), 28)}"
    return (
        f'<div class="scroll"><table class="layers{compact}" style="{style}">'
        '<thead><tr><th scope="col" class="key"><button type="button">layer</button></th>'
        f'<th scope="col" class="cells">{heading(names)}</th>{heads}</tr></thead>'
        f"{end.format('input ↓', blank)}<tbody>{body}</tbody>{end.format('↓ output', blank)}"
        "</table></div>"
    )


def _table_row(i: int, row: Row, columns: Sequence[Column]) -> str:
    cells = []
    for column in columns:
        width = max((len(str(t)) for t in column.texts if t), default=0)
        found, text = column.figures[i], column.texts[i]
        if found is None or text is None:
            shown, value = '<span class="none">&ndash;</span>', ""
        else:
            shown, value = interval(text), repr(found.value)
        style = f' style="min-width:{width}ch"' if width > NARROW else ""
        inside = f'<div class="measure"><span{style}>{shown}</span>{column.drawings[i]}</div>'
        cells.append(f'<td class="num" data-v="{value}">{inside}</td>')
    return (
        f'<tr><th scope="row" class="key" data-v="{i}">{escape(row.key)}</th>'
        f'<td class="cells">{row.bar}</td>{"".join(cells)}</tr>'
    )


def interval(text: Text) -> str:
    """A figure with its interval set smaller."""
    if not text.interval:
        return escape(text.value)
    return f'{escape(text.value)} <span class="ci">{escape(text.interval)}</span>'


def heading(names: Sequence[str]) -> str:
    """Names over the cells; where they share a first word, that word once above the others."""
    if not names:
        return "stack"
    owners = [name.partition(".")[0] if "." in name else "" for name in names]
    grid = f'<div class="names" style="grid-template-columns:repeat({len(names)},minmax(0,1fr))">'
    tiers = ""
    if any(owners):
        runs: list[list[Any]] = []
        for owner in owners:
            if runs and runs[-1][0] == owner:
                runs[-1][1] += 1
            else:
                runs.append([owner, 1])
        spans = "".join(
            f'<span class="part" style="grid-column:span {n}">{escape(owner)}</span>'
            for owner, n in runs
        )
        tiers = f"{grid}{spans}</div>"
    if len(names) > NUMBERED:
        return tiers or f"{len(names)} groups"
    leaves = "".join(
        f'<span title="{escape(name)}">{escape(name.partition(".")[2] or name)}</span>'
        for name in names
    )
    return f"{tiers}{grid}{leaves}</div>"


def union(lists: Iterable[Collection[str]]) -> list[str]:
    """Every name once, those of one first word together, in the order that the lists have.

    Example:
        >>> union([["mixer.in", "mlp.up"], ["attention.q", "mlp.up", "mlp.down"]])
        ['mixer.in', 'attention.q', 'mlp.up', 'mlp.down']
    """
    names: dict[str, None] = {}
    places: dict[str, int] = {}
    for held in lists:
        owners = dict.fromkeys(name.partition(".")[0] for name in held)
        for place, owner in enumerate(owners):
            places[owner] = max(places.get(owner, 0), place)
        names.update(dict.fromkeys(held))
    first = {owner: i for i, owner in enumerate(places)}
    owners = [name.partition(".")[0] for name in names]
    order = sorted(range(len(owners)), key=lambda i: (places[owners[i]], first[owners[i]]))
    return [list(names)[i] for i in order]


def group_rows(layers: Sequence[Mapping[str, Any]]) -> tuple[list[Row], list[str]]:
    """Layers with their groups as cells, coloured by bits; dropped ones as outlines."""
    held = [{str(k): str(v) for k, v in (x.get("groups") or {}).items()} for x in layers]
    names = union(held)
    rows = []
    for layer, groups in zip(layers, held, strict=True):
        key = str(layer["layer"])
        if layer.get("dropped"):
            rows.append(Row(key, bar_dropped(f"{key}: dropped")))
            continue
        cells = bits_cells(key, groups, names) if groups else [Cell("b16", "", f"{key}: as is")]
        says = f"{key}: {in_words(groups)}"
        rows.append(Row(key, bar_of_cells(cells, says)))
    return rows, names


def in_words(groups: Mapping[str, str]) -> str:
    """What a layer's groups got, those with the same said once."""
    same: dict[str, list[str]] = {}
    for name, label in groups.items():
        same.setdefault(label or "as is", []).append(name)
    if len(same) == 1:
        return next(iter(same))
    return "; ".join(f"{', '.join(names)}: {label}" for label, names in same.items()) or "as is"


def legend(layers: Sequence[Mapping[str, Any]]) -> str:
    """The colours that occur, from few bits to many."""
    kept = [x for x in layers if not x.get("dropped")]
    labels = {str(v) for x in kept for v in (x.get("groups") or {"": "as is"}).values()}
    bits = sorted({b for label in labels if (b := bits_of(label)) is not None})
    keys = [
        f'<span><i class="swatch {bits_color("as is" if b == AS_IS else f"{b} bits")}"></i>'
        f"{'as is' if b == AS_IS else b}</span>"
        for b in bits
    ]
    if any(bits_of(label) is None for label in labels - {GONE}):
        keys.append('<span><i class="swatch bx"></i>other</span>')
    if len(kept) < len(layers) or GONE in labels:
        keys.append('<span><i class="swatch gone"></i>dropped</span>')
    name = "<span>bits per weight</span>" if any(b != AS_IS for b in bits) else ""
    return f'<p class="legend">{name}{"".join(keys)}</p>'
