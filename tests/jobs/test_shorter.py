"""Plans that leave parts out or merge layers, from the command line to the folder."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import layerwise
from layerwise.cli import app
from layerwise.core.checkpoint import Checkpoint
from layerwise.core.errors import LayerwiseError
from layerwise.core.plan import DataSpec, Identity, Plan
from layerwise.core.stack import Visit, plain_wiring
from layerwise.jobs.apply import apply_plan
from layerwise.jobs.depth import similarity_to
from layerwise.jobs.request import Request
from layerwise.jobs.session import Budget
from layerwise.jobs.units import able_to_go, left_out, units_of, wiring_without
from layerwise.jobs.verify import Settings, verify

BATCH = {"input_ids": torch.arange(3, 27).reshape(2, 12)}
MERGED = [0, {"layer": 1, "mix": {1: -1, 2: 1, 3: 1}}]
FEW = ["--samples", "2", "--length", "16"]


def run(*words: str, status: int = 0) -> str:
    found = CliRunner().invoke(app, list(words))
    assert found.exit_code == status, found.output
    return found.output


def plan_for(model: Path, order: list[Any], target: str = "hf") -> Plan:
    held = Checkpoint(model)
    wiring, data = {"decoder": order}, DataSpec(samples=1, length=16)
    identity = Identity(held.structure, held.weights)
    return Plan(identity, target=target, wiring=wiring, data=data)  # type: ignore[arg-type]


def logits(model: Path, **how: Any) -> torch.Tensor:
    return layerwise.open(model, **how).load().run(BATCH).logits


def by_hand(model: Path) -> torch.Tensor:
    """Stock code with the second layer replaced by the sum, the others gone."""
    stock = AutoModelForCausalLM.from_pretrained(model).eval()
    layers = stock.model.layers
    with torch.no_grad():
        for own, two, three in zip(*(layers[i].parameters() for i in (1, 2, 3)), strict=True):
            own.copy_(own + (two - own) + (three - own))
        del layers[2:]
        return stock(**BATCH, use_cache=False).logits


@pytest.mark.parametrize("target", ["hf", "compact"])
def test_merged_layers_are_the_sums_that_the_plan_says(tiny, tmp_path: Path, target: str) -> None:
    model, out = tiny("llama"), tmp_path / "out"
    applied = apply_plan(model, plan_for(model, MERGED, target), out)
    torch.testing.assert_close(logits(out), by_hand(model), rtol=1e-5, atol=1e-5)
    again = apply_plan(model, layerwise.read_plan(out / "plan.yaml"), tmp_path / "again")
    assert Checkpoint(again.folder).weights == Checkpoint(out).weights
    assert applied.nbytes < Checkpoint(model).nbytes


def test_visits_of_one_merge_share_and_of_two_do_not(tiny, tmp_path: Path) -> None:
    model, out = tiny("llama"), tmp_path / "out"
    mean = {"layer": 1, "mix": {1: 0.5, 2: 0.5}}
    apply_plan(model, plan_for(model, [0, mean, mean, 1, 3], "compact"), out)
    assert torch.equal(logits(out), logits(model, wiring={"decoder": [0, mean, mean, 1, 3]}))
    layers = layerwise.open(model, wiring={"decoder": [mean, mean, 1]}).load().layers()
    first = [next(iter(layer.module.parameters())) for layer in layers]
    assert first[0] is first[1]
    assert first[0] is not first[2]


@pytest.mark.parametrize(
    "mix", [{}, {9: 1.0}, {0: "a"}, {0: float("nan")}, [0, 1], {"0": 1.0}, {0: True}], ids=str
)
def test_a_mix_that_is_none(tiny, mix: Any) -> None:
    with pytest.raises(LayerwiseError, match=r"allowed is layer numbers from 0 to 3.*mix"):
        layerwise.open(tiny("llama"), wiring={"decoder": [0, {"layer": 1, "mix": mix}]})


def test_a_plan_that_merges(tiny, tmp_path: Path) -> None:
    model, plan, out = str(tiny("llama")), str(tmp_path / "plan.yaml"), tmp_path / "out"
    words = ["--depth", "2", "--score", "laco", "--set", "laco.width=2", "--out", plan, *FEW]
    assert "merged into decoder/" in run("plan", model, *words)
    run("apply", model, plan, "--out", str(out))
    found = verify(Path(model), out, Settings(documents=2, length=32, speed=False, memory=False))
    assert all(check["ok"] for check in found.checks), found.checks
    assert found.rows[-1]["what"].startswith("best naive: ")
    assert "merged from others" in found.rows[1]["what"]


def test_an_order_is_compared_with_what_the_stack_returns_as_it_is(tiny) -> None:
    model = tiny("llama")
    network = layerwise.open(model)
    request = Request(model, Budget(depth=2), data=DataSpec(samples=2, length=16))
    similarity = similarity_to(request, network, lambda: None)
    assert similarity(plain_wiring(4)) == pytest.approx(1.0)
    assert -1 < similarity((Visit(0), Visit(1))) < 0.99


@pytest.mark.parametrize("parts", ["attention", "mlp", "attention+mlp"])
def test_a_plan_that_leaves_parts_out(tiny, tmp_path: Path, parts: str) -> None:
    model, plan = str(tiny("llama")), str(tmp_path / "plan.yaml")
    words = ["--depth", "50%", "--parts", parts, "--out", plan, "--json", *FEW]
    rows = json.loads(run("plan", model, *words))["rows"]
    assert len(rows) == (8 if "+" in parts else 4)
    gone = [row["part"] for row in rows if row["option"] == "dropped"]
    worst = max(row["importance"] for row in rows if row["part"] in gone)
    assert worst <= min(row["importance"] for row in rows if row["part"] not in gone)
    network, read = layerwise.open(model), layerwise.read_plan(Path(plan))
    fewer = left_out(network, read)
    assert fewer is not None
    assert (fewer[0], set(fewer[1])) == (gone, {key.rpartition("/")[2] for key in gone})
    for target in ("hf", "compact"):
        out = tmp_path / target
        apply_plan(model, layerwise.Plan(**{**_fields(read), "target": target}), out)
        wanted = logits(Path(model), wiring=read.wiring)
        torch.testing.assert_close(logits(out), wanted, rtol=1e-4, atol=1e-5)


def _fields(plan: Plan) -> dict[str, Any]:
    return {name: getattr(plan, name) for name in plan.__struct_fields__}


def test_parts_are_searched_and_compared_with_parts(tiny, tmp_path: Path) -> None:
    model, plan, out = tiny("llama"), str(tmp_path / "plan.yaml"), tmp_path / "out"
    words = ["--depth", "3", "--parts", "mlp", "--score", "greedy", "--out", plan, *FEW]
    run("plan", str(model), *words)
    apply_plan(model, layerwise.read_plan(Path(plan)), out)
    found = verify(model, out, Settings(documents=2, length=32, speed=False, memory=False))
    assert all(check["ok"] for check in found.checks), found.checks
    assert " 1 mlp" in found.rows[-1]["what"]


def test_what_may_go(tiny) -> None:
    network = layerwise.open(tiny("llama"))
    assert units_of(network, ["mlp"])[:2] == ["decoder/0/mlp", "decoder/1/mlp"]
    open_ = able_to_go(network, ["decoder/0/mlp"], ["attention", "mlp"])
    assert "decoder/0/mlp" not in open_
    assert "decoder/0/attention" in open_
    assert wiring_without(network, []) == {}
    both = ["decoder/0/attention", "decoder/0/mlp", "decoder/1/mlp"]
    kept = [{"layer": 1, "parts": ["attention"]}, 2, 3]
    assert wiring_without(network, both) == {"decoder": kept}


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["--depth", "2", "--parts", "mixer"], "allowed is attention, mlp"),
        (["--depth", "9", "--parts", "mlp"], "1 to 4 parts"),
        (["--depth", "2", "--parts", "mlp", "--score", "shortgpt"], "part_influence or greedy"),
        (["--depth", "2", "--score", "llm_drop"], "say which parts may go"),
        (["--size", "50%", "--parts", "mlp", "--target", "hf"], "a budget by --depth"),
        (["--bits", "4", "--parts", "mlp"], "one by bits"),
        (["--depth", "2", "--score", "recur"], "one that is told which"),
        (["--depth", "2", "--score", "laco", "--keep", "decoder/0"], "no --keep"),
    ],
)
def test_one_clear_line(tiny, words: list[str], found: str) -> None:
    assert found in " ".join(run("plan", str(tiny("llama")), *words, *FEW, status=2).split())
