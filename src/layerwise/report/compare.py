"""The compared models side by side, and the checks."""

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from layerwise.report.figures import Figure, byte_unit, decimals_of, figure, number, size, words
from layerwise.report.layers import interval
from layerwise.report.plot import MARKS, mark_of

MEASURES = (
    ("loss", "loss", "nats per token", 1, ""),
    ("rise", "loss rise", "nats per token", 1, ""),
    ("perplexity", "perplexity", "", 1, ""),
    ("kl", "KL", "original ‖ edited, nats per token", 1, ""),
    ("agree", "agreement", "same first choice as the original", 0.01, "%"),
    ("prefill", "prefill", "tokens per second", 1, ""),
    ("decode", "decode", "tokens per second", 1, ""),
)


def compare_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """One column per model, one line per measure, in the order in which a reader asks."""
    if not rows:
        return ""
    kinds = [mark_of(str(row.get("name", ""))) for row in rows]
    heads = "".join(
        f'<th scope="col" class="{kind}"><svg class="point {kind}" width="16" height="16" '
        f'viewBox="-8 -8 16 16" aria-hidden="true">{MARKS[kind]}</svg>'
        f"{escape(str(row.get('name', '')))}</th>"
        for row, kind in zip(rows, kinds, strict=True)
    )
    known = any(figure(row.get("bytes")) for row in rows)
    lines = [_line("size", "tensor bytes", _sizes(rows), kinds)] if known else []
    for field, name, unit, per, suffix in MEASURES:
        found = [figure(row.get(field)) for row in rows]
        if any(found):
            lines.append(_line(name, unit, _figures(found, per, suffix), kinds))
    memory = [figure(row.get("memory")) for row in rows]
    if any(memory):
        lines.append(_line("peak memory", "", [_bytes(m) for m in memory], kinds))
    if any(row.get("cached") is not None for row in rows):
        cells = [_agrees(row.get("cached")) for row in rows]
        lines.append(_line("cached decoding", "equals uncached", cells, kinds))
    for field, name in (("loads", "loads in"), ("what", "what it is")):
        if any(row.get(field) for row in rows):
            cells = [_words(row.get(field)) for row in rows]
            lines.append(_line(name, "", cells, kinds))
    return (
        f'<div class="scroll models"><table class="compare" style="--models:{len(rows)}">'
        f"<thead><tr><td></td>{heads}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
    )


def _line(name: str, unit: str, cells: Sequence[str], kinds: Sequence[str]) -> str:
    small = f' <span class="dim">{escape(unit)}</span>' if unit else ""
    drawn = "".join(f'<td class="{k}">{c}</td>' for c, k in zip(cells, kinds, strict=True))
    return f'<tr><th scope="row">{escape(name)}{small}</th>{drawn}</tr>'


def _none() -> str:
    return '<span class="none" title="not measured">&ndash;</span>'


def _figures(found: Sequence[Figure | None], per: float, suffix: str) -> list[str]:
    scaled = [f and f.over(per) for f in found]
    decimals = {decimals_of(f) for f in scaled if f and math.isfinite(f.value)}
    same = max(decimals) if decimals and max(decimals) - min(decimals) <= 1 else None
    return [_none() if f is None else interval(words(f, 1, suffix, same)) for f in scaled]


def _words(given: Any) -> str:
    return f'<span class="words">{escape(str(given))}</span>' if given else _none()


def _bytes(found: Figure | None) -> str:
    if found is None:
        return _none()
    unit, name = byte_unit(found.value)
    return interval(words(found, unit, f" {name}"))


def _agrees(given: Any) -> str:
    return _none() if given is None else "✓ yes" if given else "✗ no"


def _sizes(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    whole = next((figure(r.get("bytes")) for r in rows if r.get("name") == "original"), None)
    cells = []
    for row in rows:
        found = figure(row.get("bytes"))
        if found is None:
            cells.append(_none())
            continue
        share = ""
        if whole and whole.value and row.get("name") != "original":
            share = f' <span class="ci">{number(100 * found.value / whole.value, 1)}%</span>'
        cells.append(f'<span title="{found.value:,.0f} bytes">{size(found.value)}</span>{share}')
    return cells


def check_list(checks: Sequence[Mapping[str, Any]]) -> str:
    """Every check with what was found; passed or failed in words as well as in colour."""
    if not checks:
        return ""
    items = []
    for check in checks:
        kind, said = ("ok", "✓ passed") if check.get("ok") else ("bad", "✗ failed")
        found = check.get("found")
        small = f'<span class="dim">{escape(str(found))}</span>' if found is not None else ""
        items.append(
            f'<li class="{kind}"><span class="tag">{said}</span>'
            f"<span>{escape(str(check.get('name', '')))}{small}</span></li>"
        )
    return f'<h3>Checks</h3><ul class="checks">{"".join(items)}</ul>'
