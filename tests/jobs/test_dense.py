"""Layers and widths under one size, from the command line to a healed folder."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from asked import SMALL, run
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from layerwise.cli import app
from layerwise.core.checkpoint import Checkpoint
from layerwise.core.plan import read_plan
from layerwise.core.width import Cut, Place, Width
from layerwise.jobs.narrow import levels

pytestmark = pytest.mark.usefixtures("few_plans")


def test_the_planned_bytes_are_written_and_compared(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    model, out = tiny("llama"), tmp_path / "out"
    words = f"compress {model} --size 75% --allow width,layer {SMALL} --heal 2 --documents 2"
    found = run(f"{words} --set heal.samples=4 --set heal.length=32 --out {out}")
    plan = read_plan(out / "plan.yaml")
    assert plan.widths or plan.wiring
    edge = found["more"]["edge"]
    least = min(row["expected"] for row in edge)
    assert [row["expected"] for row in edge if row["chosen"]] == [least]
    assert all(row["bytes"] <= 0.75 * Checkpoint(model).nbytes for row in edge)
    assert Checkpoint(out).nbytes <= 0.75 * Checkpoint(model).nbytes
    assert found["more"]["bytes"] == Checkpoint(out).nbytes
    naive = found["rows"][-1]
    assert naive["name"] == "naive" and "healed equally" in naive["what"]
    AutoModelForCausalLM.from_pretrained(out)


@pytest.mark.parametrize(
    ("units", "block", "step"), [(96, 1, 8), (100, 1, 4), (99, 1, 1), (4, 64, 1), (4096, 1, 64)]
)
def test_rows_stay_aligned(units: int, block: int, step: int) -> None:
    width = Width({"n": units}, units, (Place(("decoder/0",), {"w": Cut(-1, (block,))}, "w"),))
    assert levels(width) == [units, *range((units - 1) // step * step, 0, -step)]


def test_pinned_parts_keep_their_width(tiny: Callable[..., Path], tmp_path: Path) -> None:
    words = f"plan {tiny('llama')} --size 90% --allow width {SMALL} --keep */*/mlp.*"
    run(f"{words} --out {tmp_path / 'p.yaml'}")
    assert set(read_plan(tmp_path / "p.yaml").widths) == {
        "num_attention_heads",
        "num_key_value_heads",
    }


@pytest.mark.parametrize("unit", ["flops 60%", "speed 1.05x"])
def test_budgets_of_products_and_of_time(
    unit: str, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    words = f"plan {tiny('llama')} --{unit} {SMALL} --out {tmp_path / 'p.yaml'}"
    found = CliRunner().invoke(app, words.split())
    if found.exit_code == 2:  # a busy machine may not show what half a layer saves
        assert "--speed" in found.stderr
        return
    taken = next(r for r in json.loads(found.stdout)["more"]["edge"] if r["chosen"])
    assert read_plan(tmp_path / "p.yaml").budget.keys() == {unit.split()[0]}
    assert (taken["speed"] or 9) >= 0.97 * 1.05


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--size 1% --allow width,layer", "at least --bytes"),
        ("--bits 3 --allow width", "--size, --bytes"),
        ("--size 50% --allow width --target gguf", "--target hf"),
        ("--size 50% --allow bits,width", "width, expert and layer"),
        ("--flops 50% --allow bits", "--allow width,layer"),
        ("--speed 0.5x", "more than 1x"),
        ("--size 50% --allow bits,rank", "--target compact"),
    ],
)
def test_what_cannot_be_is_refused(
    words: str, said: str, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    given = f"plan {tiny('llama')} {words} --samples 2 --length 32 --out {tmp_path / 'p.yaml'}"
    found = CliRunner().invoke(app, given.split())
    assert found.exit_code == 2
    assert said in " ".join(found.stderr.split())
