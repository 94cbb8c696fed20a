"""Experts that a checkpoint stores one by one, packed in one grid, loaded by stock transformers."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner
from written import made_once

from layerwise.cli import app
from layerwise.core.apart import pieces
from layerwise.core.checkpoint import Checkpoint
from layerwise.core.errors import LayerwiseError
from layerwise.core.open import open_network
from layerwise.core.plan import DataSpec, Edit, Identity, Plan, Step, read_plan
from layerwise.core.select import selects
from layerwise.export.compressed_tensors import packed_records
from layerwise.jobs.apply import apply_plan, preview
from layerwise.jobs.plan import make_plan
from layerwise.jobs.request import Request
from layerwise.jobs.session import Budget
from layerwise.jobs.verify import Settings, verify

DATA = DataSpec(samples=2, length=32)
MENU: dict[str, Any] = {"menu": {"bits": [3, 4, 8], "group": [32]}}
SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,
    "num_experts_per_tok": 2,
    "eos_token_id": 2,
}
LATENT: dict[str, Any] = {
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
    "n_routed_experts": 4,
    "kv_lora_rank": 32,
    "q_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
}
NARROW: dict[str, Any] = {"moe_intermediate_size": 32}
CONFIGS: dict[str, Callable[[], Any]] = {
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(
        **SIZES, **NARROW, num_experts=4, decoder_sparse_step=1
    ),
    "qwen2_moe": lambda: transformers.Qwen2MoeConfig(
        **SIZES, **NARROW, num_experts=4, shared_expert_intermediate_size=64
    ),
    "deepseek_v3": lambda: transformers.DeepseekV3Config(**SIZES, **NARROW, **LATENT),
    "olmoe": lambda: transformers.OlmoeConfig(**SIZES, num_experts=4),
    "mixtral": lambda: transformers.MixtralConfig(**SIZES, num_local_experts=4),
}
EXPERTS = "*/*/mlp.gate_up", "*/*/mlp.down"


@pytest.fixture(scope="module")
def stored(
    tmp_path_factory: pytest.TempPathFactory, tokenizer_into: Callable[[Path], None]
) -> Callable[[str], Path]:
    """`stored(kind)`: the folder of a tiny model whose experts are stored one by one, made once."""

    def build(kind: str) -> Any:
        return AutoModelForCausalLM.from_config(CONFIGS[kind]()).to(torch.bfloat16)

    return made_once(tmp_path_factory, tokenizer_into, build)


def plan_for(model: Path, *edits: Edit) -> Plan:
    held = Checkpoint(model)
    identity = Identity(held.structure, held.weights)
    return Plan(identity, target="compressed-tensors", edits=edits, data=DATA)


def quantization(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def run(*words: object) -> str:
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.parametrize("kind", CONFIGS)
def test_from_the_command_line(stored: Callable[[str], Path], tmp_path: Path, kind: str) -> None:
    model, out, file = stored(kind), tmp_path / "out", tmp_path / "plan.yaml"
    few = "--samples", 2, "--length", 32
    menu = "--set", "menu.group=32"
    run("plan", model, "--bits", 4.6, "--method", "gptq", *few, *menu, "--out", file)
    run("apply", model, file, "--out", out)
    plan, network, held = read_plan(file), open_network(model), Checkpoint(out)
    apart = [m for layer in network.layers() for m in layer.matrices if m.apart]
    chains = {str(e.chain) for e in plan.edits if any(e.select == matrix.key for matrix in apart)}
    assert len(chains) == 1, "one option for all experts"
    assert len({str(e.chain) for e in plan.edits}) > 1, "other matrices are still mixed"
    named = [n for n in held.tensors if re.search(r"experts\.\d+\..*weight_packed", n)]
    assert len(named) == sum(matrix.apart for matrix in apart)
    dense = [n for n in Checkpoint(model).tensors if re.search(r"experts\.\d+\.", n)]
    assert {n.replace("_packed", "") for n in named} == set(dense), "names as they were stored"
    inside = {n: t for n, t in held.tensors.items() if ".layers." in n}
    rest = {n: t for n, t in Checkpoint(model).tensors.items() if ".layers." in n}
    sizes = sum(m.size * 2 for layer in network.layers() for m in layer.matrices)
    planned = sum(row["bytes"] for row in preview(model, plan))
    outside = sum(t.nbytes for t in rest.values()) - sizes
    assert sum(t.nbytes for t in inside.values()) == planned + outside
    output = run("verify", model, out, "--documents", 2, "--length", 32, "--no-naive")
    assert "all checks passed" in output
    assert "largest difference 0.0e+00" in output


@pytest.mark.parametrize("kind", CONFIGS)
def test_what_is_planned_is_written_and_read_back(
    stored: Callable[[str], Path], tmp_path: Path, kind: str
) -> None:
    model, out = stored(kind), tmp_path / "out"
    found = make_plan(Request(model, Budget(bits=5.0), data=DATA, settings=MENU))
    applied = apply_plan(model, found.plan, out)
    assert applied.nbytes == found.nbytes == Checkpoint(out).nbytes
    network, held = open_network(model), Checkpoint(out)
    loaded = AutoModelForCausalLM.from_pretrained(out)
    for layer in network.layers():
        records = packed_records(held, network, layer, found.plan.edits)
        for matrix in (m for m in layer.matrices if m.apart):
            weight = loaded.get_submodule(layer.path).get_parameter(matrix.parameter)
            mine = records[matrix.key].dense().to(torch.bfloat16)
            assert torch.equal(matrix.view(weight), mine), matrix.key
    settings = Settings(documents=2, length=32, speed=False, memory=False, naive=False)
    whole, streamed = (verify(model, out, settings._replace(streamed=s)) for s in (False, True))
    assert all(check["ok"] for check in whole.checks), whole.checks
    assert whole.rows[1]["kl"][0] == pytest.approx(streamed.rows[1]["kl"][0], rel=5e-2)


def test_experts_take_one_group_that_no_other_module_matches(
    stored: Callable[[str], Path], tmp_path: Path
) -> None:
    model, out = stored("deepseek_v3"), tmp_path / "out"
    plan = plan_for(
        model,
        *(
            Edit(f"*/*/mlp.{name}", (Step("rtn", {"bits": 8, "group": 32}),))
            for name in ("gate_proj", "up_proj", "down")
        ),
        Edit("*/*/mlp.gate_up", (Step("rtn", {"bits": 3, "group": 32}),)),
        Edit("*/*/mlp.down_proj", (Step("rtn", {"bits": 3, "group": 32}),)),
    )
    apply_plan(model, plan, out)
    groups = quantization(out)["config_groups"].values()
    (experts,) = [g for g in groups if any(t.startswith("re:") for t in g["targets"])]
    assert experts["weights"]["num_bits"] == 3
    (pattern,) = [t for t in experts["targets"] if t.startswith("re:")]
    modules = {name.rpartition(".")[0] for name in Checkpoint(out).tensors}
    matched = {name for name in modules if re.match(pattern.removeprefix("re:"), name)}
    assert matched == {name for name in modules if re.search(r"\.experts\.\d+\.", name)}
    assert any("shared_experts" in name for g in groups for name in g["targets"])
    assert not any("shared_experts" in name for name in quantization(out)["ignore"])


def test_experts_stay_as_they_are_beside_packed_matrices(
    stored: Callable[[str], Path], tmp_path: Path
) -> None:
    model, out = stored("qwen3_moe"), tmp_path / "out"
    request = Request(model, Budget(bits=4.5), data=DATA, settings=MENU, keep=(EXPERTS[0],))
    found = make_plan(request)
    assert not any(selects(pattern, m) for m in _edited(model, found.plan) for pattern in EXPERTS)
    applied = apply_plan(model, found.plan, out)  # reloaded as a check
    assert applied.nbytes == found.nbytes
    assert any("experts" in name for name in quantization(out)["ignore"])


def _edited(model: Path, plan: Plan) -> list[Any]:
    keys = {edit.select for edit in plan.edits}
    return [m for la in open_network(model).layers() for m in la.matrices if m.key in keys]


@pytest.mark.parametrize("chain", [Step("minifloat"), Step("rtn", {"bits": 5, "group": 0})])
def test_other_grids_of_experts(stored: Callable[[str], Path], tmp_path: Path, chain: Step) -> None:
    model, out = stored("olmoe"), tmp_path / "out"
    edits = [Edit(pattern, (chain,)) for pattern in EXPERTS]
    apply_plan(model, plan_for(model, *edits), out)  # reloaded as a check
    held, network = Checkpoint(out), open_network(model)
    assert len(packed_records(held, network, network.layers()[0], edits)) == 8


@pytest.mark.parametrize(
    ("edits", "found"),
    [
        ([(EXPERTS[0], 3), (EXPERTS[1], 4)], "rtn 3 bits g32 for .*, rtn 4 bits g32 for"),
        ([(EXPERTS[0], 4)], "rtn 4 bits g32 for .*, as is for"),
        ([("*/1/mlp.gate_up", 4), ("*/1/mlp.down", 4)], "as is for .*, rtn 4 bits g32 for"),
        ([("*/*/mlp.gate_up[1]", 4)], "as is for .*, rtn 4 bits g32 for"),
    ],
)
def test_experts_in_several_grids_are_refused(
    stored: Callable[[str], Path], tmp_path: Path, edits: list[tuple[str, int]], found: str
) -> None:
    model = stored("qwen3_moe")
    steps = [Edit(p, (Step("rtn", {"bits": b, "group": 32}),)) for p, b in edits]
    with pytest.raises(LayerwiseError, match=f"one grid for all experts.*{found}"):
        apply_plan(model, plan_for(model, *steps), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["mxfp8", "nvfp4"])
def test_scaled_floats_of_experts_are_refused(
    stored: Callable[[str], Path], tmp_path: Path, kind: str
) -> None:
    model, step = stored("mixtral"), Step("minifloat", {"type": kind})
    plan = plan_for(model, *(Edit(pattern, (step,)) for pattern in EXPERTS))
    with pytest.raises(LayerwiseError, match="experts that are stored one by one"):
        apply_plan(model, plan, tmp_path / "out")


def test_layers_do_not_go_with_experts_that_share_their_option(
    stored: Callable[[str], Path],
) -> None:
    request = Request(stored("olmoe"), Budget(bits=4.0), data=DATA, settings=MENU)
    with pytest.raises(LayerwiseError, match="shares its option over all layers"):
        make_plan(request._replace(allow=("bits", "layer")))


def test_rows_of_an_expert_are_found_by_the_conversion(stored: Callable[[str], Path]) -> None:
    network = open_network(stored("mixtral"))
    layer = network.layers()[1]
    found = pieces(network.stored, layer, "mlp.experts.gate_up_proj")
    module = "model.layers.1.block_sparse_moe.experts.2"
    assert [piece.module for piece in found[2]] == [f"{module}.w1", f"{module}.w3"]
    assert torch.equal(torch.cat([piece.rows for piece in found[2]]), torch.arange(192))


def test_fused_experts_are_not_told_apart(tiny: Callable[..., Path]) -> None:
    assert not any(m.apart for la in open_network(tiny("dbrx")).layers() for m in la.matrices)
