"""Widths are found by trying, and what is cut out is what the edits left without weights."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from layerwise.core.checkpoint import Checkpoint
from layerwise.core.errors import LayerwiseError
from layerwise.core.find_widths import find_widths, widths_named
from layerwise.core.open import open_network
from layerwise.core.plan import DataSpec, Edit, Identity, Plan, Step
from layerwise.core.width import Width
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
        step = {"share": share, "pattern": f"column:{width.block}", **options}
        keys = {
            m.key for la in network.layers() for m in la.matrices if m.parameter == width.reader
        }
        fields |= width.values(int(share * width.units))
        edits += [Edit(key, (Step("magnitude", step),)) for key in sorted(keys)]
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


def test_units_that_a_layer_does_not_read_anyway_fill_up() -> None:
    width = Width({"size": 4}, 4, {"down": _cut(-1), "up": _cut(-2)}, "down")
    tensors = {"down": torch.tensor([[0.0, 2.0, 0.0, 0.0]]), "up": torch.arange(4.0)[:, None]}
    kept = width.read_units(tensors, 2, "decoder/0")
    assert kept.tolist() == [0, 1]
    narrow = width.without(tensors, kept)
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
