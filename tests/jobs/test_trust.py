"""Pickled weights and code of a model's own: used where the user takes the risk, and only there."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from layerwise.cli import app
from layerwise.core.checkpoint import Checkpoint
from layerwise.core.errors import LayerwiseError
from layerwise.core.open import open_network
from layerwise.core.plan import Edit, Identity, Plan, Step
from layerwise.core.trust import trust
from layerwise.jobs.apply import apply_plan

OWN = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture(autouse=True)
def caution(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LAYERWISE_TRUST", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))


@pytest.fixture
def model(tiny: Callable[..., Path], tmp_path: Path) -> Path:
    import shutil

    return Path(shutil.copytree(tiny("llama"), tmp_path / "model"))


def test_pickled_weights_are_rewritten_once(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    before = open_network(model).load().module.state_dict()
    (model / "model.safetensors").unlink()
    torch.save(tensors, model / "pytorch_model.bin")
    with pytest.raises(LayerwiseError, match="--trust pickles"):
        open_network(model)
    trust(["pickles"])
    after = open_network(model).load().module.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_pickle_that_runs_something_is_refused_all_the_same(model: Path, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple:
            return Path.touch, (tmp_path / "ran",)

    (model / "model.safetensors").unlink()
    torch.save({"a": Evil()}, model / "pytorch_model.bin")
    trust(["pickles"])
    with pytest.raises(LayerwiseError, match="pickled weights"):
        open_network(model)
    assert not (tmp_path / "ran").exists()


def test_code_of_a_model_is_run_where_it_is_trusted(model: Path, tmp_path: Path) -> None:
    expected = open_network(model).load().module
    config = json.loads((model / "config.json").read_text())
    config |= {
        "model_type": "own",
        "architectures": ["OwnModel"],
        "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"},
    }
    (model / "config.json").write_text(json.dumps(config))
    (model / "own.py").write_text(OWN)
    with pytest.raises(LayerwiseError, match="--trust code"):
        open_network(model)
    trust(["code"])
    network = open_network(model)
    assert type(network.module).__name__ == "OwnModel" and len(network.layers()) == 4
    ids = torch.arange(8)[None]
    with torch.no_grad():
        got = network.load().module(input_ids=ids).logits
        assert torch.equal(got, expected(input_ids=ids).logits)
    held = Checkpoint(model)
    edits = (Edit("*", (Step("rtn", {"bits": 8, "group": 32}),)),)
    plan = Plan(model=Identity(held.structure, held.weights), edits=edits)
    applied = apply_plan(model, plan, tmp_path / "out")
    assert (tmp_path / "out" / "own.py").exists() and not applied.warnings


def test_an_unknown_risk_is_one_line() -> None:
    found = CliRunner().invoke(app, ["--trust", "pickle", "methods"])
    assert found.exit_code == 2 and "did you mean pickles?" in found.output
