"""Places in a network where a value can be seen and changed, and what to do there."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from layerwise.core.errors import LayerwiseError, nearest
from layerwise.core.network import Network
from layerwise.core.stack import Stack

#: takes what is at a site, hands back what is to be there
Change = Callable[[Tensor], Tensor]
Several = int | range | tuple[int, ...] | None


class At(NamedTuple):
    """A place: layer, what of it, at which positions, of which heads.

    Args:
        layer: its number in the longest stack, negative from the end, or its key `encoder/3`;
            where layers are shared or loop, the number of the step.
        part: `in` and `out`, the residual stream before and after the layer; the name of a part
            (`attention`, `mlp`, `mixer`), what it adds to the stream, after any norm or scale; or
            `part.role` of a matrix (`mlp.down`), what that matrix receives.
        positions: from the start of the sequence, also while generating; negative ones from the
            end of what a forward is given, so -1 is the newest token. None is all.
        heads: slices of what the output projection of the part receives. None is no slicing.

    The value there is `[batch, seq, dim]`; with heads `[batch, seq, head, dim]`. Numbers keep
    their axis: `positions=-1` gives `[batch, 1, dim]`.

    Example:
        >>> At(3, "attention", positions=range(2, 5), heads=0).label
        '3 attention, positions 2-4, head 0'
    """

    layer: int | str
    part: str = "out"
    positions: Several = None
    heads: Several = None

    @property
    def whole(self) -> bool:
        """Whether all positions are meant, and no heads."""
        return self.positions is None and self.heads is None

    @property
    def label(self) -> str:
        """The place in words."""
        where = [] if self.positions is None else [f"positions {_words(self.positions)}"]
        heads = [] if self.heads is None else [f"head {_words(self.heads)}"]
        return ", ".join([f"{self.layer} {self.part}", *where, *heads])


def _words(several: int | range | tuple[int, ...]) -> str:
    if isinstance(several, range) and several.step == 1 and len(several) > 1:
        return f"{several[0]}-{several[-1]}"
    return str(several) if isinstance(several, int) else " ".join(map(str, several))


class Intervention(NamedTuple):
    """What to do with the value at a place; the function must not write into what it is given."""

    at: At
    change: Change


class Runs(NamedTuple):
    """How many times a layer runs: 0 hands its input on, 2 feeds it its own output once more."""

    layer: int | str
    times: int


Edits = Sequence[Intervention | Runs]


def step_of(network: Network, layer: int | str, stack: Stack | None = None) -> tuple[str, int]:
    """Stack and step of a layer, by its number or key.

    Raises:
        LayerwiseError: there is no such layer.
    """
    if isinstance(layer, str):
        keys = {f"{s.name}/{i}": (s.name, i) for s in network.stacks for i in range(len(s.wiring))}
        if layer in keys:
            return keys[layer]
        fix = nearest(layer, keys, "choose one of these")
        raise LayerwiseError("layer of a site", allowed=", ".join(keys), found=layer, fix=fix)
    stack = stack or network.stack
    count = len(stack.wiring)
    if not -count <= layer < count:
        allowed = f"{-count} to {count - 1}, or a key such as {stack.name}/0"
        raise LayerwiseError("layer of a site", allowed=allowed, found=layer, fix="choose another")
    return stack.name, layer % count


def sites(
    network: Network,
    *parts: str,
    positions: Sequence[Several] = (None,),
    heads: Sequence[Several] = (None,),
    stack: str | None = None,
) -> list[At]:
    """The grid layers x parts x positions x heads, the last the fastest.

    Args:
        network: the opened model.
        parts: of `At`; `out` if none is given.
        positions: one site for each; `range(7)` gives a site per position.
        heads: one site for each.
        stack: its name; the longest if None.

    Example:
        >>> import layerwise
        >>> network = layerwise.open("demo")
        >>> len(sites(network, "attention", "mlp", positions=range(5)))
        120
    """
    chosen = next((s for s in network.stacks if s.name == stack), network.stack)
    if stack not in (None, chosen.name):
        allowed = ", ".join(s.name for s in network.stacks)
        raise LayerwiseError("sites, stack", allowed=allowed, found=stack, fix="choose one")
    numbers = range(len(chosen.wiring))
    layers = numbers if chosen is network.stack else [f"{chosen.name}/{i}" for i in numbers]
    return [
        At(layer, part, p, h)
        for layer in layers
        for part in parts or ("out",)
        for p in positions
        for h in heads
    ]


def indices(several: Several, length: int, start: int = 0) -> list[int]:
    """Which of `length` places are meant, the first of them having the number `start`.

    Example:
        >>> indices((0, 6, -1), 3, start=5), indices(range(6, 100), 3, start=5), indices(None, 2)
        ([1, 2], [1, 2], [0, 1])
    """
    if several is None:
        return list(range(length))
    wanted = (several,) if isinstance(several, int) else several
    if isinstance(wanted, range):
        wanted = wanted[: start + length]
    local = (n + length if n < 0 else n - start for n in wanted)
    return [n for n in local if 0 <= n < length]


def changed(
    at: At, value: Tensor, change: Change, start: int = 0, heads: int = 0, own: bool = False
) -> Tensor | None:
    """A value after a change at its positions and heads; None where it has none of them.

    Args:
        at: the place.
        value: `[batch, seq, dim]`; any other shape if neither positions nor heads are chosen.
        change: given `[batch, positions, dim]`, or `[batch, positions, head, dim]`.
        start: the position of the first row.
        heads: how many there are in `dim`.
        own: whether the value may be written into, when positions or heads are chosen.

    Raises:
        LayerwiseError: what comes back does not fit what was there.
    """
    if at.whole:
        return _fitting(at, value, change(value))
    if value.ndim != 3:
        found = f"one of the shape {list(value.shape)}"
        allowed = "a value of the shape [batch, seq, dim]"
        fix = "leave positions and heads out"
        raise LayerwiseError(f"site {at.label}", allowed=allowed, found=found, fix=fix)
    rows = torch.tensor(indices(at.positions, value.shape[1], start), device=value.device)
    if not len(rows):
        return None
    key: tuple[Any, ...] = (slice(None), rows)
    if at.heads is not None:
        columns = torch.tensor(indices(at.heads, heads), device=value.device)
        key = (slice(None), rows[:, None], columns)
    folded = value if at.heads is None else value.unflatten(-1, (heads, -1))
    here = folded[key]
    new = change(here)
    if new is here:
        return value
    room = folded if own else folded.clone()
    room[key] = _fitting(at, here, new)
    return room.reshape(value.shape)


def _fitting(at: At, old: Tensor, new: Tensor) -> Tensor:
    try:
        return new if new is old else new.to(old).expand(old.shape)
    except RuntimeError as error:
        raise LayerwiseError(
            f"site {at.label}",
            allowed=f"a value that fits the shape {list(old.shape)}",
            found=list(new.shape),
            fix="choose the positions and heads that the value is for",
        ) from error


@dataclass(frozen=True)
class Cache:
    """What was at some places in a run, and the network's output.

    `stack` is the name and depth of the stack that numbers of layers are about.
    """

    values: Mapping[At, Tensor]
    output: Any
    stack: tuple[str, int]

    def __getitem__(self, at: At) -> Tensor:
        """The value at a place, or out of what is held of more positions or heads there.

        Raises:
            LayerwiseError: it was not captured.
        """
        if at in self.values:
            return self.values[at]
        for known, value in self.values.items():
            if known.part == at.part and self._key(known) == self._key(at):
                found = _out_of(known, value, at)
                if found is not None:
                    return found
        raise LayerwiseError(
            f"cache at {at.label}",
            allowed="; ".join(known.label for known in self.values),
            found="nothing",
            fix="name the site when the cache is made",
        )

    def _key(self, at: At) -> str:
        name, depth = self.stack
        return at.layer if isinstance(at.layer, str) else f"{name}/{at.layer % depth}"

    def __iter__(self) -> Iterator[At]:
        return iter(self.values)

    def __len__(self) -> int:
        return len(self.values)


def _out_of(known: At, value: Tensor, at: At) -> Tensor | None:
    """What is at a place, out of what is held of a layer and part; None if it is not in it."""
    if known.positions not in (None, at.positions):
        return None
    if known.positions != at.positions:
        value = value[:, indices(at.positions, value.shape[1])]
    if known.heads == at.heads:
        return value
    held, wanted = _numbers(known.heads), _numbers(at.heads)
    if not wanted or not set(wanted) <= set(held):
        return None
    return value[:, :, [held.index(head) for head in wanted]]


def _numbers(several: Several) -> tuple[int, ...]:
    if several is None or isinstance(several, int):
        return () if several is None else (several,)
    return tuple(several)
