"""The code on the pages is run; generated pages are compared by `make check`."""

import inspect
import re
import runpy
from pathlib import Path

import pytest

from layerwise.core import open as opening
from layerwise.core.method import FAMILIES

DOCS = Path(__file__).parents[2] / "docs"
OUTPUTS = runpy.run_path(str(DOCS / "outputs.py"))
difference, refreshed = OUTPUTS["difference"], OUTPUTS["refreshed"]

VERIFIED = """\
verified
name         bytes  loss          kl           prefill  what
original  15.22 MB  2.019         -              812.5  as it is
                    [1.279,
                    2.897]
plan       3.71 MB  2.237         0.2618         640.1  9 layers of
                    [1.502,       [0.2104,              decoder
                    3.089]        0.3078]
ok  cached equals uncached greedy decoding: 32 of 32 tokens
The plan's KL is 0.90 of the naive plan's at the same size (95% interval 0.87 to 0.93); all is well.
decoded at 640.1 tokens/s
"""


def blocks(page: str) -> str:
    return "\n".join(re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.S))


def check_only(family: str, **facts: object):
    """Like `@method`, but only compares the signature with the family's."""

    def check(function):
        parameters = inspect.signature(function).parameters.values()
        positional = tuple(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD)
        assert positional == FAMILIES[family], function.__name__
        own = [p for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is not p.empty]
        assert len(own) <= 6
        seen.append(function.__name__)
        return function

    seen = check_only.seen
    return check


def test_how_methods_fit() -> None:
    check_only.seen = []
    exec(blocks("how-methods-fit.md"), {"method": check_only, "layer": 0, "matrix": "", "share": 0})
    assert len(check_only.seen) >= 14
    for body in re.findall(r"def \w+\(.*?\).*?:\n((?:    .*\n)+)", blocks("how-methods-fit.md")):
        assert len(body.splitlines()) <= 2


@pytest.mark.parametrize("page", ["guide/measure.md", "guide/interventions.md", "../README.md"])
def test_examples_run(page: str) -> None:
    exec(blocks(page), {})


def test_adding_a_method() -> None:
    import torch

    from layerwise.core import method as registry
    from layerwise.core.stack import Layer, Stack, plain_wiring
    from layerwise.core.stats import Stats

    code = blocks("adding-a-method.md")
    assert len(code.strip().splitlines()) < 20
    known = dict(registry._METHODS)
    try:
        exec(code, {})
        bound = registry.find("spectral_share", "score").bind(
            {"top": 1}, fetch=lambda key: {"w": torch.eye(4)}
        )
        layer = Layer("decoder", 0, "", torch.nn.Identity(), (), ())
        stack = Stack("decoder", "", (layer,), plain_wiring(1))
        assert bound(stack, Stats({})).values == pytest.approx({"decoder/0": 0.25})
    finally:
        registry._METHODS.clear()
        registry._METHODS.update(known)


@pytest.mark.parametrize("page", sorted((DOCS / "guide").glob("*.md")), ids=lambda p: p.stem)
def test_outputs_are_there(page: Path) -> None:
    found = OUTPUTS["EXAMPLE"].findall(page.read_text())
    assert any(code.startswith("layerwise ") for _, _, code, _, _ in found)
    assert len(found) == page.read_text().count("<!-- output -->")
    for _, _, code, shown, _ in found:
        assert re.fullmatch(r"```text\n.*\S.*\n```\n", shown, re.S), code


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("2.019  ", "2.021  "),
        ("0.2618", "0.2218"),  # what is measured has an interval
        ("3.71 MB", "3710 kB"),
        ("812.5", "411.9"),
        ("640.1 tokens/s", "9.5 tokens/s"),
        ("of the naive", "of  the naive"),
    ],
)
def test_same_output(old: str, new: str) -> None:
    assert old in VERIFIED
    assert not difference(VERIFIED, VERIFIED.replace(old, new))


def test_wrapping_does_not_matter() -> None:
    plan = """\
plan       3.71 MB  2.237         0.2618         640.1  9 layers of
                    [1.502,       [0.2104,              decoder
                    3.089]        0.3078]
"""
    wrapped = """\
plan       3.71 MB  2.24 [1.502,  0.2618         640.1  9 layers of
                    3.089]        [0.2104,              decoder
                                  0.3078]
"""
    assert plan in VERIFIED
    assert not difference(VERIFIED, VERIFIED.replace(plan, wrapped))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("2.237", "2.984"),
        ("0.2618", "-     "),
        ("3.71 MB", "3.71 kB"),
        ("812.5", "    -"),
        ("9 layers", "8 layers"),
        ("kl     ", "damage "),
        ("greedy decoding", "sampled decoding"),
        ("naive plan's", "uniform plan's"),
        ("ok  cached equals uncached greedy decoding: 32 of 32 tokens\n", ""),
    ],
)
def test_drift(old: str, new: str) -> None:
    assert old in VERIFIED
    assert difference(VERIFIED, VERIFIED.replace(old, new))


def test_another_text_has_other_figures() -> None:
    other = VERIFIED.replace("2.237", "2.984").replace("9 layers", "8 layers")
    other = other.replace("The plan's KL is 0.90 of", "The plan is no better than")
    assert not difference(VERIFIED, other, same_text=False)
    assert difference(VERIFIED, other.replace("greedy", "sampled"), same_text=False)


def test_examples_of_a_page_follow_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("COLUMNS", "NO_COLOR", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.setenv(name, "")  # put back afterwards
    monkeypatch.setattr(opening, "has_bfloat16", opening.has_bfloat16)
    told: list[str] = []
    page = """
```sh
echo one > file.txt
cat file.txt | tr a-z A-Z
```
<!-- output -->
<!-- /output -->

```sh
not run
```

```python
text = open("file.txt").read().strip()
```
<!-- output -->
<!-- /output -->

```python
print(text, 2)
```
<!-- output -->
```text
one 3
```
<!-- /output -->
"""
    fresh = refreshed(page, told.append)
    assert told == ["there was no output", "there was no output", "3 is now 2 in one 3"]
    assert re.findall(r"```text\n(.*?)\n```", fresh, re.S) == ["ONE", "", "one 2"]
    assert refreshed(fresh, told.append) == fresh
