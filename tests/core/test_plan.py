"""Plans: text and back, errors that name the key, and selectors."""

import random
from itertools import product
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from layerwise.core.errors import LayerwiseError
from layerwise.core.plan import (
    UNITS,
    DataSpec,
    Edit,
    Identity,
    Plan,
    Step,
    chains_of,
    check_model,
    check_selectors,
    parse_plan,
    read_plan,
    settings,
)
from layerwise.core.select import last_naming, selects
from layerwise.core.stack import Matrix

words = st.text(max_size=12)
numbers = st.integers(-(2**40), 2**40)
counts = st.integers(1, 2**40)
floats = st.floats(allow_nan=False)
values = st.recursive(
    st.none() | st.booleans() | numbers | floats | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=5,
)
steps = st.builds(Step, method=words, options=st.dictionaries(words, values, max_size=3))
edits = st.builds(
    Edit,
    select=words,
    chain=st.lists(steps, max_size=3).map(tuple),
    bytes=st.none() | numbers,
    damage=st.none() | floats,
)
plans = st.builds(
    Plan,
    model=st.builds(Identity, structure=words, weights=words),
    target=st.sampled_from(["hf", "compressed-tensors", "gguf"]),
    budget=st.dictionaries(st.sampled_from(UNITS), floats, max_size=2),
    data=st.builds(DataSpec, source=words, seed=numbers, samples=counts, length=counts),
    wiring=st.dictionaries(words, st.lists(values, max_size=4), max_size=2),
    edits=st.lists(edits, max_size=3).map(tuple),
    fixed=st.lists(words, max_size=3).map(tuple),
)
GOOD = Plan(
    Identity("s" * 64, "w" * 64),
    data=DataSpec(length=256),
    edits=(Edit("decoder/*/mlp", (Step("rtn"),)),),
)


@given(plan=plans)
def test_text_and_back(plan: Plan) -> None:
    assert parse_plan(plan.to_yaml()) == plan


def test_a_saved_plan_is_read_back(tmp_path: Path) -> None:
    GOOD.save(tmp_path / "plan.yaml")
    assert read_plan(tmp_path / "plan.yaml") == GOOD
    assert [file.name for file in tmp_path.iterdir()] == ["plan.yaml"]


@pytest.mark.parametrize(
    ("old", "new", "shown"),
    [
        ("layerwise: 1", "layerwise: 2", "layerwise"),
        ("model:", "modle:", "modle|model"),
        ("select:", "selct:", "selct|select"),
        ("method: rtn", "method: 3", r"edits\[0\].chain\[0\].method"),
        ("samples: 128", "samples: many", r"data.samples"),
        ("target: hf", "target: onnx", "onnx"),
        ("seed: 0", "seed: 0\n  extra: 1", "extra"),
        ("chain:", "chian: []\n  chain:", "chian"),
        ("method: rtn", "method: rtn\n    option: {}", "option"),
        ("edits:", "edits: [", "YAML"),
    ],
)
def test_errors_name_the_key(old: str, new: str, shown: str) -> None:
    text = GOOD.to_yaml() + "target: hf\n"
    assert old in text
    with pytest.raises(LayerwiseError, match=shown) as error:
        parse_plan(text.replace(old, new, 1), "p.yaml")
    assert error.value.where == "p.yaml"
    assert error.value.allowed == ("YAML" if shown == "YAML" else "the fields of a plan")


@given(text=st.text(max_size=40))
@example("2001-99-99")
@example("[" * 1500)
@example("!!int x")
@example("a: &a [*a]")
def test_any_text_is_a_plan_or_an_error(text: str) -> None:
    with pytest.raises(LayerwiseError):
        parse_plan(text)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path / "none.yaml", tmp_path, tmp_path / "binary.yaml"):
        with pytest.raises(LayerwiseError, match=str(path)):
            read_plan(path)


def matrix(layer: str, part: str, role: str, leaf: str = "x_proj", expert=None) -> Matrix:
    parameter = f"{part}.{leaf}.weight"
    return Matrix(layer, part, role, parameter, expert, (2, 2), False, "", "")


@pytest.mark.parametrize(
    ("selector", "yes"),
    [
        ("decoder", True),
        ("*", True),
        ("dec*", True),
        ("encoder", False),
        ("decoder/5", True),
        ("decoder/4", False),
        ("decoder/5-5", True),
        ("decoder/3-7", True),
        ("decoder/6-7", False),
        ("decoder/1-9/2", True),
        ("decoder/2-9/2", False),
        ("decoder/1-9/2/mlp.down", True),
        ("decoder/2-9/2/mlp.down", False),
        ("*/*/2/mlp", False),
        ("*/*/5/mlp", True),
        ("*/*/mlp", True),
        ("*/*/*.down", True),
        ("*/*/mlp.up", False),
        ("*/*/attention", False),
        ("*/*/mlp.down_proj", True),
        ("*/*/*.d*n", True),
        ("*/*/mlp.down/more", False),
    ],
)
def test_selectors(selector: str, yes: bool) -> None:
    assert selects(selector, matrix("decoder/5", "mlp", "down", "down_proj")) is yes


def test_selectors_of_experts() -> None:
    third = matrix("decoder/0", "mlp", "up", "up_proj", expert=3)
    assert selects("*/*/mlp.up", third)
    assert selects("*/*/mlp.up[3]", third)
    assert selects("*/*/mlp.up_proj[*]", third)
    assert not selects("*/*/mlp.up[2]", third)


@pytest.mark.parametrize(
    "selector",
    ["decoder/x", "decoder/3-x/mlp", "decoder/-3", "decoder//mlp", "*/²/mlp", "*/1-4/0/mlp"],
)
def test_a_wrong_field_is_named(selector: str) -> None:
    with pytest.raises(LayerwiseError, match=r"selector.*3-7"):
        selects(selector, matrix("decoder/5", "mlp", "down"))


def test_the_last_match_wins() -> None:
    one, two = (Step("rtn", {"bits": bits}) for bits in (3, 4))
    rules = (Edit("*/*/mlp", (one,)), Edit("*/0-1/*", (two,)), Edit("*/1/mlp", ()))
    chains = [chains_of(rules)(matrix(f"decoder/{i}", "mlp", "up")) for i in range(3)]
    assert chains == [(two,), (), (one,)]
    assert chains_of(rules)(matrix("decoder/2", "attention", "q")) == ()


def test_a_selector_that_names_nothing_is_an_error() -> None:
    known = [matrix("decoder/0", "mlp", "up"), matrix("decoder/0", "attention", "q")]
    check_selectors(GOOD, known)
    with pytest.raises(LayerwiseError, match=r"decoder/\*/mlp.*attention.q"):
        check_selectors(GOOD, known[1:])


def test_a_plan_belongs_to_one_model() -> None:
    structure, weights = GOOD.model.structure, GOOD.model.weights
    check_model(GOOD, structure, weights)
    check_model(GOOD, structure, "other", other_weights=True)
    with pytest.raises(LayerwiseError, match=r"model weights.*--other-weights"):
        check_model(GOOD, structure, "other")
    with pytest.raises(LayerwiseError, match="model structure"):
        check_model(GOOD, "other", weights, other_weights=True)


def test_settings() -> None:
    pairs = ["gptq.bits=3", "gptq.order=true", "data.source=a=b", "rtn.group=", "greedy.x=[1, 2]"]
    assert settings(pairs) == {
        "gptq": {"bits": 3, "order": True},
        "data": {"source": "a=b"},
        "rtn": {"group": None},
        "greedy": {"x": [1, 2]},
    }


@pytest.mark.parametrize(
    "pair", ["gptq", "gptq.bits", "bits=3", ".bits=3", "gptq.=3", "gptq.bits=[3"]
)
def test_a_wrong_setting_is_shown(pair: str) -> None:
    with pytest.raises(LayerwiseError) as error:
        settings([pair])
    assert pair in str(error.value)


HEAD = "layerwise: 1\nmodel: {structure: s, weights: w}\n"
LAUGHS = [
    f"  {b}: &{b} [{', '.join([f'*{a}'] * 9)}]" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
]


@pytest.mark.parametrize(
    "text",
    [
        "wiring: {decoder: &a [*a]}",
        "edits: [{select: x, chain: [{method: a, options: &o {o: *o}}]}]",
        "\n".join(["wiring:", "  a: &a [0, 0, 0, 0, 0, 0, 0, 0, 0]", *LAUGHS]),
        "fixed: " + "[" * 5000,
        'fixed: ["\\UFFFFFFFF"]',
        "fixed: [2026-99-99]",
    ],
)
def test_documents_that_are_traps(text: str) -> None:
    with pytest.raises(LayerwiseError):
        parse_plan(HEAD + text)


def test_an_alias_is_a_value_written_once() -> None:
    text = "edits: [{select: a, chain: &c [{method: rtn}]}, {select: b, chain: *c}]"
    plan = parse_plan(HEAD + text)
    assert plan.edits[0].chain == plan.edits[1].chain == (Step("rtn"),)
    assert parse_plan(plan.to_yaml()) == plan


def test_the_last_selector_that_names_a_matrix_counts() -> None:
    """Selectors of single matrices are looked up, all others tried: as trying all of them."""
    draw = random.Random(0)
    kinds = (("mlp", "up", "wi"), ("mlp", "gate", "up"), ("attention", "q", "q_proj"))
    known = [
        matrix(f"{stack}/{index}", part, role, own, expert)
        for stack, index in product(("decoder", "encoder"), range(4))
        for (part, role, own), expert in product(kinds, (None, 0, 1))
    ]
    inner = ("*", "mlp", "mlp.up", "mlp.up[1]", "mlp.gate", "*.up", "mlp.wi[0]", "attention.q_proj")
    outer = product(("decoder", "*", "enc*"), ("*", "0", "2", "03", "0-2", "0-3/2", "1/1"), inner)
    patterns = ["decoder/1", "*", *("/".join(fields) for fields in outer)]
    for _ in range(200):
        chosen = draw.choices(patterns, k=draw.randrange(8))
        found = last_naming([(pattern, i) for i, pattern in enumerate(chosen)], -1)
        for one in known:
            naming = [i for i, pattern in enumerate(chosen) if selects(pattern, one)]
            assert found(one) == max(naming, default=-1)
