"""One budget for bits and layers, from the command line to the folder."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from layerwise.cli import app
from layerwise.core.damage import Damage, Menu, Option, total
from layerwise.core.errors import LayerwiseError
from layerwise.core.open import open_network
from layerwise.core.plan import DataSpec
from layerwise.jobs.apply import apply_plan, preview
from layerwise.jobs.gain import solver_gain
from layerwise.jobs.leaving import as_measured, tried
from layerwise.jobs.plan import make_plan
from layerwise.jobs.request import Planned, Request
from layerwise.jobs.session import Budget
from layerwise.jobs.solve import Step
from layerwise.jobs.verify import Settings, verify

DATA = DataSpec(samples=2, length=32)
KEPT, GONE = Option((), 8, "stays"), Option((), 0, "left out", gone=True)
MENU = {"menu": {"bits": [2, 4], "group": [32]}}


def planned(model: Path, target: str, bits: float, gone: int = -1) -> Planned:
    types = {"menu": {"type": ["Q8_0", "Q4_0"]}} if target == "gguf" else MENU
    settings = {**types, "knapsack": {"gone": gone}}
    request = Request(model, Budget(bits=bits), target, data=DATA, settings=settings)
    return make_plan(request._replace(allow=("bits", "layer")))


@pytest.mark.parametrize(("target", "bits"), [("compressed-tensors", 3.2), ("gguf", 5.0)])
def test_the_planned_bytes_are_written(tiny, tmp_path: Path, target: str, bits: float) -> None:
    found = planned(tiny("llama"), target, bits, gone=1)
    assert len(found.plan.wiring["decoder"]) == 3
    applied = apply_plan(tiny("llama"), found.plan, tmp_path / "out")
    assert applied.nbytes == found.nbytes
    assert found.bits is not None and found.bits <= bits


@pytest.mark.parametrize("gone", [1, 3])
def test_parts_that_go_are_stored_as_nothing(tiny, tmp_path: Path, gone: int) -> None:
    """The weights of the others are solved without them, and the folder runs as it was written."""
    settings = {**MENU, "knapsack": {"gone": gone}}
    request = Request(tiny("llama"), Budget(bits=2.6), "compact", data=DATA, settings=settings)
    found = make_plan(request._replace(allow=("bits", "part")))
    applied = apply_plan(tiny("llama"), found.plan, tmp_path / "out")
    assert applied.nbytes == found.nbytes
    assert sum(row["bytes"] for row in preview(tiny("llama"), found.plan)) < found.nbytes
    opened = open_network(tmp_path / "out")
    parts = [visit.parts for visit in opened.visits.values() if visit.parts is not None]
    assert len(parts) + 2 * (4 - len(opened.layers())) == gone
    checked = verify(tiny("llama"), tmp_path / "out", Settings(3, 32, speed=False, memory=False))
    assert all(check["ok"] for check in checked.checks), checked.checks


def test_what_no_bits_can_reach_is_reached_by_leaving_layers_out(tiny) -> None:
    with pytest.raises(LayerwiseError, match="--allow bits,layer"):
        make_plan(Request(tiny("llama"), Budget(bits=2.0), data=DATA, settings=MENU))
    found = planned(tiny("llama"), "compressed-tensors", 2.0)
    assert found.plan.wiring
    taken = [row for row in found.edge if row["chosen"]]
    assert len(taken) == 1


def test_what_promises_more_than_was_shown_is_solved(tiny) -> None:
    rows = planned(tiny("llama"), "compressed-tensors", 3.2).edge
    shown = [row["expected"] for row in rows if row["solved"]]
    assert len(rows) > 1 and [r["expected"] for r in rows if r["chosen"]] == [min(shown)]
    assert all(row["expected"] >= min(shown) for row in rows)


def test_what_goes_together_was_measured_together(tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[tuple[str, ...]] = []

    def watched(request, network, tasks, what, progress):
        measured.extend(tuple(gone) for _, gone in tasks if what.startswith("leaving"))
        return tried(request, network, tasks, what, progress)

    monkeypatch.setattr("layerwise.jobs.joint.tried", watched)
    monkeypatch.setattr("layerwise.jobs.leaving.tried", watched)
    settings = {**MENU, "knapsack": {"gone": 4}}
    request = Request(tiny("llama"), Budget(bits=2.6), "compact", data=DATA, settings=settings)
    found = make_plan(request._replace(allow=("bits", "part")))
    gone = {row["group"] for row in found.rows if row["option"] == "left out"}
    assert len(gone) == 4
    assert gone in map(set, measured)


def test_a_set_is_predicted_as_it_was_measured() -> None:
    damage = Damage({unit: (0.0, 1.0) for unit in "abcd"}, {}, {("a", "b"): 0.25})
    for gone, kl in (("abc", 4.5), ("abd", 3.5)):
        damage = as_measured(damage, gone, kl)
        menus = {unit: Menu(unit, (KEPT, GONE)) for unit in "abcd"}
        choice = {unit: int(unit in gone) for unit in "abcd"}
        assert total(damage, menus, choice) == pytest.approx(kl)


def test_the_command_says_what_was_weighed(tiny, tmp_path: Path) -> None:
    words = f"plan {tiny('llama')} --bits 3 --allow bits,layer --samples 2 --length 32 --json"
    given = [*words.split(), "--set", "menu.group=[32]", "--out", str(tmp_path / "p.yaml")]
    found = CliRunner().invoke(app, given)
    assert found.exit_code == 0, found.output
    answer = json.loads(found.stdout)
    assert {"layers left out", "expected", "chosen"} <= answer["more"]["edge"][0].keys()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--bits 3 --allow layer", "found layer"),
        ("--bits 3 --allow bits,colour", "found colour"),
        ("--bits 3 --allow bits,part", "--target compact"),
        ("--depth 3 --allow bits,layer", "--depth"),
        ("--bits 3 --allow bits,layer --allocator uniform", "knapsack"),
    ],
)
def test_what_cannot_be_weighed_is_refused(tiny, tmp_path: Path, words: str, said: str) -> None:
    given = f"plan {tiny('llama')} {words} --out {tmp_path / 'p.yaml'}"
    found = CliRunner().invoke(app, given.split())
    assert found.exit_code == 2
    assert said in " ".join(found.stderr.split())


def test_solving_gains_over_rounding(tiny) -> None:
    chains = {name: (Step(name, {"bits": 2, "group": 32}),) for name in ("gptq", "rtn")}
    request = Request(tiny("llama"), Budget(bits=3), data=DATA)
    found = solver_gain(request, open_network(tiny("llama")), chains)
    assert found["gptq"] < 0.9
    assert found["rtn"] == pytest.approx(1.0, abs=0.1)
    assert solver_gain(request, open_network(tiny("llama")), {"rtn": chains["rtn"]}) == {"rtn": 1.0}
