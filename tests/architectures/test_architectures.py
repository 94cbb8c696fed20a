"""Every architecture of four Auto mappings does what the committed list says; it may only grow."""

import json
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
from build import Entry, entries
from checks import STAGES
from record import recorded

LIST = Path(__file__).with_name("passes.json")
KNOWN = json.loads(LIST.read_text())
ENTRIES = list(entries())


@pytest.fixture(scope="module")
def outside() -> Iterator[ProcessPoolExecutor]:
    """A process without the run-time checks of types, which would take most of the time."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        yield pool


@pytest.mark.parametrize("entry", ENTRIES, ids=[entry.key for entry in ENTRIES])
def test_what_passed_still_passes(entry: Entry, outside: ProcessPoolExecutor) -> None:
    known = KNOWN.get(entry.key)
    if known is None:
        pytest.skip("not in the list: python tests/architectures/record.py")
    stages = [stage for stage in STAGES if known.get(stage) == ""]
    if not stages:
        pytest.skip(known["build"] or "nothing passes")
    stages = [s for s in STAGES if s in stages or (s == "drop" and "decoding" in stages)]
    _, results = outside.submit(recorded, entry, stages).result()
    failed = {s: results.get(s, results["build"]) for s in stages if known[s] == ""}
    assert not any(failed.values()), failed


def test_the_shares_that_are_promised() -> None:
    built = {key: found for key, found in KNOWN.items() if not found["build"]}
    assert len(built) >= 285

    def share(stage: str, keys: list[str]) -> float:
        return sum(built[key][stage] == "" for key in keys) / len(keys)

    causal = [key for key in built if key.startswith("causal/")]
    others = [key for key in built if not key.startswith("causal/")]
    assert share("stack", list(built)) >= 0.98
    assert share("lockstep", list(built)) >= 0.98
    assert share("patching", list(built)) >= 0.98
    assert share("parts", list(built)) >= 0.88
    assert share("drop", causal) >= 0.95
    assert share("drop", others) >= 0.85
    assert share("loop", causal) >= 0.84
    assert share("drafts", causal) >= 0.77
