"""What probes keep of tokens: which count, a sample of them, and their moments.

All are sums or sets that do not depend on how the documents were cut into batches.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def by_token(state: Tensor) -> Float[Tensor, "batch seq dim"]:
    """A hidden state with one row per position; images `[batch, channels, height, width]` too."""
    return state if state.ndim == 3 else state.flatten(2).mT


def kept(state: Tensor, mask: Tensor | None) -> Bool[Tensor, "batch seq"]:
    """Which positions are no padding."""
    shape = by_token(state).shape[:2]
    if mask is None:
        return torch.ones(shape, dtype=torch.bool, device=state.device)
    return mask.to(state.device).bool()


def places(keep: Bool[Tensor, "batch seq"], documents: int) -> Int[Tensor, "tokens two"]:
    """Document and position of every token that counts; padding has no positions."""
    position = keep.long().cumsum(1) - 1
    document = torch.arange(len(keep), device=keep.device)[:, None] + documents
    return torch.stack([document.expand_as(position)[keep], position[keep]], 1)


def priorities(where: Int[Tensor, "tokens two"]) -> Int[Tensor, " tokens"]:
    """A number per token, by its document and position alone: the smallest make a sample.

    Steele et al., 2014, SplitMix: two rounds of multiply and shift over 64 bits.
    """
    pairs = where.cpu().numpy().astype(np.uint64)
    mixed = (pairs[:, 0] << np.uint64(32)) + pairs[:, 1] + np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return torch.from_numpy(((mixed ^ (mixed >> np.uint64(31))) >> np.uint64(1)).astype(np.int64))


class Drawn(NamedTuple):
    """Tokens drawn so far: how many documents went by, priorities and places, what is held."""

    documents: int
    ranks: Int[Tensor, " tokens"]
    where: Int[Tensor, "tokens two"]
    held: tuple[Tensor, ...]

    def ordered(self) -> "Drawn":
        """The same by document and position."""
        order = (self.where[:, 0] * 2**32 + self.where[:, 1]).argsort()
        held = tuple(x[order] for x in self.held)
        return self._replace(ranks=self.ranks[order], where=self.where[order], held=held)


NONE_DRAWN = Drawn(0, torch.zeros(0).long(), torch.zeros(0, 2).long(), ())


def drawn(
    so_far: Drawn,
    keep: Bool[Tensor, "batch seq"],
    count: int,
    hold: Callable[[Tensor], tuple[Tensor, ...]],
    total: int | None = None,
) -> Drawn:
    """The `count` tokens of smallest priority among those drawn so far and some new documents.

    Args:
        so_far: `NONE_DRAWN` at first.
        keep: which positions of the new documents count.
        count: how many tokens are wanted.
        hold: what is held of tokens, a row each, from their places in the flattened batch; asked
            only for those that are among the smallest so far.
        total: how many tokens all documents have together, where that is known: priorities are
            evenly spread, so that those far above the share that is wanted need not be held.
    """
    where, ranks = _ranked(keep.cpu(), so_far.documents)
    flat = keep.reshape(-1).nonzero()[:, 0]
    most = so_far.ranks.max() if len(so_far.ranks) >= count else _bound(count, total)
    able = (ranks < most).nonzero()[:, 0]
    new = able[smallest(ranks[able], count)]
    if not len(new) and so_far.held:
        return so_far._replace(documents=so_far.documents + len(keep))
    held = tuple(x.cpu() for x in hold(flat[new.to(flat.device)]))
    joined = held
    if so_far.held:
        joined = tuple(torch.cat(pair) for pair in zip(so_far.held, held, strict=True))
    ranks, where = (torch.cat(p) for p in ((so_far.ranks, ranks[new]), (so_far.where, where[new])))
    best = smallest(ranks, count)
    rows = tuple(x[best] for x in joined)
    return Drawn(so_far.documents + len(keep), ranks[best], where[best], rows)


def in_each(
    keep: Bool[Tensor, "batch seq"], documents: int, count: int
) -> tuple[Int[Tensor, "batch places"], Bool[Tensor, "batch places"]]:
    """At most so many tokens of each of some new documents, of smallest priority.

    Returns:
        Their places in the sequences, and which of these count: a document may have fewer.
    """
    ranks = torch.full(keep.shape, 2**63 - 1)
    ranks[keep.cpu()] = _ranked(keep.cpu(), documents)[1]
    best, at = ranks.topk(min(count, keep.shape[1]), largest=False)
    return at.to(keep.device), (best < 2**63 - 1).to(keep.device)


def _ranked(keep: Bool[Tensor, "batch seq"], documents: int) -> tuple[Tensor, Tensor]:
    """Places and priorities, computed once for all layers where nothing is padding."""
    if keep.all():
        return _ranked_whole(tuple(keep.shape), documents)
    where = places(keep, documents)
    return where, priorities(where)


@lru_cache(maxsize=64)
def _ranked_whole(shape: tuple[int, int], documents: int) -> tuple[Tensor, Tensor]:
    where = places(torch.ones(shape, dtype=torch.bool), documents)
    return where, priorities(where)


def _bound(count: int, total: int | None) -> int:
    """A priority that `count` of `total` tokens are below, but for one case in a thousand million:
    six standard deviations more than are wanted."""
    wanted = count + 6 * count**0.5 + 18
    return 2**63 - 1 if total is None or wanted >= total else int(wanted / total * 2**63)


def smallest(ranks: Int[Tensor, " tokens"], count: int) -> Int[Tensor, " chosen"]:
    """The places of the smallest so many numbers."""
    return ranks.topk(min(count, len(ranks)), largest=False).indices


class Sample(NamedTuple):
    """States of some tokens before and after a layer, and which tokens these are.

    `where` is (document, position); `before` is empty where a layer changes the positions.
    """

    where: Int[Tensor, "tokens two"]
    before: Float[Tensor, "sources dim"]
    after: Float[Tensor, "tokens out"]


class Moments(NamedTuple):
    """Sums over paired rows `x`, `y`, joined to `z = [x, y]`, in float64.

    With `r = (|x|^2, |y|^2)`: the number of rows, `sum z`, `sum x x^T`, `sum x y^T`, `sum y y^T`,
    `sum r`, `sum r r^T`, `sum z r^T`, the width of `x`, and what was subtracted from `z` first.
    Enough for linear CKA, CCA and least squares of y on x.
    """

    count: int
    total: Float[Tensor, " both"]
    left: Float[Tensor, "left left"]
    cross: Float[Tensor, "left right"]
    right: Float[Tensor, "right right"]
    norms: Float[Tensor, " two"]
    norm_product: Float[Tensor, "two two"]
    weighted: Float[Tensor, "both two"]
    width: int
    shift: Float[Tensor, " both"]

    def plus(self, other: "Moments") -> "Moments":
        """The moments of both sets of rows."""
        names = self._fields[:-2]
        return self._replace(**{n: getattr(self, n) + getattr(other, n) for n in names})

    def side(self, which: int) -> slice:
        """Where `x` (0) or `y` (1) is in `z`."""
        return slice(0, self.width) if which == 0 else slice(self.width, None)

    def product(self, i: int, j: int) -> Float[Tensor, "left right"]:
        """Sum of the products of two sides."""
        if i == j:
            return self.right if i else self.left
        return self.cross.T if i else self.cross

    def covariance(self, i: int, j: int) -> Float[Tensor, "left right"]:
        """Centred second moment between two sides, divided by the number of rows."""
        mean = self.total / self.count
        return self.product(i, j) / self.count - torch.outer(mean[self.side(i)], mean[self.side(j)])


def moments_of(
    x: Float[Tensor, "rows left"],
    y: Float[Tensor, "rows right"],
    shift: tuple[Tensor, Tensor] | None = None,
) -> Moments:
    """The moments of paired rows, less a shift of either side.

    Products are those of the rows' own type, at least float32.

    Example:
        >>> m = moments_of(torch.tensor([[1.0], [3.0]]), torch.tensor([[2.0], [0.0]]))
        >>> m.covariance(0, 1)
        tensor([[-1.]], dtype=torch.float64)
    """
    kind = torch.promote_types(x.dtype, torch.float32)
    start = torch.cat(shift).double() if shift else x.new_zeros(x.shape[1] + y.shape[1]).double()
    less = start.to(kind).split([x.shape[1], y.shape[1]])
    a, b = x.to(kind) - less[0], y.to(kind) - less[1]
    r = torch.stack([a.square().sum(1), b.square().sum(1)], 1)
    return Moments(
        count=len(a),
        total=torch.cat([a.sum(0), b.sum(0)]).double(),
        left=(a.T @ a).double(),
        cross=(a.T @ b).double(),
        right=(b.T @ b).double(),
        norms=r.sum(0).double(),
        norm_product=(r.T @ r).double(),
        weighted=torch.cat([a.T @ r, b.T @ r]).double(),
        width=x.shape[1],
        shift=start,
    )
