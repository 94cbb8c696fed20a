"""The main job from Python: the options and the bytes of the command line."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers.utils import logging
from typer.testing import CliRunner

import layerwise
from layerwise.cli import app
from layerwise.core.errors import LayerwiseError

SMALL = {"samples": 4, "length": 64, "score": "lim"}
QUICK = {"documents": 3, "length": 64, "speed": False, "memory": False}


def test_the_same_plan_and_the_same_bytes(tiny: Callable[..., Path], tmp_path: Path) -> None:
    model = tiny("llama", "float32")
    planned = layerwise.make_plan(model, size=0.5, **SMALL, set=["gptq.group=32"], keep="*/0/*")
    words = "--size 50% --samples 4 --length 64 --score lim --set gptq.group=32 --keep */0/*"
    file = tmp_path / "plan.yaml"
    found = CliRunner().invoke(app, ["plan", str(model), *words.split(), "--out", str(file)])
    assert found.exit_code == 0, found.output
    assert layerwise.read_plan(str(file)) == planned.plan
    folders = [
        layerwise.apply_plan(model, plan, tmp_path / name).folder
        for plan, name in ((planned, "one"), (planned.plan, "two"), (str(file), "three"))
    ]
    written = {(folder / "model.safetensors").read_bytes() for folder in folders}
    assert len(written) == 1
    assert (folders[0] / "README.md").exists()
    verified = layerwise.verify(model, str(folders[0]), **QUICK)
    assert all(check["ok"] for check in verified.checks)
    assert [row["name"] for row in verified.rows] == ["original", "plan", "naive"]


def test_a_plan_that_is_to_be_healed(tiny: Callable[..., Path]) -> None:
    planned = layerwise.make_plan(
        tiny("llama", "float32"), depth=3, heal=5, **SMALL | {"score": ""}
    )
    assert planned.plan.heal is not None and planned.plan.heal.steps == 5


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"bitz": 3}, "--bits"),
        ({"bits": "many"}, "valid number"),
        ({"bits": 3, "samples": 0}, "greater than or equal to 1"),
        ({}, "--size"),
        ({"bits": 3, "method": "gtpq"}, "gptq"),
        ({"bits": 3, "heal": 5}, "heal"),
    ],
)
def test_wrong_options(tiny: Callable[..., Path], options: dict, said: str) -> None:
    with pytest.raises(LayerwiseError, match=said):
        layerwise.make_plan(tiny("llama", "float32"), **options)


def test_bars_are_left_as_they_are(tiny: Callable[..., Path]) -> None:
    shown = logging.is_progress_bar_enabled()
    layerwise.make_plan(tiny("llama", "float32"), bits=4, method="rtn", **SMALL)
    assert logging.is_progress_bar_enabled() == shown


def test_methods_are_known_in_a_fresh_process() -> None:
    code = "import layerwise; assert layerwise.find('gptq') in layerwise.methods('weight')"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(LayerwiseError, match="did you mean weight"):
        layerwise.methods("weigth")


def test_what_a_network_says_of_itself() -> None:
    network = layerwise.open("demo", dtype=torch.float32)
    assert repr(network).startswith("<Network LlamaForCausalLM of ")
    assert repr(network).endswith("decoder of 12 layers; causal, float32 on cpu>")
    with pytest.raises(LayerwiseError, match="inputs="):
        layerwise.open(torch.nn.Linear(3, 3))
