"""Plans of orders, from the file to the folder and back: written out, or every layer once."""

from collections.abc import Callable
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
from layerwise.core.plan import DataSpec, Edit, Identity, Plan, Step
from layerwise.jobs.apply import apply_plan
from layerwise.jobs.verify import Settings, verify

BATCH = {"input_ids": torch.arange(3, 27).reshape(2, 12)}
LOOPED = [0, 1, 1, {"layer": 2, "parts": ["mlp"]}, {"layer": 1, "parts": ["attention"]}, 2]
TOGETHER = [0, {"parallel": [1, {"layer": 2, "parts": ["mlp"]}]}, 2]


def plan_for(model: Path, order: list[Any], target: str, **fields: Any) -> Plan:
    held = Checkpoint(model)
    return Plan(
        Identity(held.structure, held.weights),
        target=target,  # type: ignore[arg-type]
        wiring={"decoder": order},
        data=DataSpec(samples=1, length=16),
        **fields,
    )


def logits(model: Path, **how: Any) -> torch.Tensor:
    return layerwise.open(model, **how).load().run(BATCH).logits


@pytest.mark.parametrize("kind", ["llama", "mixtral", "gpt2", "opt", "neox"])
def test_stock_code_computes_an_order_that_is_written_out(tiny, tmp_path: Path, kind: str) -> None:
    model = tiny(kind)
    apply_plan(model, plan_for(model, LOOPED, "hf"), tmp_path / "out")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        got = stock(**BATCH).logits
    wanted = logits(model, wiring={"decoder": LOOPED})
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("order", [LOOPED, TOGETHER, [2, 0, 0]])
def test_a_compact_folder_runs_in_its_order(
    tiny: Callable[..., Path], tmp_path: Path, kind: str, order: list[Any]
) -> None:
    model, out = tiny(kind), tmp_path / "out"
    applied = apply_plan(model, plan_for(model, order, "compact"), out)
    assert torch.equal(logits(out), logits(model, wiring={"decoder": order}))
    kept = 2 if order == [2, 0, 0] else 3
    stock = AutoModelForCausalLM.from_pretrained(out)
    assert len(list(layerwise.open(stock, inputs=BATCH).stack.layers)) == kept
    assert applied.nbytes == Checkpoint(out).nbytes <= Checkpoint(model).nbytes


def test_a_compact_folder_is_verified(tiny, tmp_path: Path) -> None:
    model, out = tiny("llama"), tmp_path / "out"
    apply_plan(model, plan_for(model, [0, 1, 1, 2, 3], "compact"), out)
    found = verify(model, out, Settings(documents=2, length=32, speed=False, memory=False))
    names = [check["name"] for check in found.checks]
    assert names[0] == "layerwise gives the logits of the model that was written"
    assert all(check["ok"] for check in found.checks), found.checks
    assert found.rows[0]["bytes"] == found.rows[1]["bytes"]
    assert "nothing to compare with" in found.warnings[-1]


def test_a_compact_folder_can_be_written_out(tiny, tmp_path: Path) -> None:
    model, compact, out = tiny("llama"), tmp_path / "compact", tmp_path / "out"
    apply_plan(model, plan_for(model, [0, 1, 1, 2], "compact"), compact)
    held = Checkpoint(compact)
    plan = Plan(Identity(held.structure, held.weights), data=DataSpec(samples=1, length=16))
    apply_plan(compact, plan, out)
    assert torch.equal(logits(out), logits(compact))
    assert not (out / "wiring.yaml").exists()


def test_one_clear_error(tiny, tmp_path: Path) -> None:
    model = tiny("llama")
    with pytest.raises(LayerwiseError, match=r"layers in parallel.*use target compact"):
        apply_plan(model, plan_for(model, TOGETHER, "hf"), tmp_path / "out")
    with pytest.raises(LayerwiseError, match=r"a part left out.*use target compact"):
        apply_plan(model, plan_for(model, LOOPED, "compressed-tensors"), tmp_path / "out")
    edits = (Edit("*", (Step("rtn", {"bits": 4}),)),)
    with pytest.raises(LayerwiseError, match="an edit of weights"):
        apply_plan(model, plan_for(model, LOOPED, "compact", edits=edits), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["decoder: 1", "[1, 2]", "{", "decoder: [99]"])
def test_a_broken_order_in_a_folder(tiny, tmp_path: Path, text: str) -> None:
    model, out = tiny("llama"), tmp_path / "out"
    apply_plan(model, plan_for(model, [0, 1, 1], "compact"), out)
    (out / "wiring.yaml").write_text(text)
    with pytest.raises(LayerwiseError, match="wiring"):
        layerwise.open(out)


def run(*words: str) -> str:
    found = CliRunner().invoke(app, ["run", *words])
    assert found.exit_code == 0, found.output
    return found.output


def test_the_command_writes(tiny, tmp_path: Path) -> None:
    model = str(tiny("llama"))
    plain = run(model, "def total(", "--max-tokens", "8")
    assert "8 tokens in" in plain
    drafted = run(model, "def total(", "--max-tokens", "8", "--speculate", "exit=2,length=3")
    assert drafted.splitlines()[:-1] == plain.splitlines()[:-1]
    assert "proposed tokens stayed" in drafted
    (tmp_path / "prompts").write_text("def total(\nreturn start\n")
    both = run(model, "--batch", str(tmp_path / "prompts"), "--max-tokens", "4", "--json")
    assert both.count('"tokens": 4') == 2
    looped = run(model, "def total(", "--max-tokens", "8", "--wiring", "0-2,2*2,3/mlp")
    assert looped.splitlines()[0] != plain.splitlines()[0]
    drawn = ["--temperature", "0.9", "--top-k", "20", "--seed", "3", "--max-tokens", "8"]
    once, again = (run(model, "def total(", *drawn).splitlines()[:-1] for _ in range(2))
    assert once == again


def test_an_order_is_saved_and_run(tiny, tmp_path: Path) -> None:
    model, plan = str(tiny("llama")), str(tmp_path / "plan.yaml")
    words = ["total(", "--max-tokens", "6"]
    typed = run(model, *words, "--wiring", "0-2,2+3", "--save", plan)
    assert run(model, *words, "--plan", plan).splitlines()[:-1] == typed.splitlines()[:-1]
    assert layerwise.read_plan(Path(plan)).target == "compact"
    other = CliRunner().invoke(app, ["run", str(tiny("gpt2")), *words, "--plan", plan])
    assert other.exit_code == 2
    assert "plan, model structure" in other.output


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ([], "found neither"),
        (["a", "--wiring", "0,9"], "found 9"),
        (["a", "--wiring", "coder=0,1"], "allowed is decoder"),
        (["a", "--speculate", "exit=9"], "1 to 3 of 4 layers"),
        (["a", "--speculate", "exit=2,length=x"], "allowed is auto, exit=6,length=4"),
        (["a", "--speculate", "skip=0"], "steps 1 to 3"),
        (["a", "--speculate", "exit=1+2"], "allowed is auto"),
        (["a", "--speculate", "exit=1,length=0"], "allowed is auto"),
        (["a", "--max-tokens", "0"], "--max-tokens"),
        (["a", "--batch", "b"], "found both"),
    ],
)
def test_one_clear_line(tiny, words: list[str], found: str) -> None:
    result = CliRunner().invoke(app, ["run", str(tiny("llama")), *words])
    assert result.exit_code == 2
    assert found in result.output


def test_a_sweep_and_the_best_of_it(tiny) -> None:
    model = str(tiny("llama"))
    options = ["--documents", "2", "--max-tokens", "8"]
    found = run(model, "--sweep", *options, "--json")
    assert '"same": true' in found
    assert '"same": false' not in found
    assert '"speed_predicted"' in found
    best = run(model, "a", "--speculate", "auto", *options)
    assert "plain decoding is faster here" in best or "predicted" in best
