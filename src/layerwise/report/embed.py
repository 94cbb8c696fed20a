"""Data for a page's script, and small pieces that several views share."""

import json
import math
from html import escape
from typing import Any

#: what could end a script, or a line of one
UNSAFE = {c: f"\\u{ord(c):04x}" for c in "<>&\u2028\u2029"}
#: tokens that would be invisible
SHOWN = {"\n": "⏎", "\r": "␍", "\t": "⇥", "": "∅"}


def embedded(name: str, data: Any) -> str:
    r"""Data as JSON inside a page, where no string can end the script; no number becomes null.

    Example:
        >>> embedded("x", ["</b>", float("nan")])
        '<script type="application/json" data-of="x">["\\u003c/b\\u003e",null]</script>'
    """
    text = json.dumps(_finite(data), separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    safe = text.translate(str.maketrans(UNSAFE))
    return f'<script type="application/json" data-of="{escape(name)}">{safe}</script>'


def _finite(data: Any) -> Any:
    if isinstance(data, dict):
        return {str(k): _finite(v) for k, v in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(v) for v in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def token(text: str, most: int = 40) -> str:
    """A token as text of a page: line ends and tabs are seen, long ones are cut.

    Example:
        >>> token(" <b>\\n")
        ' &lt;b&gt;⏎'
    """
    seen = SHOWN.get(text, "".join(SHOWN.get(c, c if c.isprintable() else "\ufffd") for c in text))
    return escape(seen if len(seen) <= most else f"{seen[: most - 1]}…")


def short(key: str) -> str:
    """The number of a layer, or `input`.

    Example:
        >>> short("decoder/3"), short("input")
        ('3', 'input')
    """
    return key.rpartition("/")[2]


#: from where on a cell is so far from the page's colour that its text is turned around
FAR = 66


def shade(value: float) -> str:
    """Style and class of a cell whose place on its scale is -100 to 100."""
    kind = ' class="h"' if abs(value) > FAR else ""
    return f'{kind} style="--t:{value:.0f}"'
