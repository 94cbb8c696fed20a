"""The types that say what a network is: matrices in parts, parts in layers, layers in stacks."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Matrix:
    """A parameter, or one expert's slice of one, seen as `[out, in]`.

    Experts of a parameter lie along an axis of their own, or one below the other in its rows.

    `inputs` names the set of matrices that receive the same memory (they share statistics);
    `fusion` the set that receives the very same tensor in one module (they share one option).
    `apart` counts the modules of its own in which a checkpoint stores an expert's matrix, where
    the model holds all experts in one parameter; otherwise it is 0.
    """

    layer: str
    part: str
    role: str
    parameter: str
    expert: int | None
    shape: tuple[int, int]
    transposed: bool
    inputs: str
    fusion: str
    apart: int = 0

    @property
    def key(self) -> str:
        """Selector of this matrix alone: `decoder/3/mlp.down`."""
        expert = "" if self.expert is None else f"[{self.expert}]"
        return f"{self.layer}/{self.part}.{self.role}{expert}"

    @property
    def size(self) -> int:
        """Number of weights."""
        return self.shape[0] * self.shape[1]

    def view(self, parameter: Tensor) -> Tensor:
        """This matrix as `[out, in]`, out of its parameter."""
        slice_ = parameter
        if self.expert is not None:
            stacked = parameter.ndim > 2
            each = parameter if stacked else parameter.unflatten(0, (-1, self.rows(parameter)))
            slice_ = each[self.expert]
        slice_ = slice_.reshape(slice_.shape[0], -1) if slice_.ndim > 2 else slice_
        return slice_.T if self.transposed else slice_

    def rows(self, parameter: Tensor) -> int:
        """Rows of a parameter `[rows, columns]` that hold one expert."""
        return self.size // parameter.shape[1]

    def put(self, value: Tensor, parameter: Tensor, room: Tensor | None = None) -> Tensor:
        """The parameter with this matrix replaced: the value itself, or in `room` or new memory."""
        whole = self.size == parameter.numel() and not self.transposed
        if whole and (value.dtype, value.device) == (parameter.dtype, parameter.device):
            return value.reshape(parameter.shape).contiguous()
        if room is None:
            room = torch.empty_like(parameter.detach(), memory_format=torch.contiguous_format)
            if self.size < parameter.numel():
                room.copy_(parameter.detach())
        target = self.view(room)
        target.copy_(value.reshape(target.shape))
        return room


class Part(NamedTuple):
    """One residual branch of a layer: whether it mixes positions, and its modules' paths."""

    name: str
    mixes: bool
    modules: tuple[str, ...]


@dataclass(frozen=True)
class Layer:
    """One link of a stack; one that keeps the shape of its input can be left out.

    `alone` tells whether it returns its hidden state and nothing beside it.
    """

    stack: str
    index: int
    path: str
    module: nn.Module
    parts: tuple[Part, ...]
    matrices: tuple[Matrix, ...]
    keeps_shape: bool = True
    alone: bool = True

    @property
    def key(self) -> str:
        """Selector of this layer: `decoder/3`."""
        return f"{self.stack}/{self.index}"

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """The shapes of its parameters by name: layers of one kind have the same."""
        return {name: p.shape for name, p in self.module.named_parameters()}


class Group(NamedTuple):
    """A fusion group: the matrices that share one option of a plan."""

    key: str
    matrices: tuple[Matrix, ...]

    @property
    def size(self) -> int:
        """Number of weights of all of them."""
        return sum(m.size for m in self.matrices)


class LowRank(NamedTuple):
    """What brings a shared layer closer to layer `of`: its vectors, and products of a `rank`."""

    of: int
    rank: int


@dataclass(frozen=True)
class Visit:
    """One step of the execution order.

    A repeated layer shares its weights unless `copy`; `parts` leaves branches out; an `adapter`
    makes a visit of a shared layer differ: it is computed, or has a name in a `compact` folder;
    visits of one `parallel` number read the same input. With `mix` its weights are a sum over
    layers of the stack, each times its share.
    """

    layer: int
    copy: bool = False
    parts: tuple[str, ...] | None = None
    adapter: LowRank | str | None = None
    parallel: int | None = None
    mix: tuple[tuple[int, float], ...] | None = None


Wiring = tuple[Visit, ...]


@dataclass(frozen=True)
class Stack:
    """Ordered layers, and the order in which they run."""

    name: str
    container: str
    layers: tuple[Layer, ...]
    wiring: Wiring

    def matrices(self) -> Iterator[Matrix]:
        """All matrices, in network order."""
        for layer in self.layers:
            yield from layer.matrices

    def groups(self) -> list[Group]:
        """All fusion groups, in network order."""
        found: dict[str, list[Matrix]] = {}
        for matrix in self.matrices():
            found.setdefault(matrix.fusion, []).append(matrix)
        return [Group(key, tuple(members)) for key, members in found.items()]

    def rewired(self, wiring: Wiring) -> "Stack":
        """The same layers in another order."""
        return replace(self, wiring=wiring)


def plain_wiring(count: int) -> Wiring:
    """Every layer once, in order."""
    return tuple(Visit(i) for i in range(count))
