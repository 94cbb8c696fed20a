"""The example models of other tasks: made, trained for a moment, and taken by every command."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from layerwise.cli import app

SCRIPT = Path(__file__).parents[2] / "examples" / "tasks" / "train.py"
BITS = ("--bits", "5", "--method", "rtn", "--allocator", "uniform")
#: task -> budget, and a loss that a few steps get below
TASKS = {
    "masked": (BITS, 5.7),
    "seq2seq": (("--depth", "5", "--target", "hf", "--score", "shortgpt"), 5.6),
    "image": (BITS, 2.4),
}


def example() -> Any:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("example_tasks", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("task", TASKS)
def test_every_command(task: str, tmp_path: Path) -> None:
    if task == "image":
        pytest.importorskip("sklearn")
    (budget, below), script, model = TASKS[task], example(), tmp_path / task / "model"
    model.mkdir(parents=True)
    torch.manual_seed(0)
    make, _, rate = script.TASKS[task]
    data, length = make(model)
    assert script.train(model, data, length, 15, rate, samples=64) < below
    out, plan, quick = tmp_path / "out", tmp_path / "plan.yaml", ("--length", str(length))
    read = ("--data", str(data), *quick, "--samples", "8")
    for words in (
        ("inspect", str(model), *read),
        ("plan", str(model), "--out", str(plan), *read, *budget),
        ("apply", str(model), str(plan), "--out", str(out)),
        ("verify", str(model), str(out), "--no-naive", "--no-speed", "--no-memory", *quick,
         "--documents", "8"),
    ):  # fmt: skip
        answer = CliRunner().invoke(app, list(words))
        assert answer.exit_code == 0, (words, answer.output, answer.exception)
        assert "NO " not in answer.output


def test_numbers_in_words() -> None:
    in_words = example().in_words
    assert in_words(0) == "zero"
    assert in_words(412) == "four hundred twelve"
    assert in_words(70_085) == "seventy thousand eighty-five"
