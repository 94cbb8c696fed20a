"""Weights in every form that files have them come out of a plan that changes nothing as they were."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from build import Entry, build
from safetensors.torch import load_file, save_file
from torch import Tensor

from layerwise.core.checkpoint import Checkpoint
from layerwise.core.data import Texts
from layerwise.core.errors import LayerwiseError
from layerwise.core.open import open_network
from layerwise.core.plan import DataSpec, Edit, Identity, Plan, Step
from layerwise.core.shards import ShardWriter
from layerwise.jobs.apply import apply_plan
from layerwise.jobs.inspect import inspect_model


def plan_for(model: Path, **fields: Any) -> Plan:
    held = Checkpoint(model)
    return Plan(Identity(held.structure, held.weights), **fields)


def tensors_of(folder: Path) -> dict[str, Tensor]:
    held = Checkpoint(folder)
    return held.read(held.tensors)


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    """The same names, dtypes and bits."""
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype, name
        bits = [t.reshape(-1).view(torch.uint8) for t in (tensor, other[name])]
        assert bits[0].equal(bits[1]), name


def applied(model: Path, **fields: Any) -> dict[str, Tensor]:
    out = model.with_name("out")
    apply_plan(model, plan_for(model, **fields), out)
    return tensors_of(out)


@pytest.fixture
def model(tiny: Callable[..., Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny("llama"), tmp_path / "model"))


def rewrite(model: Path, tensors: dict[str, Tensor], **fields: Any) -> None:
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    path = model / "config.json"
    kept = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({k: v for k, v in kept.items() if v is not None}))


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_every_dtype(dtype: torch.dtype, told: bool, model: Path, tiny, tmp_path: Path) -> None:
    before = {k: v.to(dtype) for k, v in load_file(model / "model.safetensors").items()}
    rewrite(model, before, dtype=str(dtype).removeprefix("torch.") if told else None)
    assert_same(applied(model), before)
    data = tmp_path / "data.txt"
    data.write_text("\n\n".join(f"{i} links of a chain" * 400 for i in range(9)))
    rows = inspect_model(model, Texts(str(data), samples=1, length=16)).rows
    assert sum(row["bytes"] for row in rows) < sum(t.nbytes for t in before.values())


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_eight_bits_are_read_as_stock_transformers_reads_them(dtype, model: Path) -> None:
    from transformers import AutoModelForCausalLM

    found = load_file(model / "model.safetensors")
    eight = {k: v.to(dtype) if v.ndim > 1 else v.bfloat16() for k, v in found.items()}
    rewrite(model, eight, dtype="bfloat16")
    stock = AutoModelForCausalLM.from_pretrained(model, dtype="auto").state_dict()
    assert_same(applied(model), {name: stock[name] for name in eight})


def test_one_weight_of_another_dtype_is_read_as_stock_transformers_reads_it(model: Path) -> None:
    from transformers import AutoModelForCausalLM

    found = load_file(model / "model.safetensors")
    mixed = {k: v.bfloat16() if v.ndim > 1 else v for k, v in found.items()}
    rewrite(model, mixed, dtype="bfloat16")
    stock = AutoModelForCausalLM.from_pretrained(model, dtype="auto").state_dict()
    assert_same(applied(model), {name: stock[name] for name in mixed})


@pytest.mark.parametrize("limit", [20_000, 200_000])
def test_shards(limit: int, model: Path) -> None:
    before = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    writer = ShardWriter(model, limit)
    for name in reversed(before):  # layers lie across shards
        writer.add({name: before[name]})
    assert len(writer.close()) > 2
    assert_same(applied(model), before)


def test_weights_without_elements(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2, "vocab_size": 64}
    model = tmp_path / "model"
    with pytest.warns(UserWarning, match="zero-element"):
        made = LlamaForCausalLM(LlamaConfig(**sizes, intermediate_size=0))
        made.save_pretrained(model)
        before = load_file(model / "model.safetensors")
        assert min(t.numel() for t in before.values()) == 0
        assert_same(applied(model), before)


@pytest.mark.parametrize(
    "entry",
    [
        Entry("masked", "albert", "AlbertForMaskedLM"),
        Entry("seq2seq", "t5", "T5ForConditionalGeneration"),
        Entry("seq2seq", "marian", "MarianMTModel"),
        Entry("causal", "gpt_neo", "GPTNeoForCausalLM"),
    ],
    ids=lambda entry: entry.model_type,
)
def test_shared_weights(entry: Entry, tmp_path: Path) -> None:
    model = tmp_path / "model"
    build(entry).save_pretrained(model)  # type: ignore[operator]
    assert_same(applied(model), load_file(model / "model.safetensors"))


def test_tied_weights_that_are_stored_twice(model: Path) -> None:
    before = load_file(model / "model.safetensors")
    embedding = before["model.embed_tokens.weight"]
    rewrite(model, before | {"lm_head.weight": embedding.clone()})
    assert_same(applied(model), before)
    rewrite(model, before | {"lm_head.weight": embedding + 1})
    with pytest.raises(LayerwiseError, match=r"lm_head.*tie_word_embeddings"):
        open_network(model)
    both = before | {"lm_head.weight": embedding + 1}
    rewrite(model, both, tie_word_embeddings=False)
    shutil.rmtree(model.with_name("out"))
    assert_same(applied(model), both)


def test_experts_that_no_token_reaches(tiny: Callable[..., Path], tmp_path: Path) -> None:
    """A router that always chooses experts 0 and 1: the others are solved without data."""
    model = Path(shutil.copytree(tiny("mixtral"), tmp_path / "model"))
    before = load_file(model / "model.safetensors")
    for name, tensor in before.items():
        if name.endswith("gate.weight"):
            tensor.zero_()  # all logits equal: the first two are taken
    rewrite(model, before)
    data = tmp_path / "rows.jsonl"
    rows = ({"text": f"{i} links of a chain of {i * i} layers"} for i in range(40))
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    edits = (Edit("*/*/mlp", (Step("gptq", {"bits": 4, "group": 32}),)),)
    spec = DataSpec(str(data), samples=4, length=16)
    plan = plan_for(model, data=spec, edits=edits)
    (warning,) = apply_plan(model, plan, model.with_name("out")).warnings
    assert warning.startswith("no data came to decoder/0/mlp.gate_up[")
    assert "and 9 more: solved without statistics" in warning
    after = tensors_of(model.with_name("out"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    experts = {name for name in before if ".experts." in name}
    assert experts and experts <= changed
    for name in experts:
        error = (after[name] - before[name]).norm() / before[name].norm()
        assert error < 0.2, name
