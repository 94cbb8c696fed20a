"""Hyper-parameters of a GGUF file that the shapes of its tensors tell."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from layerwise.core.ggml import format_of
from layerwise.core.network import Network
from layerwise.export._gguf_rows import key_heads

#: key of GGUF -> the tensors whose inputs are so many
_WIDTHS = {
    "expert_feed_forward_length": ".ffn_down_exps.weight",
    "expert_shared_feed_forward_length": ".ffn_down_shexp.weight",
    "ssm.inner_size": ".ssm_out.weight",
}


class Place(NamedTuple):
    """A tensor of the file: its name, its shape, and its type."""

    name: str
    shape: tuple[int, ...]
    type: str

    @property
    def nbytes(self) -> int:
        """Its bytes, without padding."""
        rows = torch.Size(self.shape[:-1]).numel()
        return rows * format_of(self.type).row_bytes(self.shape[-1])


def measured(network: Network, places: Sequence[Place]) -> dict[str, Any]:
    """Hyper-parameters that the shapes of tensors tell; a list where layers differ."""
    apart = any(".attn_k." in p.name for p in places)
    fused = [p.shape[0] for p in places if ".attn_qkv.weight" in p.name and not apart]
    sizes: dict[str, Any] = {key: _width(places, part) for key, part in _WIDTHS.items()}
    held = {p.name: p.shape[-1] for p in places if ".ffn_down" in p.name}
    count = len(network.layers())
    without = [i for i in range(count) if not any(n.startswith(f"blk.{i}.") for n in held)]
    kinds = ("ffn_down", "ffn_down_exps") if without else ("ffn_down",)
    each = [max(held.get(f"blk.{i}.{k}.weight", 0) for k in kinds) for i in range(count)]
    same = len({*filter(None, each)}) < 2 and not (without and any(each))
    first = _width(places, ".ffn_down.weight") or _width(places, ".ffn_down_exps.weight")
    sizes["feed_forward_length"] = first if same else each
    sizes["context_length"] = rows_of(places, "position_embd.weight")
    sizes["attention.head_count_kv"] = key_heads(fused[0], network) if fused else 0
    found = {key: size for key, size in sizes.items() if size}
    routed = [int(p.name.split(".")[1]) for p in places if ".ffn_gate_inp.weight" in p.name]
    return found | ({"leading_dense_block_count": routed[0]} if routed else {})


def _width(places: Sequence[Place], part: str) -> int:
    """Inputs of the first tensor of that name, 0 where there is none."""
    return next((p.shape[-1] for p in places if part in p.name), 0)


def rows_of(places: Sequence[Place], name: str) -> int:
    """Rows of a tensor, 0 where there is none."""
    return next((p.shape[0] for p in places if p.name == name), 0)
