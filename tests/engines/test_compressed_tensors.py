"""Grids that compressed-tensors stores, beside each other, loaded by stock transformers."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from layerwise.core.checkpoint import Checkpoint
from layerwise.core.errors import LayerwiseError
from layerwise.core.open import open_network
from layerwise.core.plan import DataSpec, Edit, Identity, Plan, Step
from layerwise.export.compressed_tensors import packed_records
from layerwise.jobs.apply import apply_plan, preview
from layerwise.jobs.verify import Settings, verify

MIXED = (
    Edit("*/*/attention.q", (Step("minifloat", {"type": "mxfp8"}),)),
    Edit("*/*/attention.k", (Step("minifloat", {"type": "mxfp4"}),)),
    Edit("*/*/attention.v", (Step("minifloat"), Step("refine", {"by": "feedback"}))),
    Edit("*/*/mlp.*", (Step("gptq", {"bits": 5, "group": 32}),)),
    Edit("*/*/mlp.down", (Step("minifloat", {"type": "nvfp4"}), Step("refine"))),
)


def plan_for(model: Path, *edits: Edit) -> Plan:
    held = Checkpoint(model)
    identity = Identity(held.structure, held.weights)
    data = DataSpec(samples=8, length=64)
    return Plan(identity, target="compressed-tensors", edits=edits, data=data)


def test_integers_and_small_floats_side_by_side(tiny: Callable[..., Path], tmp_path: Path) -> None:
    model, out = tiny("llama", "bfloat16"), tmp_path / "out"
    plan = plan_for(model, *MIXED)
    planned = sum(row["bytes"] for row in preview(model, plan))
    apply_plan(model, plan, out)
    network, held = open_network(model), Checkpoint(out)
    inside = {n: t for n, t in held.tensors.items() if ".layers." in n and "norm" not in n}
    assert sum(tensor.nbytes for tensor in inside.values()) == planned
    loaded = AutoModelForCausalLM.from_pretrained(out)
    loaded(torch.arange(8)[None])  # unpacks
    for layer in network.layers():
        for key, record in packed_records(held, network, layer, plan.edits).items():
            matrix = next(m for m in layer.matrices if m.key == key)
            weight = loaded.get_submodule(layer.path).get_parameter(matrix.parameter)
            assert torch.equal(record.dense().to(torch.bfloat16), weight), key
    settings = Settings(documents=4, length=64, speed=False, memory=False)
    whole, streamed = (
        verify(model, out, settings._replace(streamed=s, naive=not s)) for s in (False, True)
    )
    assert whole.rows[1]["kl"][0] == pytest.approx(streamed.rows[1]["kl"][0], rel=1e-2)
    assert all(check["ok"] for check in whole.checks)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_the_readers_cannot_take_is_refused(
    dtype: str, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    model, step = tiny("llama", dtype), Step("minifloat", {"type": "mxfp4"})
    if dtype == "float32":
        with pytest.raises(LayerwiseError, match="in bfloat16, not"):
            apply_plan(model, plan_for(model, Edit("*/*/mlp.*", (step,))), tmp_path / "out")
    with pytest.raises(LayerwiseError, match="which this chain does not leave"):
        apply_plan(
            model, plan_for(model, Edit("*", (Step("rotate"), Step("rtn")))), tmp_path / "out"
        )


def test_a_missing_package_is_told_before_anything_is_computed(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny("llama")
    monkeypatch.setitem(sys.modules, "compressed_tensors", None)
    monkeypatch.delitem(sys.modules, "compressed_tensors.compressors", raising=False)
    with pytest.raises(LayerwiseError, match=r"pip install .layerwise\[compressed-tensors\]"):
        apply_plan(model, plan_for(model, *MIXED), tmp_path / "out")
    assert not (tmp_path / "out").exists()
