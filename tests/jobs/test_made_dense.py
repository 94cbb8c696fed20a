"""Adapters and quantized checkpoints are made dense once, bit for bit as their own libraries do."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

from layerwise.cli import app
from layerwise.core import folder as folders
from layerwise.core.checkpoint import Checkpoint
from layerwise.core.errors import LayerwiseError, notice
from layerwise.core.folder import find_folder
from layerwise.core.open import open_network
from layerwise.core.plan import DataSpec, Edit, Identity, Plan, Step
from layerwise.jobs.apply import apply_plan

PEFT: Any = pytest.importorskip("peft")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    notice.cache_clear()
    return tmp_path / "cache" / "layerwise" / "models"


@pytest.fixture
def base(tiny: Callable[..., Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny("llama", "bfloat16"), tmp_path / "base"))


def adapter_of(base: Path, out: Path, **options: Any) -> Path:
    """A LoRA adapter with random weights."""
    from transformers import AutoModelForCausalLM

    settings = {"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"]} | options
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    wrapped = PEFT.get_peft_model(model, PEFT.LoraConfig(**settings))
    torch.manual_seed(0)
    with torch.no_grad():
        for name, p in wrapped.named_parameters():
            if "lora_" in name:
                p.copy_(torch.randn_like(p) * 0.2)
    wrapped.save_pretrained(out)
    return out


def merged_by_peft(base: Path, adapter: Path) -> dict[str, Tensor]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    return PEFT.PeftModel.from_pretrained(model, adapter).merge_and_unload().state_dict()


def tensors_of(folder: Path) -> dict[str, Tensor]:
    held = Checkpoint(folder)
    return held.read(held.tensors)


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"modules_to_save": ["norm"]}])
def test_merged_as_peft_merges(options: dict[str, Any], base: Path, tmp_path: Path) -> None:
    adapter = adapter_of(base, tmp_path / "adapter", **options)
    found, wanted = tensors_of(find_folder(adapter)), merged_by_peft(base, adapter)
    before = load_file(base / "model.safetensors")
    assert found.keys() == before.keys()
    assert all(t.equal(wanted[name]) and t.dtype == wanted[name].dtype for name, t in found.items())
    changed = [name for name in found if not found[name].equal(before[name])]
    assert changed and all("q_proj" in n or "v_proj" in n or "down_proj" in n for n in changed)


def test_every_command_takes_an_adapter(base: Path, tmp_path: Path) -> None:
    adapter = adapter_of(base, tmp_path / "adapter")
    data = tmp_path / "rows.jsonl"
    rows = ({"text": f"{i} links of a chain of {i * i} layers of a network"} for i in range(60))
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    quick = ("--data", str(data), "--length", "32")
    out, plan = tmp_path / "small", tmp_path / "plan.yaml"
    few = ("--samples", "4", "--method", "rtn", "--allocator", "uniform")
    for words in (
        ("inspect", str(adapter), *quick),
        ("plan", str(adapter), "--bits", "5", "--out", str(plan), *quick, *few),
        ("apply", str(adapter), str(plan), "--out", str(out)),
        ("verify", str(adapter), str(out), *quick, "--no-naive", "--no-speed", "--no-memory"),
        ("inspect", str(out), *quick),
    ):
        answer = CliRunner().invoke(app, list(words))
        assert answer.exit_code == 0, (words, answer.output, answer.exception)
    assert (out / "tokenizer.json").is_file()


def test_made_once_and_anew_when_something_changed(
    base: Path, tmp_path: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    adapter = adapter_of(base, tmp_path / "adapter")
    first = find_folder(adapter)
    assert first.parent == cache
    stamp = (first / "model.safetensors").stat().st_mtime_ns
    assert find_folder(adapter) == first
    assert (first / "model.safetensors").stat().st_mtime_ns == stamp
    told = [r.getMessage() for r in caplog.records if r.name == "layerwise"]
    assert len(told) == 1 and "LORA adapter" in told[0] and str(first) in told[0]
    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    assert find_folder(adapter) != first
    assert not list(cache.glob(".part-*"))


def test_whole_or_not_at_all(
    base: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = adapter_of(base, tmp_path / "adapter")

    def dies(folder: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(folders, "Checkpoint", dies)
    with pytest.raises(KeyboardInterrupt):
        find_folder(adapter)
    assert not list(cache.iterdir())


def spoiled(adapter: Path, **fields: Any) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_bad_adapters(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = adapter_of(base, tmp_path / "adapter")
    spoiled(adapter, base_model_name_or_path=str(tmp_path / "gone"))
    with pytest.raises(LayerwiseError, match=r"base_model_name_or_path.*gone.*no such folder"):
        find_folder(adapter)
    spoiled(adapter, base_model_name_or_path=None)
    with pytest.raises(LayerwiseError, match=r"base_model_name_or_path"):
        find_folder(adapter)
    spoiled(adapter, base_model_name_or_path=str(base), target_modules=["nothing"])
    with pytest.raises(LayerwiseError, match=r"adapter .*nothing"):
        find_folder(adapter)
    spoiled(adapter, peft_type="NOPE")
    with pytest.raises(LayerwiseError, match=r"adapter .*NOPE"):
        find_folder(adapter)
    spoiled(adapter, peft_type="LORA", target_modules=["q_proj", "v_proj", "down_proj"])
    weights = load_file(adapter / "adapter_model.safetensors")
    weights.pop(next(name for name in weights if "lora_A" in name))
    save_file(weights, adapter / "adapter_model.safetensors")
    with pytest.raises(LayerwiseError, match=r"adapter .*missing adapter keys"):
        find_folder(adapter)
    (adapter / "adapter_model.safetensors").write_bytes(b"short")
    with pytest.raises(LayerwiseError, match=r"adapter_model.safetensors.*header"):
        find_folder(adapter)
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(LayerwiseError, match=r"adapter_model.safetensors beside"):
        find_folder(adapter)


def test_without_peft(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = adapter_of(base, tmp_path / "adapter")

    def missing(name: str) -> str:
        raise ModuleNotFoundError(f"No package metadata was found for {name}")

    monkeypatch.setattr("layerwise.core.dense.version", missing)
    with pytest.raises(LayerwiseError, match="pip install peft"):
        find_folder(adapter)


def plan_for(model: Path, target: Any) -> Plan:
    """Three bits here, five there, a layer as it is."""
    held = Checkpoint(model)
    edits = (
        Edit("*/0-1/*", (Step("rtn", {"bits": 3, "group": 32}),)),
        Edit("*/2/*", (Step("rtn", {"bits": 5, "group": 0}),)),
    )
    identity = Identity(held.structure, held.weights)
    return Plan(identity, target=target, data=DataSpec(samples=1), edits=edits)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_we_packed_opens_again(
    dtype: str, tiny: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny("llama", dtype)
    for target in ("hf", "compressed-tensors"):
        apply_plan(model, plan_for(model, target), tmp_path / target)
    packed, dense = tmp_path / "compressed-tensors", tensors_of(tmp_path / "hf")
    assert "model.layers.0.mlp.down_proj.weight_packed" in Checkpoint(packed).tensors
    found = tensors_of(open_network(packed).checkpoint.folder)
    assert found.keys() == dense.keys()
    for name, tensor in found.items():
        assert tensor.dtype == dense[name].dtype
        assert torch.allclose(tensor.float(), dense[name].float(), rtol=1e-2, atol=1e-6), name
    assert sum(t.equal(dense[n]) for n, t in found.items()) > 0.9 * len(found)
    assert any("quantized with compressed-tensors" in r.getMessage() for r in caplog.records)
    apply_plan(packed, plan_for(find_folder(packed), "hf"), tmp_path / "twice")


def test_eight_bit_floats_in_blocks(tiny: Callable[..., Path], tmp_path: Path) -> None:
    """A DeepSeek-like fp8 checkpoint: a scale for every 32 x 32 block."""
    model = Path(shutil.copytree(tiny("llama", "bfloat16"), tmp_path / "model"))
    tensors, wanted = {}, {}
    for name, tensor in load_file(model / "model.safetensors").items():
        tensors[name] = wanted[name] = tensor
        if "_proj" in name:
            rows, columns = tensor.shape[0] // 32, tensor.shape[1] // 32
            scale = torch.rand(rows, columns) + 0.5
            tensors[name] = tensor.to(torch.float8_e4m3fn)
            tensors[f"{name}_scale_inv"] = scale
            spread = scale.repeat_interleave(32, 0).repeat_interleave(32, 1)
            wanted[name] = (tensors[name].float() * spread).bfloat16()
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((model / "config.json").read_text())
    quantized = {"quant_method": "fp8", "weight_block_size": [32, 32]}
    (model / "config.json").write_text(json.dumps(config | {"quantization_config": quantized}))
    found = tensors_of(find_folder(model))
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():
        assert torch.allclose(tensor.float(), wanted[name].float(), rtol=1e-2), name


def test_broken_quantized_weights(tiny: Callable[..., Path], tmp_path: Path) -> None:
    apply_plan(tiny("llama"), plan_for(tiny("llama"), "compressed-tensors"), tmp_path / "packed")
    path = tmp_path / "packed" / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.0.mlp.down_proj.weight_packed"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(LayerwiseError, match="compressed-tensors"):
        find_folder(tmp_path / "packed")
