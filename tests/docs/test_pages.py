"""The code on the pages is run; generated pages are compared by `make check`."""

import inspect
import re
from pathlib import Path

import pytest

from layerwise.core.method import FAMILIES

DOCS = Path(__file__).parents[2] / "docs"


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


@pytest.mark.parametrize("page", ["guide/measure.md", "../README.md"])
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
