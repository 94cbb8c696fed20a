"""Records on disk as they are: codes in as many bits as they have, masks in one, and back."""

import math
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Integer, UInt8
from torch import Tensor

from layerwise.core.checkpoint import Checkpoint
from layerwise.core.companions import copy_companions
from layerwise.core.errors import refusing
from layerwise.core.index import read_json
from layerwise.core.shards import ShardWriter
from layerwise.core.visits import FOLDED
from layerwise.core.weight import Weight, flatten, unflatten

#: in a folder of the target `compact`: what its stored records are, by the name of their tensor
RECORDS = "records.json"
#: kinds of records that are stored as they are
STORED = frozenset({"Dense", "Quantized", "Sparse", "Product", "Sum", "Rotated", "Scaled"})


def pack_bits(values: Integer[Tensor, "rows n"], bits: int, align: int = 1) -> UInt8[Tensor, "*"]:
    """Numbers from 0 in so many bits each, every row filled up to a multiple of `align` bytes.

    Example:
        >>> pack_bits(torch.tensor([[1, 0, 1, 1]]), 1)
        tensor([13], dtype=torch.uint8)
    """
    given = values.cpu().numpy().astype(np.uint8)
    planes = (given[..., None] >> np.arange(bits, dtype=np.uint8)) & 1  # [rows, n, bits]
    packed = np.packbits(planes.reshape(len(given), -1), axis=1, bitorder="little")
    return torch.from_numpy(np.pad(packed, ((0, 0), (0, -packed.shape[1] % align))).reshape(-1))


def unpack_bits(
    packed: UInt8[Tensor, " bytes"], rows: int, columns: int, bits: int
) -> Integer[Tensor, "rows n"]:
    """What `pack_bits` was given.

    Example:
        >>> unpack_bits(pack_bits(torch.tensor([[5, 2, 7]]), 3, align=4), 1, 3, 3)
        tensor([[5, 2, 7]], dtype=torch.uint8)
    """
    flat = np.unpackbits(packed.numpy().reshape(rows, -1), axis=1, bitorder="little")
    planes = flat[:, : columns * bits].reshape(rows, columns, bits)
    return torch.from_numpy(planes @ (1 << np.arange(bits, dtype=np.uint8)))


def to_stored(record: Weight) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A record as `flatten` gives it, with its codes and masks packed: `record.nbytes` bytes."""
    tree, tensors = flatten(record)
    for field, place in _packed_fields(tree):
        name, bits, value = place["tensor"], place["bits"], tensors[place["tensor"]]
        place["shape"] = list(value.shape)
        if bits == 1:
            tensors[name] = pack_bits(value.reshape(1, -1).to(torch.uint8), 1)
            continue
        rows = value.T if field == "zero" else value
        tensors[name] = pack_bits(rows.to(torch.int16) + (1 << (bits - 1)), bits, align=4)
    return tree, tensors


def from_stored(tree: dict[str, Any], tensors: Mapping[str, Tensor]) -> Weight:
    """The record that `to_stored` took apart."""
    found = dict(tensors)
    for field, place in _packed_fields(tree):
        name, bits, shape = place["tensor"], place["bits"], place["shape"]
        if bits == 1:
            count = math.prod(shape)
            found[name] = unpack_bits(tensors[name], 1, count, 1).bool().reshape(shape)
            continue
        rows, columns = reversed(shape) if field == "zero" else shape
        codes = unpack_bits(tensors[name], rows, columns, bits).to(torch.int16) - (1 << (bits - 1))
        found[name] = (codes.T if field == "zero" else codes).to(torch.int8).contiguous()
    return unflatten(tree, found)


def _packed_fields(tree: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The places in a tree of what is packed: field, and where its tensor is; `bits` are noted."""
    bits = {"codes": tree.get("bits"), "zero": tree.get("bits"), "mask": 1, "signs": 1}
    for field, value in tree.items():
        if not isinstance(value, dict):
            continue
        if "tensor" not in value:
            yield from _packed_fields(value)
        elif bits.get(field):
            value["bits"] = bits[field]
            yield field, value


def make_dense(folder: Path, out: Path) -> None:
    """Write a folder whose records are dense weights, in the dtype and shape that each stands for.

    Raises:
        LayerwiseError: the records are not those that were written.
    """
    held, checkpoint, writer = read_json(folder / RECORDS), Checkpoint(folder), _writer(out)
    inside = tuple(f"{name}:" for name in held)
    for name in checkpoint.tensors:
        if not name.startswith(inside):
            writer.add(checkpoint.read([name]))
    for name, entry in held.items():
        with refusing(
            f"{folder / RECORDS}, {name}",
            allowed="the records that `layerwise apply` wrote",
            fix="copy the folder again",
        ):
            own = [other for other in checkpoint.tensors if other.startswith(f"{name}:")]
            tensors = {k.removeprefix(f"{name}:"): t for k, t in checkpoint.read(own).items()}
            dense = from_stored(entry["record"], tensors).dense().to(getattr(torch, entry["dtype"]))
            dense = dense.T if entry["transposed"] else dense
            writer.add({name: dense.reshape(entry["shape"]).contiguous()})
    writer.close()
    for name in ("config.json", FOLDED):
        shutil.copyfile(folder / name, out / name)
    copy_companions(folder, out)


def _writer(out: Path) -> ShardWriter:
    out.mkdir(parents=True)
    return ShardWriter(out)
