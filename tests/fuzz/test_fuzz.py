"""A short run of the fuzzing, without guidance; and what guided fuzzing found, once and for all.

The long one: python tests/fuzz/guided.py OUT SECONDS
"""

import warnings
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mutations import CODECS, changed
from targets import FIELDS, TARGETS, refuses_or_answers

#: runs of each target; opening a network takes longest
RUNS = {"config": 40}

FOUND = {
    "a character beyond the last": ("words", b'a.b="\\UFFFFFFFF"'),
    "architectures that are no list": ("config", b'{"model_type": "llama", "architectures": true}'),
    "a depth that fills the memory": (
        "config",
        b'{"model_type": "gpt2", "num_hidden_layers": 2147483648}',
    ),
    "a file name that no file can have": ("index", b'{"weight_map": {"a": "' + b"x" * 300 + b'"}}'),
    "half a character in a name": ("plan", b'"\\uD800": 1\nlayerwise: 1'),
    "a line end in a name": ("plan", b'? "a\\nb"\n: 1'),
    "an alias of itself": ("plan", b"layerwise: 1\nmodel: {structure: &a [*a], weights: w}"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@pytest.mark.parametrize("case", FOUND)
def test_what_was_found(case: str, folder: Path) -> None:
    name, content = FOUND[case]
    refuses_or_answers(name, content, folder)


@pytest.mark.parametrize("name", TARGETS)
def test_what_it_begins_with(name: str, folder: Path) -> None:
    for content in TARGETS[name][1]():
        taken = refuses_or_answers(name, content, folder)
        assert taken or name in ("header", "plan")  # a part of a file; a plan for other matrices


@pytest.mark.parametrize("name", CODECS)
def test_changes_of_meaning(name: str, folder: Path) -> None:
    begin = TARGETS[name][1]()[-1]

    @settings(max_examples=RUNS.get(name, 150))
    @given(st.lists(st.integers(0, 2**32), min_size=1, max_size=4))
    def run(seeds: list[int]) -> None:
        content = begin
        for seed in seeds:
            try:
                content = changed(name, content, seed, FIELDS)
            except Exception:  # it is no JSON or YAML any more, and that is an input as well
                break
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            refuses_or_answers(name, content, folder)

    run()


@pytest.mark.parametrize("name", TARGETS)
def test_changes_of_bytes(name: str, folder: Path) -> None:
    begin = TARGETS[name][1]()[0]
    change = st.tuples(st.integers(0, len(begin) - 1), st.integers(0, 255))

    @settings(max_examples=RUNS.get(name, 150))
    @given(st.lists(change, max_size=5), st.integers(0, len(begin)) | st.none())
    def run(changes: list[tuple[int, int]], cut: int | None) -> None:
        content = bytearray(begin)
        for place, value in changes:
            content[place] = value
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            refuses_or_answers(name, bytes(content[:cut]), folder)

    run()
