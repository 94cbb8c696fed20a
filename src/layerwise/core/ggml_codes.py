"""Which bits of a GGML block say which of its weights, found by turning every bit in turn."""

from functools import cache
from typing import NamedTuple

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from layerwise.core.ggml import FLOATS, decode, encode, format_of

#: random blocks that must agree on what a bit does, and the widths that scales are shared in
_BLOCKS = 8
_WIDTHS = (256, 128, 64, 32, 16, 8, 4, 2)


class Codes(NamedTuple):
    """Where the codes of a block lie: `place[i, k]` is bit `k` of weight `i`; each run of `width`
    weights has the same values to choose from."""

    name: str
    place: Int[Tensor, "weights bits"]
    width: int

    def read(self, data: UInt8[Tensor, "out bytes"]) -> Int[Tensor, "out in"]:
        """The codes that the bytes of a matrix hold."""
        held = _bits(self._blocks(data))[..., self.place]  # [out, blocks, weights, bits]
        return (held.short() << torch.arange(held.shape[-1])).sum(-1).flatten(1).short()

    def write(
        self, data: UInt8[Tensor, "out bytes"], codes: Int[Tensor, "out in"]
    ) -> UInt8[Tensor, "out bytes"]:
        """The bytes with other codes in them, scales as they are."""
        weights, bits = self.place.shape
        blocks = _bits(self._blocks(data))
        own = codes.unflatten(1, (-1, weights, 1)) >> torch.arange(bits) & 1
        blocks[..., self.place] = own.to(torch.uint8)
        return _bytes(blocks).flatten(1)

    def values(self, data: UInt8[Tensor, "out bytes"]) -> Float[Tensor, "out runs levels"]:
        """What every code stands for, in each run of weights."""
        columns = data.shape[1] // format_of(self.name).nbytes * len(self.place)
        same = torch.empty(len(data), columns, dtype=torch.int16)
        levels = [
            decode(self.write(data, same.fill_(code)), self.name, columns)[:, :: self.width]
            for code in range(2 ** self.place.shape[1])
        ]
        return torch.stack(levels, -1)

    def _blocks(self, data: Tensor) -> UInt8[Tensor, "out blocks bytes"]:
        return data.unflatten(1, (-1, format_of(self.name).nbytes))


@cache
def codes_of(name: str) -> Codes | None:
    """The codes of a type; None where most of its bits stand for several weights at once.

    Example:
        >>> codes_of("Q3_K").place.shape, codes_of("Q3_K").width, codes_of("IQ3_XXS")
        (torch.Size([256, 3]), 16, None)
    """
    if name in FLOATS:
        return None
    kind, generator = format_of(name), torch.Generator().manual_seed(0)
    data = encode(torch.randn(_BLOCKS, kind.weights, generator=generator), name)
    turned = torch.eye(8 * kind.nbytes, dtype=torch.uint8) ^ _bits(data)[:, None]
    held = decode(_bytes(turned).flatten(0, 1), name, kind.weights).unflatten(0, (_BLOCKS, -1))
    moved = (held != decode(data, name, kind.weights)[:, None]).any(0)  # [bits, weights]
    moves = moved & (moved.sum(1, keepdim=True) == 1)
    counts = moves.sum(0)
    if not (counts == counts[0]).all() or 2 * counts.sum() < 8 * kind.nbytes:
        return None
    found = Codes(name, moves.T.nonzero()[:, 1].reshape(kind.weights, -1), 1)
    grid = found.values(data)  # [blocks, weights, levels]
    fits = (
        width
        for width in _WIDTHS
        if kind.weights % width == 0
        and (runs := grid.unflatten(1, (-1, width))).eq(runs[:, :, :1]).all()
    )
    return found._replace(width=next(fits, 1))


def _bits(data: Tensor) -> Tensor:
    """The bits of bytes, lowest first, in the last dimension."""
    return (data[..., None] >> torch.arange(8, dtype=torch.uint8) & 1).flatten(-2)


def _bytes(bits: Tensor) -> Tensor:
    """The bytes that are made of bits."""
    powers = 2 ** torch.arange(8, dtype=torch.uint8)
    return (bits.unflatten(-1, (-1, 8)) * powers).sum(-1, dtype=torch.uint8)
