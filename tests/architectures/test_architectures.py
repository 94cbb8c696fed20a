"""Every architecture of four Auto mappings does what the committed list says; it may only grow."""

import json
from pathlib import Path

import pytest
from build import Entry, entries
from checks import STAGES, run

LIST = Path(__file__).with_name("passes.json")
KNOWN = json.loads(LIST.read_text())
ENTRIES = list(entries())


@pytest.mark.parametrize("entry", ENTRIES, ids=[entry.key for entry in ENTRIES])
def test_what_passed_still_passes(entry: Entry, tmp_path: Path) -> None:
    known = KNOWN.get(entry.key)
    if known is None:
        pytest.skip("not in the list: python tests/architectures/record.py")
    stages = [stage for stage in STAGES if known.get(stage) == ""]
    if not stages:
        pytest.skip(known["build"] or "nothing passes")
    stages = [s for s in STAGES if s in stages or (s == "drop" and "decoding" in stages)]
    results = run(entry, tmp_path, stages)
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
    assert share("drop", causal) >= 0.95
    assert share("drop", others) >= 0.85
