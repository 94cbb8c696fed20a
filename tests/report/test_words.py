"""Figures and prose in words, colours from labels, names in the order of the network."""

import pytest

from layerwise.report.figures import Figure, figure, size, words
from layerwise.report.layers import union
from layerwise.report.prose import prose
from layerwise.report.svg import bits_of


@pytest.mark.parametrize(
    ("label", "bits"),
    [("gptq 3 bits g128", 3), ("rank 64 + rtn 16 bits", 16), ("as is", 16), ("rank 64", None)],
)
def test_bits_of(label, bits):
    assert bits_of(label) == bits


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (Figure(3.21341, 3.18, 3.2484), "3.213 [3.180, 3.248]"),
        (Figure(25.94, 24.98, 26.98), "25.9 [25.0, 27.0]"),
        (Figure(0.5, 0.5, 0.5), "0.500 [0.500, 0.500]"),
        (Figure(-0.0123), "\N{MINUS SIGN}0.0123"),
        (Figure(2.13e-9), "2.1\N{MULTIPLICATION SIGN}10⁻⁹"),
        (Figure(0.0), "0.00"),
        (Figure(float("inf")), "∞"),
        (Figure(4210.3), "4,210"),
    ],
)
def test_words(given, text):
    assert str(words(given)) == text


def test_figure_takes_numbers_and_triples():
    assert figure([1, 0, 2]) == figure((1.0, 0.0, 2.0)) == Figure(1.0, 0.0, 2.0)
    assert [figure(x) for x in (True, "0.5", [None, 1, 2])] == [None] * 3
    assert figure([1.0, None, 2.0]) == Figure(1.0)


def test_size():
    assert [size(n) for n in (0, 999, 15217152, 1.3e11)] == [
        "0 bytes",
        "999 bytes",
        "15.2 MB",
        "130 GB",
    ]


def test_union_keeps_positions():
    assert union([["mlp.up"], ["attention.q", "mlp.up"], ["mixer", "mlp.up"]]) == [
        "attention.q",
        "mixer",
        "mlp.up",
    ]


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("plain & <b>bold</b>", "<p>plain &amp; <b>bold</b></p>"),
        ('<p onclick="x">a<a href="//x">link</a>', "<p>alink</p>"),
        ("<p>a<script>run()</script>b</p>", "<p>ab</p>"),
        ("<em><strong>x</em>y", "<em><strong>x</strong></em>y"),
        ("</p>x", "<p>x</p>"),
        ("&lt;script&gt;", "<p>&lt;script&gt;</p>"),
        ("<style>p{}", "<p></p>"),
    ],
)
def test_prose(given, kept):
    assert prose(given) == kept
