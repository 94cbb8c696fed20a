"""Stacks, roles and groups are found by behaviour."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from build import Entry, build
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from layerwise.core.errors import LayerwiseError
from layerwise.core.find import find_stacks
from layerwise.core.hollow import build_hollow, is_hollow
from layerwise.core.open import open_network
from layerwise.intervene import At, ablate

ROLES = {
    "llama": [
        "attention.q",
        "attention.k",
        "attention.v",
        "attention.o",
        "mlp.gate",
        "mlp.up",
        "mlp.down",
    ],
    "gpt2": ["attention.qkv", "attention.o", "mlp.up", "mlp.down"],
    "opt": ["attention.q", "attention.k", "attention.v", "attention.o", "mlp.up", "mlp.down"],
    "falcon": ["attention.qkv", "attention.o", "mlp.up", "mlp.down"],
}


@pytest.mark.parametrize("kind", ROLES)
def test_roles(kind: str, tiny: Callable[..., Path]) -> None:
    layer = open_network(tiny(kind)).stack.layers[1]
    assert sorted(f"{m.part}.{m.role}" for m in layer.matrices) == sorted(ROLES[kind])
    assert [part.mixes for part in layer.parts] == [True, False]


@pytest.mark.parametrize(
    ("kind", "class_name"),
    [
        ("bart", "BartForConditionalGeneration"),
        ("t5", "T5ForConditionalGeneration"),
        ("albert", "AlbertForMaskedLM"),
    ],
)
def test_parts_in_lists_and_wrappers_and_attention_to_another_sequence(
    kind: str, class_name: str, tmp_path: Path
) -> None:
    task = "masked" if kind == "albert" else "seq2seq"
    build(Entry(task, kind, class_name)).save_pretrained(tmp_path)  # type: ignore[operator]
    *encoders, last = open_network(tmp_path).stacks
    itself = ["attention.k", "attention.o", "attention.q", "attention.v", "mlp.down", "mlp.up"]
    across = [f"cross_{name}" for name in itself[:4]] if encoders else []
    for stack, wanted in [*((s, itself) for s in encoders), (last, sorted(across + itself))]:
        layer = stack.layers[0]
        assert sorted(f"{m.part}.{m.role}" for m in layer.matrices) == wanted
        mixing = {part.name: part.mixes for part in layer.parts}
        assert mixing["attention"] and not mixing.get("cross_attention") and not mixing["mlp"]


def test_fusion_and_input_groups(tiny: Callable[..., Path]) -> None:
    groups = {
        g.key: [m.role for m in g.matrices] for g in open_network(tiny("llama")).stack.groups()
    }
    assert groups["decoder/0/attention.q"] == ["q", "k", "v"]
    assert groups["decoder/0/mlp.gate"] == ["gate", "up"]
    layer = open_network(tiny("falcon")).stack.layers[0]
    by_role = {m.role: m for m in layer.matrices}
    assert by_role["qkv"].inputs == by_role["up"].inputs
    assert by_role["qkv"].fusion != by_role["up"].fusion


def test_a_stream_of_several_states_reads_from_left_to_right() -> None:
    """Four copies of every position travel through these layers, in an axis before the batch."""
    network = open_network(build(Entry("causal", "gemma3n_text", "Gemma3nForCausalLM")))
    assert network.task == "causal" and [stack.name for stack in network.stacks] == ["decoder"]


@pytest.mark.parametrize("kind", ["mixtral", "dbrx"])
def test_experts_are_matrices(kind: str, tiny: Callable[..., Path]) -> None:
    """Along an axis of their own, or one below the other in the rows of a parameter."""
    layer = open_network(tiny(kind)).stack.layers[0]
    roles = {(m.role, m.expert) for m in layer.matrices}
    assert ("router", None) in roles
    assert {e for role, e in roles if role == "down"} == set(range(4))


def test_a_hollow_model_stores_nothing() -> None:
    config = LlamaConfig(num_hidden_layers=2, hidden_size=4096)
    model = build_hollow(LlamaForCausalLM, config, torch.bfloat16)
    assert all(is_hollow(p) for p in model.parameters())
    assert sum(p.untyped_storage().nbytes() for p in model.parameters()) < 1000


def test_plain_sequential_in_memory() -> None:
    torch.manual_seed(0)
    blocks = nn.Sequential(
        *(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)) for _ in range(4))
    )
    network = open_network(blocks, inputs={"input": torch.randn(2, 5, 8)})
    assert len(network.stack.layers) == 4


def test_the_attention_of_torch() -> None:
    """Its module computes in one function of torch, whose inside is seen and can be changed."""
    torch.manual_seed(0)
    made = (nn.TransformerEncoderLayer(32, 4, 64, batch_first=True) for _ in range(3))
    blocks, x = nn.Sequential(*made), torch.randn(2, 5, 32)
    network = open_network(blocks, inputs={"input": x})
    layer = network.stack.layers[1]
    assert layer.key == "encoder/1"
    assert [part.name for part in layer.parts] == ["attention", "mlp"]
    shapes = [matrix.shape for matrix in layer.matrices]
    assert shapes == [(96, 32), (32, 32), (64, 32), (32, 64)]
    first, second, third = blocks.eval()
    with torch.no_grad():
        h = second.norm1(first(x))
        expected = third(second.norm2(h + second.linear2(second.linear1(h).relu())))
        without = network.run({"input": x}, [ablate(At(1, "attention"))])
    torch.testing.assert_close(without, expected, atol=1e-5, rtol=1e-4)


def test_a_network_without_a_stack() -> None:
    model = nn.Linear(4, 4)
    with pytest.raises(LayerwiseError, match="feed one another"):
        find_stacks(model, lambda: model(torch.zeros(1, 4)))
