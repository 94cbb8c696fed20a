"""The few tokens of a verification, by the ways that are faster on a processor."""

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import accumulate, pairwise, product

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from layerwise.run.kernels import ENOUGH

#: rows at which products are timed; what is found holds down to the next smaller size
SIZES = (1, 2, 4, 8)
#: how often each is timed, and bytes of weights that are read for it: more than caches hold
REPEATS, BYTES = 5, 1 << 27

#: asks stock attention to read keys that heads share where they are, instead of repeating them
IN_PLACE = "TRANSFORMERS_SDPA_FORCE_GQA"

#: shape and type of a weight
Kind = tuple[torch.Size, torch.dtype]


def product_of_few(x: Float[Tensor, "*rows in"], weight: Float[Tensor, "out in"]) -> Tensor:
    """`x W^T` as `(W x^T)^T`, for which the library may have a better kernel.

    Args:
        x: a few rows.
        weight: of a linear module.

    Returns:
        `[*rows, out]`, in new memory.

    Example:
        >>> x, weight = torch.ones(2, 3), torch.arange(6.0).reshape(2, 3)
        >>> product_of_few(x, weight).tolist()
        [[3.0, 12.0], [3.0, 12.0]]
    """
    flat = x.reshape(-1, x.shape[-1])  # [rows, in]
    return torch.mm(weight, flat.T).T.contiguous().view(*x.shape[:-1], -1)


def faster_rows(modules: Sequence[nn.Linear]) -> dict[Kind, frozenset[int]]:
    """For which numbers of rows `product_of_few` is faster here, for modules of every kind.

    All are timed one after the other, as a forward runs them, so that weights come from as far.
    """
    found: dict[Kind, frozenset[int]] = {kind_of(module): frozenset() for module in modules}
    some, ways = _some(modules), (product_of_few, F.linear)
    with torch.inference_mode():
        for below, rows in pairwise(SIZES):
            times = {(kind, way): [0.0] * (REPEATS + 1) for kind in found for way in ways}
            inputs = {m: torch.randn(rows, m.in_features).to(m.weight) for m in some}
            for repeat, way in product(range(REPEATS + 1), ways):
                for module in some:
                    began = time.perf_counter()
                    way(inputs[module], module.weight)
                    times[kind_of(module), way][repeat] += time.perf_counter() - began
            for kind in found:
                few, stock = (min(times[kind, way][1:]) for way in ways)  # others only add to them
                if few < ENOUGH * stock:
                    found[kind] |= {*range(below + 1, rows + 1)}
    return found


def kind_of(module: nn.Linear) -> Kind:
    """What modules share whose products take as long."""
    return module.weight.shape, module.weight.dtype


def _some(modules: Sequence[nn.Linear]) -> list[nn.Linear]:
    """The first modules, as many as hold `BYTES`, and the first one of every kind."""
    behind = accumulate((m.weight.nbytes for m in modules), initial=0)
    first = {kind_of(m): m for m in reversed(modules)}
    return [
        module
        for module, before in zip(modules, behind, strict=False)
        if before < BYTES or first[kind_of(module)] is module
    ]


@contextmanager
def few_rows(network: nn.Module) -> Iterator[int]:
    """A block in which linear modules compute two to eight rows by the product that is faster.

    Every shape is timed once, when the block begins. A single row is left to the module's own
    forward, so that plain decoding stays what it is; as are more rows, gradients, other devices
    than the processor, and what is watched while it runs. Stock attention repeats the whole cache
    of keys and values that heads share as soon as there is a mask, as in every verification; here
    they are read in place. Numbers differ by rounding.

    Args:
        network: a resident model; modules that run something else already are left alone.

    Yields:
        How many modules compute so.

    Example:
        >>> module = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        >>> with few_rows(module) as count:
        ...     count <= 1
        True
    """
    modules = [m for m in network.modules() if type(m) is nn.Linear and "forward" not in vars(m)]
    modules = [m for m in modules if m.weight.device.type == "cpu"]
    rows = faster_rows(modules)
    changed = [m for m in modules if rows[kind_of(m)]]
    asked = os.environ.get(IN_PLACE)
    try:
        for module in changed:
            vars(module)["forward"] = partial(_forward, module, rows[kind_of(module)])
        os.environ |= {IN_PLACE: "1"} if modules else {}
        yield len(changed)
    finally:
        for module in changed:
            vars(module).pop("forward")
        if asked is None:
            os.environ.pop(IN_PLACE, None)
        else:
            os.environ[IN_PLACE] = asked


def _forward(module: nn.Linear, rows: frozenset[int], x: Tensor) -> Tensor:
    watched = torch.is_grad_enabled() or torch._C._len_torch_function_stack()
    if x.shape[:-1].numel() not in rows or watched:
        return nn.Linear.forward(module, x)
    found = product_of_few(x, module.weight)
    return found if module.bias is None else found.add_(module.bias)
