"""Chains of weight methods: run on a matrix, and what they leave of it, told beforehand."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from functools import lru_cache
from typing import Any, NamedTuple, get_args, get_type_hints

import msgspec
import torch
from torch import Tensor

from layerwise.core.frame import innermost, put_inside, seen_inside
from layerwise.core.method import find
from layerwise.core.plan import Step
from layerwise.core.weight import Dense, Frame, Quantized, Sparse, Weight

#: what leaves such a record without statistics
_PLAIN = {Quantized: "rtn", Sparse: "magnitude"}


def run_chain(weight: Any, stats: Mapping[str, Any], chain: Sequence[Step]) -> Weight:
    """Apply the methods of a chain one after another; each sees the dense form of the last.

    Inside the frames that earlier steps have put around it. What asks for them is given the record
    of the step `before`, and the `target`: the last matrix of the chain that was not rounded.
    """
    record: Weight = Dense(weight)
    target = weight
    for step in chain:
        found, held = find(step.method, "weight"), innermost(record)
        target = held.value if isinstance(held, Dense) else target
        edit = found.bind(step.options, before=held, target=target)
        record = put_inside(record, edit(held.dense(), seen_inside(record, stats)))
        renamed = {new: stats[old] for new, old in found.gives.items() if old in stats}
        stats = {**stats, **renamed}
    return record


def kind_left(step: Step) -> Any:
    """The kind of record that a step says it leaves."""
    return get_type_hints(find(step.method, "weight").function)["return"]


def made_by(chain: Sequence[Step]) -> Step | None:
    """The step that decides how a matrix is stored: the last that does not keep what it got."""
    return next((step for step in reversed(chain) if kind_left(step) is not Weight), None)


def goes_by_rows(chain: Sequence[Step]) -> bool:
    """Whether a chain makes of every row of a matrix what it makes of that row alone."""
    return all(find(step.method, "weight").by_rows for step in chain)


def framed(chain: Sequence[Step]) -> bool:
    """Whether a chain puts a frame around what is stored."""
    return any(kind_left(step) in get_args(Frame) for step in chain)


def nearest(chain: Sequence[Step]) -> tuple[Step, ...]:
    """A chain without what needs statistics: how far off it is says how coarse the record is.

    Integers are rounded to nearest, whatever comes before them; the smallest weights go.
    """
    if chain and kind_left(chain[-1]) is Quantized:
        return (_plain(chain[-1]),)
    return tuple(_plain(step) for step in chain)


def _plain(step: Step) -> Step:
    kind = kind_left(step)
    if kind not in _PLAIN:
        return step
    other, options = find(_PLAIN[kind], "weight"), step.options
    if kind is Sparse:  # where methods differ in their default pattern, counts differ
        options = find(step.method, "weight").values(options)
    return Step(other.name, {k: v for k, v in options.items() if k in other.options})


class Outcome(NamedTuple):
    """What a chain leaves of a matrix: its bytes, the weights that may differ from 0, and the kinds
    of its records."""

    nbytes: int
    weights: int
    kinds: frozenset[str]


def weights_left(chain: Sequence[Step], shape: tuple[int, int]) -> int:
    """How many weights of a matrix may differ from 0 after a chain."""
    if not chain or kind_left(chain[-1]) is not Sparse:
        return shape[0] * shape[1]
    return outcome(chain, shape, torch.float32).weights


def outcome(chain: Sequence[Step], shape: tuple[int, int], dtype: torch.dtype) -> Outcome:
    """What a chain leaves of a matrix of some shape, whatever its values.

    Raises:
        LayerwiseError: a method refuses its options.

    Example:
        >>> import layerwise.families
        >>> outcome([Step("magnitude", {"share": 0.25})], (8, 16), torch.bfloat16)
        Outcome(nbytes=80, weights=32, kinds=frozenset({'Sparse'}))
    """
    return _outcome(msgspec.json.encode(tuple(chain)), shape, dtype)


@lru_cache(4096)
def _outcome(text: bytes, shape: tuple[int, int], dtype: torch.dtype) -> Outcome:
    chain = msgspec.json.decode(text, type=tuple[Step, ...])
    record = run_chain(torch.zeros(shape, dtype=dtype), {}, [_plain(step) for step in chain])
    weights = record.values.numel() if isinstance(record, Sparse) else shape[0] * shape[1]
    return Outcome(record.nbytes, weights, _kinds(record))


def _kinds(record: Weight) -> frozenset[str]:
    inside = (getattr(record, field.name) for field in fields(record))
    found = [_kinds(value) for value in inside if isinstance(value, Weight)]
    return frozenset({type(record).__name__}).union(*found)


def squared_errors(weight: Tensor, chains: Sequence[Sequence[Step]]) -> list[float]:
    """`||W - Q||^2` under several chains without statistics.

    A method that can tell the errors of many settings at once is asked once.
    """
    found: dict[int, float] = {i: 0.0 for i, chain in enumerate(chains) if not chain}
    asked: dict[str, list[int]] = {}
    for number, chain in enumerate(chains):
        if len(chain) == 1 and find(chain[0].method, "weight").errors is not None:
            asked.setdefault(chain[0].method, []).append(number)
    for name, numbers in asked.items():
        method = find(name, "weight")
        assert method.errors is not None
        settings = [method.values(chains[i][0].options) for i in numbers]
        found |= zip(numbers, method.errors(weight, settings), strict=True)
    for number, chain in enumerate(chains):
        if number not in found:
            error = run_chain(weight, {}, chain).dense().float() - weight.float()
            found[number] = error.square().sum().item()
    return [found[number] for number in range(len(chains))]
