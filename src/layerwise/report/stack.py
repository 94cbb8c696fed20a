"""The stack drawn as a stack, from the embedding at the foot to the head, and what stands out."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from layerwise.report.embed import short
from layerwise.report.figures import figure, size
from layerwise.report.standout import Finding
from layerwise.report.strips import Strip, strips

PARTS = {"attention": "p1", "mlp": "p2", "mixer": "p3"}
SIGNS = {"droppable": "◇", "fragile": "▲", "redundant": "≈"}
SAYS = {
    "droppable": "change little of what passes through them",
    "fragile": "change much, or carry something that others need",
    "redundant": "neighbours that together do little",
}
#: height of all layers together in pixels, and of one
TALL, LOW, HIGH = 620, 6, 40
#: what is coloured at first, the best that there is: of each part, or of the layer
FIRST = ("_ratio", "block_influence", "residual_cosine", "update_norm")


def stack_section(section: Mapping[str, Any]) -> str:
    """Every layer as a bar with its parts, sized by bytes and coloured by a figure."""
    layers = section.get("layers") or []
    facts = escape(" · ".join(map(str, section.get("facts") or ())))
    note = section.get("note")
    said = f'<p class="note">{escape(str(note))}</p>' if note else ""
    found = section.get("findings")
    tags = _tags(found.found if found else ())
    most = max((f.value for x in layers if (f := figure(x.get("bytes")))), default=0.0)
    columns = strips(layers)
    options, chosen = _choices(layers, columns)
    drawn = _layers(layers, tags, most, _places(columns, chosen))
    ends: Mapping[str, Any] = section.get("ends") or {}
    head, foot = (
        _end(side, ends[name], ends[f"{name}_bytes"], most) if ends else ""
        for side, name in (("output", "after"), ("input", "before"))
    )
    height = min(max(TALL / max(len(layers), 1), LOW), HIGH)
    return (
        f'<p class="facts">{facts}</p>{said}<div class="stand">'
        f'<figure class="tower{" shaded" * bool(chosen)}" style="--row:{height:.1f}px">'
        f"{_choice(options, chosen)}{head}"
        f'<div class="floors{" thin" * (height < 16)}" role="listbox" tabindex="0" '
        f'aria-label="Layers, from input at the foot to output">{drawn}</div>{foot}'
        f"<figcaption>{_caption(layers, bool(tags))}</figcaption></figure>"
        '<aside class="card" aria-live="polite" aria-label="The chosen layer">'
        '<p class="note">Every figure of every layer is in the table below. '
        "<noscript>With scripts, a layer opens here.</noscript></p></aside></div>"
    )


def _caption(layers: Sequence[Mapping[str, Any]], tagged: bool) -> str:
    names = dict.fromkeys(n for x in layers for n in x.get("parts") or ())
    parts = "".join(
        f'<span><i class="swatch {PARTS.get(str(n), "p0")}"></i>{escape(str(n))}</span>'
        for n in names
    )
    keys = f"<span>in a layer, left to right:</span>{parts}" if len(names) > 1 else parts
    if tagged:
        keys = f'<span class="legend">{keys}</span>'
        keys += "".join(f'<span><b class="{k}">{s}</b>{k}</span>' for k, s in SIGNS.items())
    return f'<span class="legend">{keys}</span>A bar is as wide as its bytes.'


def _choices(
    layers: Sequence[Mapping[str, Any]], columns: Sequence[Strip]
) -> tuple[dict[str, str], str]:
    """What the bars can be coloured by, and what they are at first.

    What every part has of its own is one choice, `group.*_name`.
    """
    parts = dict.fromkeys(str(n) for x in layers for n in x.get("parts") or ())
    options = {"": "kind of part"}
    for strip in columns:
        group, _, name = strip.key.rpartition(".")
        owner = next((p for p in parts if name.startswith(f"{p}_")), "")
        key = f"{group}.*{name.removeprefix(owner)}" if owner else strip.key
        rest = name.removeprefix(f"{owner}_")
        said = f"{rest} of each part" if owner else f"{strip.group}: {strip.name}"
        options.setdefault(key, said.replace("_", " "))
    return options, next((k for end in FIRST for k in options if k.endswith(end)), "")


def _choice(options: Mapping[str, str], chosen: str) -> str:
    items = "".join(
        f'<option value="{escape(key)}"{" selected" * (key == chosen)}>{escape(name)}</option>'
        for key, name in options.items()
    )
    return (
        f'<div class="choice script"><label>coloured by <select>{items}</select></label>'
        '<span class="scale"><span></span><i class="ramp"></i><span></span></span></div>'
    )


def _places(columns: Sequence[Strip], chosen: str) -> dict[str, list[float | None]]:
    """Per part, or under `*` for all of them, where the layers are on the scale of a choice."""
    before, star, after = chosen.partition("*")
    mine = {
        (c.key.removeprefix(before).removesuffix(after) if star else "*"): c
        for c in columns
        if c.key == chosen or (star and c.key.startswith(before) and c.key.endswith(after))
    }
    if not mine:
        return {}
    ends = [c.low for c in mine.values()], [c.high for c in mine.values()]
    signed = any(c.signed for c in mine.values())
    scale = next(iter(mine.values()))._replace(low=min(ends[0]), high=max(ends[1]), signed=signed)
    return {k: [f and scale.place(f.value) for f in c.figures] for k, c in mine.items()}


def _tags(found: Sequence[Finding]) -> dict[str, dict[str, str]]:
    """Per layer the kinds of what was found, with the sentence."""
    tags: dict[str, dict[str, str]] = {}
    for one in found:
        for key in one.layers:
            tags.setdefault(key, {}).setdefault(one.kind, one.sentence)
    return tags


def _layers(
    layers: Sequence[Mapping[str, Any]],
    tags: Mapping[str, Mapping[str, str]],
    most: float,
    places: Mapping[str, Sequence[float | None]],
) -> str:
    drawn, stack = [], None
    many = len({str(x["layer"]).rpartition("/")[0] for x in layers}) > 1
    for i, layer in enumerate(layers):
        key = str(layer["layer"])
        mine = key.rpartition("/")[0]
        if many and mine != stack:
            drawn.append(f'<div class="label" role="presentation">{escape(mine)} ↑</div>')
        stack = mine
        found = figure(layer.get("bytes"))
        width = 100 * found.value / most if found and most else 100
        parts = layer.get("parts") or {}
        shares = parts if isinstance(parts, Mapping) else dict.fromkeys(parts, 1 / len(parts))
        nbytes = found.value if found else 0.0
        cells = "".join(
            _part(str(n), s, nbytes, (places.get(str(n)) or places.get("*") or {i: None})[i])
            for n, s in shares.items()
        )
        held = f", {size(found.value)}" if found else ""
        signs = "".join(
            f'<b class="{k}" title="{escape(s)}">{SIGNS[k]}</b>'
            for k, s in tags.get(key, {}).items()
        )
        kinds = "".join(f", {k}" for k in tags.get(key, {}))
        drawn.append(
            f'<div role="option" id="layer-{i}" aria-selected="false" data-i="{i}" '
            f'aria-label="{escape(f"{key}{held}{kinds}")}">'
            f'<span class="k{" tick" * (i % 10 == 0)}">{escape(short(key))}</span>'
            f'<span class="bar" style="width:{width:.1f}%">{cells or "<i class=p0></i>"}</span>'
            f'<span class="signs">{signs}</span></div>'
        )
    return "".join(drawn)


def _part(name: str, share: float, nbytes: float, place: float | None) -> str:
    shade = "" if place is None else f";--t:{place:.0f}"
    says = f"{name}, {size(share * nbytes)}" if nbytes else name
    return (
        f'<i class="{PARTS.get(name, "p0")}" style="flex-grow:{max(share, 0.01):.3f}{shade}" '
        f'data-part="{escape(name)}" title="{escape(says)}"></i>'
    )


def _end(side: str, names: Sequence[str], nbytes: int, most: float) -> str:
    """What stands outside of the layers; wider than any layer, it is cut off."""
    width = 100 * nbytes / most if most else 0
    shown = ", ".join(map(str, names[:2])) + (", …" if len(names) > 2 else "")
    text = f"{size(nbytes)} · {shown}" if nbytes else "nothing with weights"
    kind = " cut" if width > 100 else " slim" if width < 70 else ""
    return (
        f'<div class="end {side}"><span class="k">{side}</span>'
        f'<span class="bar{kind}" style="width:{min(max(width, 1), 100):.1f}%"></span>'
        f'<span class="text">{escape(text)}</span></div>'
    )


def standout_section(section: Mapping[str, Any]) -> str:
    """What layers look like, with evidence in a sentence, and what would prove it."""
    given = section.get("findings")
    keys = {str(k): i for i, k in enumerate(section.get("layers") or ())}
    if not given or not given.found:
        return (
            '<p class="note">Nothing to compare: it takes a stack of at least four layers, and '
            "measures such as residual_cosine, lens and similarity.</p>"
        )
    columns = []
    for kind, sign in SIGNS.items():
        mine = [one for one in given.found if one.kind == kind]
        items = "".join(_finding(one, keys) for one in mine)
        items = items or '<li class="dim">The figures show none.</li>'
        proof = (
            f"<p>To prove it, measure the edit:</p><pre>{escape(given.proof[kind])}</pre>"
            if mine
            else ""
        )
        columns.append(
            f'<div><h3><b class="{kind}">{sign}</b>{kind}</h3>'
            f'<p class="dim">{SAYS[kind]}</p><ul>{items}</ul>{proof}</div>'
        )
    return (
        '<p class="lead">Hints from one pass, not verdicts: figures say how a layer looks, only a '
        "measured edit says what it is worth. The commands make that edit and compare it with the "
        f'original.</p><div class="three">{"".join(columns)}</div>'
    )


def _finding(one: Finding, keys: Mapping[str, int]) -> str:
    first, last = one.layers[0], one.layers[-1]
    name = first if first == last else f"{first} to {short(last)}"
    place = keys.get(first, 0)
    clear = "stands apart" if one.apart else "close to others"
    kind = "apart" if one.apart else "close"
    return (
        f'<li><a href="#layer-{place}" data-layer="{place}">{escape(name)}</a> '
        f'{escape(one.sentence)} <span class="tag {kind}">{clear}</span></li>'
    )
