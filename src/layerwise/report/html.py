"""One self-contained page: no network, no libraries, light and dark, on screen and on paper."""

from base64 import b64encode
from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from html import escape
from pathlib import Path
from typing import Any

from layerwise.core.errors import LayerwiseError
from layerwise.report.compare import check_list, compare_table
from layerwise.report.figures import figure, number, size, words
from layerwise.report.layers import (
    group_rows,
    in_words,
    layer_table,
    legend,
    measure_column,
    size_column,
)
from layerwise.report.plot import plot
from layerwise.report.prompts import reading_section
from layerwise.report.prose import prose
from layerwise.report.shapes import alike_section, spectra_section
from layerwise.report.stack import stack_section, standout_section
from layerwise.report.strips import figures_section
from layerwise.report.svg import ratio_strip

HERE = Path(__file__).parent
BESIDE = 4
THEME = '<button type="button" class="theme script" aria-label="Theme">light or dark</button>'
FIELDS = {"kl": "KL", "rise": "loss rise"}


def page(title: str, sections: Sequence[Mapping[str, Any]]) -> str:
    """A whole report as one HTML page.

    Args:
        title: of the page.
        sections: each with a `kind`: those of the atlas (`stack`, `standout`, `figures`,
            `reading`, `alike`, `spectra`), `plan` (what each layer got, and the comparison), or
            `text` (a paragraph).

    Returns:
        The page; it refers to nothing outside itself.

    Raises:
        LayerwiseError: a section is of another kind.

    Example:
        >>> "<h2>Note</h2>" in page("A report", [{"kind": "text", "title": "Note", "html": "Hm."}])
        True
    """
    parts, links = [], []
    for i, section in enumerate(sections):
        kind = section.get("kind")
        if kind not in KINDS:
            raise LayerwiseError(
                f"report, section {i}, kind",
                allowed=", ".join(KINDS),
                found=repr(kind),
                fix="give the section one of these kinds",
            )
        name = heading_of(section)
        links.append(f'<li><a href="#s{i}">{escape(name)}</a></li>')
        parts.append(
            f'<section id="s{i}" class="{kind}"><h2>{escape(name)}</h2>{KINDS[kind](section)}'
            "</section>"
        )
    contents = f'<nav aria-label="Contents"><ol>{"".join(links)}</ol></nav>'
    atlas = any(section["kind"] in ATLAS for section in sections)
    files = ("page", "atlas") if atlas else ("page",)
    style, script = (
        "\n" + "".join((HERE / f"{name}.{end}").read_text("utf-8") for name in files)
        for end in ("css", "js")
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy(script)}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">'
        f"<title>{escape(title)}</title><style>{style}</style></head>\n"
        f"<body><main><header><h1>{escape(title)}</h1>{THEME}{contents if len(links) > 1 else ''}"
        f"</header>\n{chr(10).join(parts)}\n</main><script>{script}</script></body></html>\n"
    )


def policy(script: str) -> str:
    """What the page may do: run this one script, and load nothing.

    Example:
        >>> policy("")[:47]
        "default-src 'none'; style-src 'unsafe-inline'; "
    """
    digest = b64encode(sha256(script.encode()).digest()).decode()
    return (
        "default-src 'none'; style-src 'unsafe-inline'; img-src data:; "
        f"script-src 'sha256-{digest}'"
    )


def heading_of(section: Mapping[str, Any]) -> str:
    """A section's title, or its kind."""
    return str(section.get("title") or section["kind"])


def plan_section(section: Mapping[str, Any]) -> str:
    """What each layer got, what it costs, the comparison, the checks and the verdict."""
    layers, rows = section.get("layers") or [], section.get("rows") or []
    checks = section.get("checks") or []
    drawn, names = group_rows(layers)
    columns = []
    if any(figure(x.get("bytes")) for x in layers):
        before = [x.get("original_bytes") for x in layers]
        columns.append(size_column([x.get("bytes") for x in layers], before))
    if any(figure(x.get("error")) for x in layers):
        columns.append(measure_column("error", [x.get("error") for x in layers]))
    stack = ""
    if layers:
        table = layer_table(drawn, names, columns)
        stack = f"<h3>What each layer got</h3>{legend(layers)}{table}{settings(layers)}"
    figures = plot(rows)
    figures = f"<h3>What it costs</h3>{figures}" if figures else ""
    table = compare_table(rows)
    beside = "wide" if checks and len(rows) <= BESIDE else "rows"
    compared = f"<h3>Compared with the original</h3>{table}" if rows else ""
    return (
        f'{facts_of(section)}<div class="columns"><div>{stack}</div>'
        f'<div><div class="stay">{figures}</div></div></div>'
        f'<div class="columns {beside}"><div>{compared}</div><div>{check_list(checks)}</div></div>'
        f"{verdict(section)}"
    )


def facts_of(section: Mapping[str, Any]) -> str:
    """The budget, and the plan in one line."""
    facts = []
    rows = {str(row.get("name")): row for row in section.get("rows") or []}
    plan, original = rows.get("plan", {}), rows.get("original", {})
    now, before, kl = (
        figure(x) for x in (plan.get("bytes"), original.get("bytes"), plan.get("kl"))
    )
    if now:
        share = f", {number(100 * now.value / before.value, 1)}% of the original" if before else ""
        facts.append(f"{size(now.value)}{share}")
    layers = section.get("layers") or []
    dropped = sum(bool(x.get("dropped")) for x in layers)
    if dropped:
        facts.append(f"{len(layers) - dropped} of {len(layers)} layers kept")
    if kl:
        facts.append(f"KL {words(kl)}")
    checks = section.get("checks") or []
    if checks:
        facts.append(f"{sum(bool(c.get('ok')) for c in checks)} of {len(checks)} checks passed")
    budget = section.get("budget")
    code = f"<code>{escape(str(budget))}</code> " if budget else ""
    return f'<p class="facts">{code}{escape(" · ".join(facts))}</p>'


def settings(layers: Sequence[Mapping[str, Any]]) -> str:
    """The same in words, for readers without a pointer and for paper."""
    items = []
    for layer in layers:
        groups = {str(k): str(v) for k, v in (layer.get("groups") or {}).items()}
        said = "dropped" if layer.get("dropped") else in_words(groups)
        items.append(f"<dt>{escape(str(layer['layer']))}</dt><dd>{escape(said)}</dd>")
    return (
        "<details><summary>Every setting in words</summary>"
        f'<dl class="settings">{"".join(items)}</dl></details>'
    )


def verdict(section: Mapping[str, Any]) -> str:
    """The conclusion, and the ratio to the naive plan that it rests on."""
    said, given = section.get("verdict"), section.get("ratio") or {}
    ratio = figure(given.get("value"))
    strip = ""
    if ratio:
        field = str(given.get("field", ""))
        name = FIELDS.get(field, field)
        drawn = ratio_strip(ratio, name) or escape(str(words(ratio)))
        strip = (
            f'<figure class="strip"><figcaption>{escape(name)} of the plan ÷ {escape(name)} of the '
            f"naive plan</figcaption>{drawn}</figure>"
        )
    if not said and not strip:
        return ""
    sound = all(c.get("ok") for c in section.get("checks") or [])
    kind = "verdict" if sound else "verdict unsound"
    return f'<div class="{kind}"><p>{escape(str(said or ""))}</p>{strip}</div>'


def text_section(section: Mapping[str, Any]) -> str:
    """A paragraph."""
    return f'<div class="prose">{prose(str(section.get("html") or ""))}</div>'


ATLAS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "stack": stack_section,
    "standout": standout_section,
    "figures": figures_section,
    "reading": reading_section,
    "alike": alike_section,
    "spectra": spectra_section,
}
KINDS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    **ATLAS,
    "plan": plan_section,
    "text": text_section,
}
