"""Rows of a GGUF file: their bytes, cut and in the order that llama.cpp wants, and back."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from layerwise.core.ggml import FLOATS, encode
from layerwise.core.network import Network
from layerwise.core.stack import Layer, Matrix
from layerwise.core.weight import Packed, Weight
from layerwise.export._gguf_facts import head_size, heads_of, turned
from layerwise.export._gguf_models import known, text_config
from layerwise.export._gguf_names import MAKES_KEYS, Names

#: weights of the smallest block of a packed type
BLOCK = 32
#: tensors of linear attention whose last rows belong to heads of values
OF_VALUES = (
    "attn_qkv.",
    "attn_gate.",
    "ssm_conv1d.",
    "ssm_alpha.",
    "ssm_beta.",
    "ssm_a",
    "ssm_dt.",
)
#: the tensor whose columns do, in GGUF and in transformers
MIXED, MIXES = ".ssm_out.", "linear_attn.out_proj.weight"


def blocks_of(
    network: Network,
    layer: Layer,
    name: str,
    tensors: Mapping[str, Tensor],
    records: Mapping[str, Weight],
    names: Names,
) -> Iterator[Tensor]:
    """The bytes of a tensor of a layer, block by block where it is cut."""
    pieces = names.pieces(f"{layer.path}.{name}")
    if not pieces:
        return
    own = [m for m in layer.matrices if m.parameter == name]
    if not own:
        for piece, part in zip(pieces, apart(tensors[name], pieces, names, -1), strict=True):
            value = -part.float().exp() if name.endswith(".A_log") else part
            rows = plain(value, piece, names).reshape(len(part), -1)
            yield reordered(rows, piece, network)
        return
    parts = []
    for matrix in own:
        record = records.get(matrix.key)
        if isinstance(record, Packed):
            parts.append(record.data)
        else:
            dense = matrix.view(tensors[name]) if record is None else record.dense()
            parts.append(encode(dense, kept_type(matrix, network.stored.dtype)))
    rows = torch.cat(parts).unflatten(0, (len(own), -1))  # [experts, out, bytes]
    for piece, part in zip(pieces, apart(rows, pieces, names, 1), strict=True):
        yield reordered(part.flatten(0, 1), piece, network)


def apart(tensor: Tensor, pieces: Sequence[str], names: Names, dim: int) -> tuple[Tensor, ...]:
    """The tensors that a fused one is made of, block after block or taking turns."""
    if MAKES_KEYS in pieces[0]:
        heads, keys, values, rank = names.compressed
        each = tensor.reshape(heads, keys + values, rank, -1)  # [heads, out, rank, bytes]
        first, second = each.split([keys, values], 1)
        return tuple(t.flatten(0, 1).flatten(1)[None] for t in (first.transpose(1, 2), second))
    split = (-1, len(pieces)) if names.known.paired else (len(pieces), -1)
    dim = dim % tensor.dim()
    return tensor.unflatten(dim, split).unbind(dim + names.known.paired)


def together(parts: Sequence[Tensor], pieces: Sequence[str], names: Names, dim: int) -> Tensor:
    """The tensor that these are parts of, as `apart` cut it."""
    if MAKES_KEYS in pieces[0]:
        heads, keys, values, rank = names.compressed
        first = parts[0].reshape(heads, rank, keys, -1).transpose(1, 2)
        each = torch.cat([first, parts[1].reshape(heads, values, rank, -1)], 1)
        return each.flatten(0, 1).flatten(1)[None]  # [1, out, bytes]
    at = dim + names.known.paired
    return torch.stack(tuple(parts), at).flatten(dim, dim + 1)


def plain(tensor: Tensor, name: str, names: Names) -> Tensor:
    """A tensor that is no matrix, in float32; norms as llama.cpp multiplies with them."""
    shift = names.known.shift if name.endswith("norm.weight") and ".ssm_" not in name else 0.0
    scale = names.scale if name.endswith("output_norm.weight") and "enc." not in name else 1.0
    used = tensor[names.unused(name) :].float()
    return ((used + shift) * scale).contiguous().cpu().view(torch.uint8)


def is_filter(matrix: Matrix) -> bool:
    """Whether a matrix has fewer columns than any block of weights: it stays in floats."""
    return matrix.shape[1] < BLOCK


def kept_type(matrix: Matrix, dtype: torch.dtype) -> str:
    """The type of a matrix that is kept: the checkpoint's own, F32 for filters."""
    if is_filter(matrix):
        return "F32"
    return next((name for name, kind in FLOATS.items() if kind == dtype), "F32")


def reordered(rows: Tensor, name: str, network: Network, back: bool = False) -> Tensor:
    """Rows of a tensor, by its GGUF name, in the order of llama.cpp, or `back`; others as they are.

    Args:
        rows: `[out, bytes]`.
        name: of the tensor in GGUF.
        network: whose tensor it is.
        back: from the order of llama.cpp to that of transformers.
    """
    entry = known(network)
    if (entry.halves or entry.unpaired) and any(f".attn_{x}." in name for x in "qk"):
        config, back = text_config(network), back != entry.unpaired
        return _in_pairs(rows, heads_of(config, name), turned(config, head_size(config)), back)
    if entry.woven and ".attn_qkv." in name:
        return _apart(rows, network, back)
    if entry.tiled and any(f".{part}" in name for part in OF_VALUES):
        return _tiled(rows, text_config(network), back)
    if entry.tiled and MIXED in name:
        config = text_config(network)
        heads = rows.unflatten(1, (config.linear_num_value_heads, -1))  # [out, heads, bytes]
        return _tiled(heads.transpose(0, 1), config, back).transpose(0, 1).flatten(1).contiguous()
    return rows.contiguous()


def _in_pairs(rows: Tensor, heads: int, size: int, back: bool) -> Tensor:
    """Of the first `d` rows of a head, transformers turns row `i` with row `i + d/2`, llama.cpp
    `2i` with `2i + 1`; the others stay.
    """
    each = rows.unflatten(0, (heads, -1))  # [heads, size, bytes]
    halves = each[:, :size].unflatten(1, (-1, 2) if back else (2, -1))  # [heads, 2, d / 2, bytes]
    return torch.cat([halves.transpose(1, 2).flatten(1, 2), each[:, size:]], 1).flatten(0, 1)


def moved_columns(network: Network, matrix: Matrix) -> int:
    """How many columns of a matrix stay together where heads are moved, 0 where none is."""
    config = text_config(network)
    if not known(network).tiled or not matrix.parameter.endswith(MIXES):
        return 0
    even = config.linear_num_key_heads == config.linear_num_value_heads
    return 0 if even else config.linear_value_head_dim


def _tiled(rows: Tensor, config: Any, back: bool) -> Tensor:
    """The last rows, which are those of heads of values, in the order of llama.cpp or `back`."""
    keys, values = config.linear_num_key_heads, config.linear_num_value_heads
    size = 1 if len(rows) == values else config.linear_value_head_dim
    kept, own = rows.split([len(rows) - values * size, values * size])
    split = (values // keys, keys) if back else (keys, values // keys)
    turned_over = own.unflatten(0, (*split, size)).transpose(0, 1)  # [each, keys, size, ...]
    return torch.cat([kept, turned_over.flatten(0, 2)])


def _apart(rows: Tensor, network: Network, back: bool) -> Tensor:
    """Fused rows that come head by head, for each key head its queries, itself and its values:
    llama.cpp wants all queries, then all keys, then all values.
    """
    heads = key_heads(len(rows), network)
    size, width = head_size(text_config(network)), rows.shape[1]
    each = len(rows) // size // heads - 2  # queries of a key head
    if back:
        parts = rows.split([heads * each * size, heads * size, heads * size])
        woven = [part.reshape(heads, -1, size, width) for part in parts]  # [heads, each, d, bytes]
        return torch.cat(woven, 1).reshape(rows.shape)
    woven = rows.reshape(heads, each + 2, size, width).split([each, 1, 1], 1)
    return torch.cat([part.reshape(-1, width) for part in woven])


def key_heads(rows: int, network: Network) -> int:
    """Key heads of a fused matrix of so many rows: what is left beside its query heads."""
    config = text_config(network)
    return (rows // head_size(config) - config.num_attention_heads) // 2
