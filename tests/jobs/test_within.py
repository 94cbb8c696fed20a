"""A budget of quality: as small as a KL allows, measured."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from layerwise.cli import app
from layerwise.core.errors import LayerwiseError
from layerwise.core.plan import DataSpec
from layerwise.jobs.apply import apply_plan
from layerwise.jobs.plan import make_plan
from layerwise.jobs.request import Planned, Request
from layerwise.jobs.session import Budget
from layerwise.jobs.verify import Settings, verify

DATA = DataSpec(samples=2, length=32)
SETTINGS = {"menu": {"bits": [2, 4, 8], "group": [32]}}


@pytest.fixture(autouse=True)
def _few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans are measured on fewer documents than users get."""
    monkeypatch.setattr("layerwise.jobs.contest.DOCUMENTS", 4)


def planned(model: Path, kl: float, allocator: str = "knapsack", score: str = "") -> Planned:
    request = Request(model, Budget(kl=kl), data=DATA, settings=SETTINGS, score=score)
    return make_plan(request._replace(allocator=allocator))


@pytest.mark.parametrize(
    ("allocator", "score"), [("knapsack", ""), ("threshold", "interactions"), ("uniform", "")]
)
def test_the_smallest_of_those_within_the_bound_is_taken(tiny, allocator: str, score: str) -> None:
    wide = planned(tiny("llama"), 1.0, allocator, score)
    bound = 1.5 * min(row["high"] for row in wide.edge)
    found = planned(tiny("llama"), bound, allocator, score)
    within = [row for row in found.edge if row["high"] <= bound]
    taken = [row for row in found.edge if row["chosen"]]
    assert [row["bytes"] for row in taken] == [min(row["bytes"] for row in within)]
    assert found.nbytes == taken[0]["bytes"] >= wide.nbytes
    assert len(found.edge) <= 8


def test_more_may_be_lost_in_fewer_bytes(tiny, tmp_path: Path) -> None:
    """A bound that everything meets is met by the smallest options, and verify says so."""
    small = planned(tiny("llama"), 50.0)
    assert len(small.edge) == 1
    assert {row["option"].split()[1] for row in small.rows} == {"2"}
    applied = apply_plan(tiny("llama"), small.plan, tmp_path / "out")
    assert applied.nbytes == small.nbytes
    settings = Settings(documents=2, length=32, naive=False, speed=False, memory=False)
    checks = verify(tiny("llama"), tmp_path / "out", settings).checks
    assert [c["ok"] for c in checks if c["name"] == "KL of at most 50"] == [True]


def test_a_bound_that_nothing_meets_is_answered(tiny) -> None:
    with pytest.raises(LayerwiseError, match="such as --kl"):
        planned(tiny("llama"), 1e-9)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--kl -1", "write for instance 0.05"),
        ("--kl 0.1 --bits 3", "exactly one of"),
        ("--kl 0.1 --allow width,layer", "--size"),
        ("--kl 0.1 --allow bits,layer --allocator uniform", "knapsack"),
        ("--kl 0.1 --rewrite awq", "give a size"),
        ("--kl 0.1 --target hf", "--kl"),
        ("--kl 0.1 --target hf --method gptq", "--target compressed-tensors"),
    ],
)
def test_what_a_bound_cannot_be_met_with(tiny, tmp_path: Path, words: str, said: str) -> None:
    given = [*f"plan {tiny('llama')} {words}".split(), "--out", str(tmp_path / "p.yaml")]
    found = CliRunner().invoke(app, given)
    assert found.exit_code == 2
    assert said in found.stderr


def test_the_command_tells_the_way(tiny, tmp_path: Path) -> None:
    words = f"plan {tiny('llama')} --kl 5 --samples 2 --length 32 --set menu.group=[32] --json"
    found = CliRunner().invoke(app, [*words.split(), "--out", str(tmp_path / "p.yaml")])
    assert found.exit_code == 0, found.output
    assert {"plan", "bytes", "expected", "high", "chosen"} <= json.loads(found.stdout)["more"][
        "edge"
    ][0].keys()


def test_layers_may_go_too(tiny, tmp_path: Path) -> None:
    request = Request(tiny("llama"), Budget(kl=50.0), data=DATA, settings=SETTINGS)
    found = make_plan(request._replace(allow=("bits", "layer")))
    assert len(found.plan.wiring["decoder"]) < 4
    assert "left out" in found.edge[0]["plan"]
    assert apply_plan(tiny("llama"), found.plan, tmp_path / "out").nbytes == found.nbytes
