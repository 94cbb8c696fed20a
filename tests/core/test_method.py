"""The registry: names, signatures and options are checked, and errors say what is near."""

import pytest

from layerwise.core import method as registry
from layerwise.core.errors import LayerwiseError
from layerwise.core.method import Size, find, method, methods


@pytest.fixture(autouse=True)
def _own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is gone after it."""
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))


def halve(weight, stats, *, bits: int = 4, share: float = 0.5, generator):
    """Halve it.

    More about it.
    """
    return weight * share, bits, generator


def test_the_signature_is_the_configuration() -> None:
    assert (
        method("weight", aliases=("half",), paper="arXiv:1", needs=("second_moment",))(halve)
        is halve
    )
    record = find("halve", "weight")
    assert find("half") is record
    assert (record.name, record.family, record.paper) == ("halve", "weight", "arXiv:1")
    assert record.needs == ("second_moment",)
    assert {name: p.default for name, p in record.options.items()} == {"bits": 4, "share": 0.5}
    assert record.given == ("generator",)
    assert record.summary == "Halve it."
    assert record.bind({"bits": 3, "share": 1}, generator=7, evaluate=8)(2, {}) == (2, 3, 7)
    assert methods("weight").count(record) == 1


def test_a_method_says_what_it_costs_with_its_own_defaults() -> None:
    method("weight", cost=lambda size, set_: f"runs {size.layers * set_['bits']} times")(halve)
    size = Size(layers=3, matrices=0, widest=0, inside=1, outside=0, tokens=1)
    assert find("halve").costs(size, {}) == "halve runs 12 times"
    assert find("halve").costs(size, {"bits": 2}) == "halve runs 6 times"
    method("weight", name="free")(halve)
    assert find("free").costs(size, {}) == ""


def test_a_trailing_underscore_is_not_part_of_the_name() -> None:
    def sum_(weight, stats):
        """Sum."""

    method("weight")(sum_)
    assert find("sum").function is sum_


@pytest.mark.parametrize(
    ("family", "function"),
    [
        ("weight", lambda weight: None),
        ("weight", lambda stats, weight: None),
        ("weight", lambda weight, stats, bits=4: None),
        ("wait", lambda weight, stats: None),
    ],
)
def test_a_wrong_signature_is_refused(family: str, function) -> None:
    with pytest.raises(LayerwiseError, match="positional arguments"):
        method(family, name="wrong")(function)
    with pytest.raises(LayerwiseError):
        find("wrong")


@pytest.mark.parametrize(("name", "aliases"), [("gptq", ()), ("shortgpt", ()), ("free", ("rtn",))])
def test_a_taken_name_is_refused_and_nothing_is_registered(name: str, aliases: tuple) -> None:
    before = dict(registry._METHODS)
    with pytest.raises(LayerwiseError, match=r"taken by the (weight|score) method"):
        method("weight", name=name, aliases=aliases)(halve)
    assert before == registry._METHODS


@pytest.mark.parametrize(
    ("name", "family", "near"),
    [
        ("gtpq", None, "did you mean gptq"),
        ("block_influenza", "score", "did you mean block_influence"),
        ("zzz", None, "`layerwise methods` lists them all"),
        ("gptq", "score", "a method of family 'score'"),
    ],
)
def test_an_unknown_name_is_shown_with_its_neighbours(name: str, family, near: str) -> None:
    with pytest.raises(LayerwiseError, match=near) as error:
        find(name, family)
    assert error.value.found == name


def test_an_unknown_option_is_shown_with_its_neighbours() -> None:
    with pytest.raises(LayerwiseError, match=r"gptq, option 'bit'.*found 3.*did you mean bits"):
        find("gptq").bind({"bit": 3})
    with pytest.raises(LayerwiseError, match="allowed is no option"):
        find("block_influence").bind({"span": 3})


@pytest.mark.parametrize(
    ("option", "value"),
    [("bits", "3"), ("bits", 3.0), ("bits", True), ("bits", None), ("order", 1), ("damping", "x")],
)
def test_a_value_of_the_wrong_type_is_refused(option: str, value: object) -> None:
    with pytest.raises(LayerwiseError, match=f"gptq, option {option!r}.*a value of type"):
        find("gptq").bind({option: value})


def test_a_value_that_is_no_choice_is_refused() -> None:
    assert find("residual_cosine").bind({"tokens": "last"})
    for value in ("first", 3, None):
        with pytest.raises(LayerwiseError, match=rf"tokens.*'all' or 'last'; found {value!r}"):
            find("residual_cosine").bind({"tokens": value})


def test_a_number_may_be_whole_where_it_may_be_broken() -> None:
    assert find("gptq").bind({"damping": 1}).keywords == {"damping": 1}


def test_every_alias_leads_to_its_method() -> None:
    for record in methods():
        assert all(find(name, record.family) is record for name in (record.name, *record.aliases))
        assert record.summary.endswith((".", ":"))
