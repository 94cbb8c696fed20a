"""Prompts read layer by layer: the answer after each layer, and the layers that act on a token."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from layerwise.report.embed import embedded, shade, short, token

LENS = (
    '<p class="lead">What the network would say next if it ended after each layer: the likeliest '
    "token, the darker the surer; in bold where it is the final answer. "
    '<span class="script">The pointer or the arrow keys show the five likeliest.</span></p>'
)
VOIDS = (
    '<p class="lead">Filled where the norm of a token grows by at least 0.8 of the range of '
    "its growth so far; a void where it does not. A first layer that makes the stream out of a "
    "short embedding sets that range high.</p>"
)
READOUT = '<p class="readout script" aria-live="polite">&nbsp;</p>'
#: boundaries beyond which rows are low
MANY = 30


def reading_section(section: Mapping[str, Any]) -> str:
    """A lens table and a map of voids for every prompt."""
    reads = section.get("reads") or []
    drawn = "".join(_reading(number, read) for number, read in enumerate(reads))
    return f"{drawn}{embedded('reads', [_data(read) for read in reads])}"


def _data(read: Any) -> dict[str, Any]:
    """A reading as numbers: words by their place in a list, shares in tenths of a percent."""
    places: dict[str, int] = {}
    words = [
        [[places.setdefault(w, len(places)) for w in five] for five in row] for row in read.words
    ]
    shares = [[[round(1000 * p) for p in five] for five in row] for row in read.shares]
    kl = [[float(f"{x:.3g}") for x in row] for row in read.kl]
    found = {"tokens": read.tokens, "boundaries": read.boundaries, "list": list(places)}
    return {**found, "words": words, "shares": shares, "kl": kl}


def _reading(number: int, read: Any) -> str:
    lens = voids = ""
    if read.words:
        lens = f"{LENS if number == 0 else ''}{READOUT}{_lens(number, read)}"
    if read.active:
        share = sum(map(sum, read.active)) / max(sum(map(len, read.active)), 1)
        voids = (
            "<h3>Layers that act on a token "
            f'<span class="dim">{100 * share:.0f}% filled</span></h3>'
            f"{VOIDS if number == 0 else ''}{_voids(number, read)}"
        )
    text = "".join(token(t) for t in read.tokens)
    source = "".join(token(t) for t in read.source)
    source = f"<q>{source}</q>, continued: " if source else ""
    return (
        f'<figure class="read"><figcaption>{source}<q>{text}</q></figcaption>{lens}{voids}</figure>'
    )


def _head(tokens: Sequence[str]) -> str:
    cells = "".join(f'<th scope="col"><span>{token(t)}</span></th>' for t in tokens)
    return f'<thead><tr><th scope="col">after</th>{cells}</tr></thead>'


def _table(kind: str, number: int, read: Any, rows: Sequence[str], label: str) -> str:
    """Rows from the last layer down to what enters the first, as the stack is drawn."""
    low = " low" if len(rows) > MANY else ""
    return (
        f'<div class="scroll tall" tabindex="0" role="region" aria-label="{label}">'
        f'<table class="{kind}{low}" data-read="{number}" role="grid" '
        f'style="--n:{len(read.tokens)}">'
        f"{_head(read.tokens)}<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _lens(number: int, read: Any) -> str:
    final = [words[0] for words in read.words[-1]]
    rows = []
    for b in reversed(range(len(read.boundaries))):
        cells = []
        for t, (words, shares) in enumerate(zip(read.words[b], read.shares[b], strict=True)):
            text = token(words[0], 14)
            text = f"<b>{text}</b>" if words[0] == final[t] else f"<span>{text}</span>"
            cells.append(f"<td{shade(100 * shares[0])}>{text}</td>")
        key = read.boundaries[b]
        rows.append(
            f'<tr data-b="{b}"><th scope="row" title="{escape(key)}">{escape(short(key))}</th>'
            f"{''.join(cells)}</tr>"
        )
    return _table("lens", number, read, rows, "Answers by layer and token")


def _voids(number: int, read: Any) -> str:
    rows = []
    for b in reversed(range(len(read.active))):
        cells = "".join(
            '<td class="on"><span>acts</span></td>' if on else "<td><span>void</span></td>"
            for on in read.active[b]
        )
        key = read.boundaries[b + 1]
        rows.append(
            f'<tr><th scope="row" title="{escape(key)}">{escape(short(key))}</th>{cells}</tr>'
        )
    return _table("voids", number, read, rows, "Layers that act, by token")
