"""The page: everything that was given is on it, and nothing runs or loads that was not written."""

import re

import pytest
from tags import EVIL, Reader

from layerwise.core.errors import LayerwiseError
from layerwise.report import page
from layerwise.report.figures import figure, words

GROUPS = ("attention.q", "attention.o", "mlp.gate", "mlp.down")


def plan_section(count=12, dropped=(), groups=GROUPS, **changes):
    layers = [
        {
            "layer": f"decoder/{i}",
            "bytes": 0 if i in dropped else 377856 + i,
            "original_bytes": 1179648,
            "error": None if i in dropped else 0.0003 * (i + 1),
            "dropped": i in dropped,
            "groups": {g: f"gptq {2 + (i + j) % 7} bits g128" for j, g in enumerate(groups)},
        }
        for i in range(count)
    ]
    empty = dict.fromkeys(("kl", "agree", "prefill", "decode", "memory", "cached", "loads"))
    rows = [
        {**empty, "name": "original", "bytes": 15217152, "loss": [3.213, 3.180, 3.248]},
        {
            "name": "plan",
            "bytes": 4823040,
            "loss": [3.256, 3.218, 3.295],
            "perplexity": [25.94, 24.98, 26.98],
            "kl": [0.0488, 0.0455, 0.0529],
            "agree": [0.8913, 0.8871, 0.8955],
            "prefill": 3984.1,
            "memory": 52100000,
            "cached": True,
            "loads": "transformers 5.23.0",
            "what": "48x gptq",
        },
        {**empty, "name": "naive", "bytes": 4811776, "kl": [0.1214, 0.1125, 0.1300]},
    ]
    checks = [
        {"name": "cached equals uncached", "ok": True, "found": "32 of 32 tokens"},
        {"name": "stock rebuild", "ok": False, "found": "2.0e-03"},
    ]
    ratio = {"field": "kl", "value": [0.402, 0.371, 0.436]}
    section = {"kind": "plan", "title": "3 bits", "budget": "--bits 3", "rows": rows}
    return {
        **section,
        "layers": layers,
        "checks": checks,
        "ratio": ratio,
        "verdict": "Yes.",
    } | changes


def rows_of(text, layer):
    """The table rows that are headed by a layer."""
    return re.findall(rf'<th scope="row" class="key"[^>]*>{re.escape(layer)}</th>', text)


def test_every_layer_is_a_row():
    text = page("t", [plan_section(80, dropped=(3, 79))])
    Reader(text)
    for i in range(80):
        assert len(rows_of(text, f"decoder/{i}")) == 1


def test_every_interval_is_written():
    text = "".join(Reader(page("t", [plan_section()])).text)
    for interval in (
        "3.213 [3.180, 3.248]",
        "3.256 [3.218, 3.295]",
        "25.9 [25.0, 27.0]",
        "0.0488 [0.0455, 0.0529]",
        "0.1214 [0.1125, 0.1300]",
        "89.13% [88.71, 89.55]",
        "0.402 [0.371, 0.436]",
    ):
        assert interval in text, interval


def test_every_group_of_every_layer_says_what_it_got():
    text = page("t", [plan_section(dropped=(5,))])
    for i in range(12):
        for j, group in enumerate(GROUPS):
            title = f"<title>decoder/{i} {group}: gptq {2 + (i + j) % 7} bits g128</title>"
            assert (title in text) == (i != 5), title
    assert "<title>decoder/5: dropped</title>" in text


def test_a_row_with_a_figure_is_a_point_with_a_whisker():
    text = page("t", [plan_section()])
    area = text[text.index('class="area"') : text.index("</figure>")]
    assert area.count('class="whisker"') == 2
    for name in ("original", "plan", "naive"):
        assert f">{name}</text>" in area


def test_every_point_is_inside_the_plot():
    text = page("t", [plan_section()])
    places = re.findall(r'<svg class="point \w+" x="([\d.]+)%" y="([\d.]+)"', text)
    assert len(places) == 6  # three marks and their three labels
    assert all(0 < float(x) <= 100 and 0 <= float(y) <= 300 for x, y in places)


@pytest.mark.parametrize("value", [[0.402, 0.371, 0.436], [0.0, 0.0, 0.1], 0.0, float("inf")])
def test_a_ratio_that_cannot_be_drawn_is_written(value):
    text = page("t", [plan_section(ratio={"field": "kl", "value": value})])
    foot = text[text.index('class="verdict') :]
    assert ('class="ratio"' in foot) == (value == [0.402, 0.371, 0.436])
    assert str(words(figure(value))) in foot


def test_a_loss_is_plotted_where_there_is_no_kl():
    section = plan_section(ratio=None)
    section["rows"] = [{**row, "kl": None} for row in section["rows"]]
    text = page("t", [section])
    assert "Loss, nats per token" in text
    assert "KL to the original" not in text


def test_a_check_passes_and_fails_in_words():
    text = "".join(Reader(page("t", [plan_section()])).text)
    assert "✓ passedcached equals uncached32 of 32 tokens" in text
    assert "✗ failedstock rebuild2.0e-03" in text


def test_nothing_is_loaded_from_elsewhere():
    text = page("t", [plan_section(), {"kind": "text", "title": "n"}])
    assert not [word for word in ("http:", "https:", "@import", "url(") if word in text]
    reader = Reader(text)
    assert not {"img", "iframe", "object"} & set(reader.tags)
    for name, value in reader.attributes:
        assert name != "src"
        assert name != "href" or value.startswith("#") or value == "data:,"


def test_given_strings_are_text():
    section = plan_section(title=EVIL, budget=EVIL, verdict=EVIL, groups=(EVIL, f"a.{EVIL}"))
    for layer in section["layers"]:
        layer["layer"] += EVIL
        layer["groups"] = {name: EVIL for name in layer["groups"]}
    section["rows"] = [{**r, "name": EVIL, "what": EVIL, "loads": EVIL} for r in section["rows"]]
    section["checks"] = [{"name": EVIL, "ok": True, "found": EVIL}]
    section["ratio"]["field"] = EVIL
    text = page(EVIL, [section, {"kind": "text", "title": EVIL, "html": EVIL}])
    reader = Reader(text)
    assert reader.tags.count("script") == 1
    assert "alert('1')" not in text
    assert "&lt;script&gt;" in text


def test_nothing_known_is_still_a_page():
    rows = [{"name": "original", "bytes": None, "loss": None}, {"name": "plan"}]
    layers = [{"layer": "a/0"}, {"layer": "a/1", "groups": None, "bytes": None, "dropped": True}]
    ratio = {"field": "kl", "value": None}
    text = page(
        "",
        [
            {"kind": "plan"},
            {"kind": "plan", "rows": rows, "layers": layers, "ratio": ratio, "checks": None},
            {"kind": "text"},
        ],
    )
    Reader(text)
    assert all(rows_of(text, name) for name in ("a/0", "a/1"))
    shown = "".join(Reader(re.sub(r"<style>.*?</style>", "", text, flags=re.S)).text)
    assert not re.search(r"\b(nan|None|inf)\b", shown)


@pytest.mark.parametrize("kl", [0.0, -1e-9, float("inf"), float("nan"), [0.1, 0.1, 0.1], 1e300])
def test_odd_figures_are_still_a_page(kl):
    section = plan_section(ratio={"field": "kl", "value": kl})
    section["rows"][1]["kl"] = kl
    section["layers"][0]["error"] = kl
    Reader(page("t", [section]))


def test_many_groups_are_cells_without_numbers():
    groups = [f"mlp.experts.{j}" for j in range(64)]
    text = page("t", [plan_section(groups=groups)])
    Reader(text)
    assert text.count('class="row dense"') == 12
    assert "decoder/11 mlp.experts.63: gptq" in text


def test_an_unknown_kind_is_refused():
    with pytest.raises(LayerwiseError, match="spectra, plan, text; found 'sketch'"):
        page("t", [{"kind": "sketch"}])
