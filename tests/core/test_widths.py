"""Widths are found by trying, and what is cut out is what the edits left without weights."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from build import build, entries, example
from transformers import AutoModelForCausalLM

from layerwise.core.checkpoint import Checkpoint
from layerwise.core.errors import LayerwiseError
from layerwise.core.find_widths import find_widths, readers, widths_named
from layerwise.core.open import open_network
from layerwise.core.plan import DataSpec, Edit, Identity, Plan, Step
from layerwise.core.width import Place, Width
from layerwise.jobs.apply import apply_plan

#: the fields of every width, how many units it has, and how many inputs of its reader a unit has
KNOWN: dict[str, list[tuple[dict[str, int], int, int]]] = {
    "llama": [
        ({"intermediate_size": 96}, 96, 1),
        ({"num_attention_heads": 4, "num_key_value_heads": 2}, 2, 32),
    ],
    "mixtral": [
        ({"intermediate_size": 96}, 96, 1),
        ({"num_attention_heads": 4, "num_key_value_heads": 2}, 2, 32),
    ],
    "gpt2": [({"n_inner": 256}, 256, 1)],
    "opt": [({"ffn_dim": 96}, 96, 1)],
    "neox": [({"intermediate_size": 96}, 96, 1)],
    "mamba": [],
}


def found_in(folder: Path) -> list[Width]:
    return find_widths(open_network(folder))


def plan_of(folder: Path, *, share: float = 0.5, **options: Any) -> Plan:
    """All widths at a share of their units, by the smallest weights."""
    held, network = Checkpoint(folder), open_network(folder)
    fields: dict[str, int] = {}
    edits = []
    for width in find_widths(network):
        fields |= width.values(int(share * width.units))
        for place, matrix in readers(network, width):
            step = {"share": share, "pattern": f"column:{place.block}", **options}
            edits.append(Edit(matrix.key, (Step("magnitude", step),)))
    identity = Identity(held.structure, held.weights)
    return Plan(identity, data=DataSpec(samples=2, length=32), widths=fields, edits=tuple(edits))


@pytest.mark.parametrize("kind", KNOWN)
def test_the_widths_of_an_architecture(kind: str, tiny: Callable[..., Path]) -> None:
    found = [(dict(w.fields), w.units, w.block) for w in found_in(tiny(kind))]
    assert found == KNOWN[kind]


@pytest.mark.parametrize("kind", ["llama", "mixtral", "gpt2"])
def test_what_is_cut_out_was_not_read(kind: str, tiny: Callable[..., Path], tmp_path: Path) -> None:
    plan = plan_of(tiny(kind))
    bare = Plan(plan.model, data=plan.data, edits=plan.edits)
    apply_plan(tiny(kind), plan, tmp_path / "narrow", dtype="float32")
    apply_plan(tiny(kind), bare, tmp_path / "zeros", dtype="float32")
    ids = torch.arange(20)[None]
    narrow, zeros = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name).eval() for name in ("narrow", "zeros")
    )
    with torch.no_grad():
        torch.testing.assert_close(narrow(ids).logits, zeros(ids).logits, atol=1e-5, rtol=1e-4)
    for field, value in plan.widths.items():
        assert getattr(narrow.config, field) == value
    assert Checkpoint(tmp_path / "narrow").nbytes < Checkpoint(tmp_path / "zeros").nbytes


#: the fields of every width, and how many layers have it, with which reader and how many inputs
PLACES: dict[tuple[str, str], list[tuple[tuple[str, ...], list[tuple[int, str, int]]]]] = {
    ("seq2seq", "t5"): [
        (
            ("d_ff",),
            [
                (4, "layer.1.DenseReluDense.wo.weight", 1),
                (4, "layer.2.DenseReluDense.wo.weight", 1),
            ],
        )
    ],
    ("seq2seq", "bart"): [
        (("encoder_ffn_dim",), [(4, "fc2.weight", 1)]),
        (("decoder_ffn_dim",), [(4, "fc2.weight", 1)]),
    ],
    ("seq2seq", "t5gemma"): [
        (("encoder.intermediate_size",), [(4, "mlp.down_proj.weight", 1)]),
        (("decoder.intermediate_size",), [(4, "mlp.down_proj.weight", 1)]),
        (
            ("encoder.num_attention_heads", "encoder.num_key_value_heads"),
            [(4, "self_attn.o_proj.weight", 32)],
        ),
        (
            ("decoder.num_attention_heads", "decoder.num_key_value_heads"),
            [(4, "self_attn.o_proj.weight", 32), (4, "cross_attn.o_proj.weight", 32)],
        ),
    ],
    ("causal", "deepseek_v2"): [
        (
            ("moe_intermediate_size",),
            [(4, "mlp.experts.down_proj", 1), (4, "mlp.shared_experts.down_proj.weight", 4)],
        ),
        (("num_attention_heads",), [(4, "self_attn.o_proj.weight", 16)]),
    ],
}


@pytest.mark.parametrize(("task", "kind"), PLACES)
def test_layers_of_several_kinds(task: str, kind: str, tmp_path: Path) -> None:
    """Two stacks, two attentions in a layer, experts beside shared ones: halved, and reloaded."""
    entry = next(e for e in entries() if tuple(e)[:2] == (task, kind))
    model = build(entry)
    model.save_pretrained(tmp_path / "model")
    network = open_network(tmp_path / "model")
    found = {
        tuple(w.fields): [(len(p.layers), p.reader, p.block) for p in w.places]
        for w in find_widths(network)
    }
    assert list(found.items()) == PLACES[task, kind]
    plan = plan_of(tmp_path / "model")
    bare = Plan(plan.model, data=plan.data, edits=plan.edits)
    apply_plan(tmp_path / "model", plan, tmp_path / "narrow", dtype="float32")
    apply_plan(tmp_path / "model", bare, tmp_path / "zeros", dtype="float32")
    given = example(entry, model)
    narrow, zeros = (
        type(model).from_pretrained(tmp_path / name).eval() for name in ("narrow", "zeros")
    )
    with torch.no_grad():
        torch.testing.assert_close(
            narrow(**given).logits, zeros(**given).logits, atol=1e-5, rtol=1e-4
        )
    assert Checkpoint(tmp_path / "narrow").nbytes < Checkpoint(tmp_path / "zeros").nbytes


def test_units_that_a_layer_does_not_read_anyway_fill_up() -> None:
    place = Place(("decoder/0",), {"down": _cut(-1), "up": _cut(-2)}, "down")
    tensors = {"down": torch.tensor([[0.0, 2.0, 0.0, 0.0]]), "up": torch.arange(4.0)[:, None]}
    narrow = Width({"size": 4}, 4, (place,)).narrowed(tensors, 2, "decoder/0")
    assert narrow["down"].tolist() == [[0.0, 2.0]]
    assert narrow["up"].tolist() == [[0.0], [1.0]]


def _cut(axis: int) -> Any:
    from layerwise.core.width import Cut

    return Cut(axis, (1,))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"widths": {"hidden_size": 32}}, "hidden_size.*intermediate_size"),
        ({"widths": {"num_attention_heads": 2}}, "made smaller by the same share"),
        ({"widths": {"intermediate_size": 24}}, "at most|24 units of 96"),
        ({"edits": ()}, "a chain that leaves"),
        ({"target": "gguf"}, "target hf"),
    ],
)
def test_widths_that_cannot_be(
    change: dict[str, Any], said: str, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    from msgspec import structs

    plan = structs.replace(plan_of(tiny("llama")), **change)
    with pytest.raises(LayerwiseError, match=said):
        apply_plan(tiny("llama"), plan, tmp_path / "out", dtype="float32")
    assert not (tmp_path / "out").exists()


def test_no_field_that_is_none(tiny: Callable[..., Path]) -> None:
    network = open_network(tiny("llama"))
    assert widths_named(network, {}) == []
    ((width, units),) = widths_named(network, {"intermediate_size": 48})
    assert (width.name, units) == ("intermediate_size", 48)
