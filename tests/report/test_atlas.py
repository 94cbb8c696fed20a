"""The atlas: every figure is on it, nothing that was read can act on it, and keys reach all of it."""

import json
import math
import re
from base64 import b64encode
from hashlib import sha256

import pytest
from tags import EVIL, Reader

from layerwise.jobs.reading import Read
from layerwise.report import page
from layerwise.report.embed import embedded
from layerwise.report.shapes import Spectrum
from layerwise.report.standout import Relation, stand_out
from layerwise.report.strips import scale_of, strips

COUNT = 12


def row(i, stack="decoder", **changes):
    """A layer of which none stands out."""
    return {
        "layer": f"{stack}/{i}",
        "parts": {"attention": 0.4, "mlp": 0.6},
        "bytes": 1000 + i,
        "block_influence": [0.05 + i / 1000, 0.04 + i / 1000, 0.06 + i / 1000],
        "update_norm": 0.3 + i / 1000,
        "depth_use.attention_ratio": 0.2 + i / 100,
        "depth_use.mlp_ratio": 0.1 + i / 100,
        "depth_use.layer_cosine": i / 100 - 0.05,
        "lens.kl": (COUNT - i) / 10,
        **changes,
    }


def chain(count, like=lambda i, j: 1 - 0.02 * abs(i - j), stack="decoder"):
    """How alike the states of a stack are."""
    keys = ["input", *(f"{stack}/{i}" for i in range(count))]
    values = [[like(i, j) for j in range(count + 1)] for i in range(count + 1)]
    return Relation("CKA", keys, keys, values)


def read(tokens=("a", "b"), count=COUNT, word="w"):
    boundaries = ["input", *(f"decoder/{i}" for i in range(count))]
    return Read(
        list(tokens),
        [],
        boundaries,
        [[[word, "x"] for _ in tokens] for _ in boundaries],
        [[[0.75, 0.25] for _ in tokens] for _ in boundaries],
        [[0.5 for _ in tokens] for _ in boundaries],
        [[i % 2 == 0 for _ in tokens] for i in range(count)],
    )


def sections(rows=None, **changes):
    rows = [row(i) for i in range(COUNT)] if rows is None else rows
    maps = [chain(len(rows))]
    findings = stand_out("a model", rows, maps)
    return [
        {"kind": "stack", "title": "Stack", "layers": rows, "findings": findings, "facts": ["f"]},
        {
            "kind": "standout",
            "title": "Out",
            "findings": findings,
            "layers": [r["layer"] for r in rows],
        },
        {"kind": "figures", "title": "Figures", "layers": rows, "groups": {"lens": "A lens."}},
        {"kind": "reading", "title": "Read", "reads": [read(), read(("c",))]},
        {"kind": "alike", "title": "Alike", "maps": maps},
        {
            "kind": "spectra",
            "title": "Spectra",
            "spectra": [
                Spectrum("States", "share", {r["layer"]: [(1, 0.9), (2, 0.1)] for r in rows}),
            ],
        },
    ]


def data_of(text, name):
    found = re.search(rf'data-of="{name}">(.*?)</script>', text, re.S)
    assert found, name
    return json.loads(found[1])


def test_every_layer_and_every_figure_is_there():
    text = page("t", sections())
    reader = Reader(text)
    options = [v for k, v in reader.attributes if k == "id" and v and v.startswith("layer-")]
    assert options == [f"layer-{i}" for i in range(COUNT)]
    words = "".join(reader.text)
    for i in range(COUNT):
        assert f"{0.3 + i / 1000:.3f}" in words
        assert f"[{0.04 + i / 1000:.3f}, {0.06 + i / 1000:.3f}]" in text
    figures = data_of(text, "figures")
    assert figures["layers"] == [f"decoder/{i}" for i in range(COUNT)]
    assert [c["key"] for c in figures["columns"]][:2] == ["block_influence", "update_norm"]
    assert all(len(c["values"]) == COUNT for c in figures["columns"])


def test_rows_of_the_table_are_the_columns_of_the_data_in_order():
    text = page("t", sections())
    table = text[text.index('class="strips') : text.index('data-of="figures"')]
    names = re.findall(r'<th scope="row"><button type="button">([^<]*)</button>', table)
    assert names == [c["name"] for c in data_of(text, "figures")["columns"]]


def test_a_deep_stack_and_several_stacks_are_whole():
    rows = [row(i, "encoder") for i in range(70)] + [row(i) for i in range(50)]
    text = page("t", sections(rows))
    Reader(text)
    assert text.count('<div role="option"') == 120
    assert text.count('<th scope="col" data-i=') == 120
    assert re.findall(r'colspan="(\d+)" class="first"><span>(\w+)', text) == [
        ("70", "encoder"),
        ("50", "decoder"),
    ]
    assert text.count('class="label"') == 2


def test_nothing_is_loaded_and_only_its_own_script_runs():
    text = page("t", sections())
    assert not [word for word in ("http:", "https:", "@import", "url(", "//cdn") if word in text]
    reader = Reader(text)
    assert not {"img", "iframe", "object"} & set(reader.tags)
    assert all(k != "src" and not k.startswith("on") for k, _ in reader.attributes)
    script = re.findall(r"<script>(.*?)</script>", text, re.S)
    digest = b64encode(sha256(script[0].encode()).digest()).decode()
    assert len(script) == 1 and f"script-src 'sha256-{digest}'" in text
    assert "default-src 'none'" in text


@pytest.mark.parametrize("evil", [EVIL, "</script><img src=x onerror=alert(1)>", "<!--", "\u2028"])
def test_tokens_and_names_are_text(evil):
    given = sections([row(i, f"s{evil}", **{f"x.{evil}": 0.5 + i}) for i in range(5)])
    given[0] |= {"note": evil, "facts": [evil], "title": evil}
    given[0]["ends"] = {"before": (evil,), "before_bytes": 9, "after": (), "after_bytes": 0}
    given[2]["groups"] = {"x": evil}
    given[3]["reads"] = [read((evil, "b"), 4, evil)._replace(source=[evil])]
    given[4]["maps"] = [Relation(evil, [evil], [evil], [[1.0]])]
    given[5]["spectra"] = [Spectrum(evil, evil, {evil: [(1, 0.9), (2, 0.1)]})]
    text = page(evil, given)
    reader = Reader(text)
    assert reader.tags.count("script") == 4 and "img" not in reader.tags
    assert data_of(text, "reads")[0]["list"][0] == evil
    assert data_of(text, "figures")["layers"][0] == f"s{evil}/0"


def test_the_same_figures_give_the_same_page():
    assert page("t", sections()) == page("t", sections())


def test_figures_that_are_none_are_said_to_be_none():
    rows = [row(i) for i in range(6)]
    rows[1]["update_norm"] = None
    rows[2] |= {"block_influence": math.nan, "lens.kl": math.inf}
    rows[3] = {"layer": "decoder/3"}
    text = page("t", sections(rows))
    Reader(text)
    shown = re.sub(r"<(style|script)[^>]*>.*?</\1>", "", text, flags=re.S)
    assert not re.search(r"\b(nan|None|inf|NaN|Infinity)\b", shown)
    columns = {c["key"]: c["values"] for c in data_of(text, "figures")["columns"]}
    assert columns["update_norm"][1] is None and columns["lens.kl"][2] is None
    assert "NaN" not in embedded("x", [math.nan, {"a": (math.inf,)}])


def test_nothing_known_is_still_an_atlas():
    kinds = ("stack", "standout", "figures", "reading", "alike", "spectra")
    Reader(page("", [{"kind": kind} for kind in kinds]))
    Reader(page("t", sections([{"layer": "a/0"}])))
    Reader(page("t", sections([row(0)])))


def test_keys_reach_what_the_pointer_reaches():
    text = page("t", sections())
    floors = re.search(r'<div class="floors[^>]*>', text)
    assert floors and 'role="listbox"' in floors[0] and 'tabindex="0"' in floors[0]
    assert 'aria-label="' in floors[0]
    assert text.count('aria-selected="false"') == COUNT
    for canvas in re.findall(r"<canvas[^>]*>", text):
        assert 'tabindex="0"' in canvas and 'aria-label="' in canvas
    for table in re.findall(r"<table[^>]*>", text.partition('data-of="maps"')[0]):
        assert 'role="grid"' in table
    assert text.count('aria-live="polite"') >= 4
    # whatever is clicked is a button, a link, an option or a cell
    assert not re.search(r"<(div|span|i|b)[^>]*onclick", text)
    for name in ("ArrowUp", "ArrowLeft", "Home", "Enter", "aria-sort", "aria-expanded"):
        assert name in text
    assert "prefers-reduced-motion" in text and ":focus-visible" in text and "@media print" in text


def test_scales_leave_far_values_out_and_say_so():
    assert scale_of([0.3, 0.31, 0.29, 0.32, 0.3, 50.0])[1] < 0.5
    strip = strips([row(i, update_norm=50.0 if i == 0 else 0.3 + i / 100) for i in range(8)])[1]
    assert strip.beyond(50.0) and not strip.beyond(0.33)
    assert strip.place(50.0) == 100 and 0 <= strip.place(0.33) < 100
    signed = strips([row(i) for i in range(8)])
    signed = next(s for s in signed if s.key == "depth_use.layer_cosine")
    assert signed.signed and signed.place(0.0) == 0 and signed.place(-0.05) < 0


def planted(**changes):
    """Twelve alike layers, but what is planted in layer 5."""
    noise = [0.004 * math.sin(7 * i) for i in range(COUNT)]
    rows = [
        row(i, block_influence=0.2 + noise[i], **{"lens.kl": 2.4 - 0.2 * i}) for i in range(COUNT)
    ]
    rows[5] |= changes
    return rows


def kinds_of(found, kind):
    return [(one.layers, one.apart) for one in found.found if one.kind == kind]


def test_a_layer_that_does_nothing_is_droppable():
    found = stand_out("m", planted(block_influence=0.001), [])
    assert kinds_of(found, "droppable")[0] == (("decoder/5",), True)
    assert not kinds_of(stand_out("m", planted(), []), "droppable")[0][1]


def test_a_layer_that_turns_everything_is_fragile():
    found = stand_out("m", planted(block_influence=1.3), [])
    assert (("decoder/5",), True) in kinds_of(found, "fragile")
    assert "decoder/5/*" in found.proof["fragile"]


def test_a_layer_with_a_massive_token_is_fragile():
    rows = planted()
    for i, one in enumerate(rows):
        one["spread.largest_norm"] = 400.0 if i >= 5 else 1.5
    sentences = [f.sentence for f in stand_out("m", rows, []).found if f.layers == ("decoder/5",)]
    assert any("massive" in s and "400" in s for s in sentences)


def test_the_layer_that_makes_the_answer_is_fragile():
    rows = planted()
    for i, one in enumerate(rows):
        one["lens.kl"] = 3.0 - 0.01 * i if i < 5 else 0.5 - 0.01 * i
    assert (("decoder/5",), True) in kinds_of(stand_out("m", rows, []), "fragile")


def test_layers_between_equal_states_are_redundant():
    def like(i, j):
        inside = min(i, j) >= 4 and max(i, j) <= 7
        return 1.0 if inside else 1 - 0.05 * abs(i - j)

    found = stand_out("m", [], [chain(COUNT, like)])
    layers = {key for keys, _ in kinds_of(found, "redundant") for key in keys}
    assert layers == {"decoder/4", "decoder/5", "decoder/6"}
    assert not stand_out("m", [], [chain(COUNT, lambda i, j: 1.0)]).found


def test_overlapping_intervals_are_told():
    rows = [row(i) for i in range(COUNT)]
    first = next(f for f in stand_out("m", rows, []).found if f.kind == "droppable")
    assert "so the order is not settled" in first.sentence
    rows[0]["block_influence"] = [0.001, 0.0009, 0.0011]
    first = next(f for f in stand_out("m", rows, []).found if f.kind == "droppable")
    assert first.layers == ("decoder/0",) and "overlap" not in first.sentence


def test_commands_hold_any_name():
    found = stand_out("my model; rm -rf x", planted(block_influence=0.001), [])
    assert "'my model; rm -rf x'" in found.proof["droppable"]
    assert "--depth 11" in found.proof["droppable"]


def test_few_layers_are_not_compared():
    assert not stand_out("m", [row(i) for i in range(3)], [chain(3)]).found
