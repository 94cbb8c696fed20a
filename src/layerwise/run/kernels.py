"""Linear modules on PyTorch's own CPU kernels for packed integers, where these are faster."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from layerwise.core.weight import Quantized

#: rows of inputs at which a kernel is timed: a token, a short and a long prompt
ROWS = (1, 16, 128)
#: groups of columns that the kernel of 4 bits knows
GROUPS = (32, 64, 128, 256)
#: a kernel has to take at most this share of the dense product's time
ENOUGH = 0.9


class PackedLinear(nn.Module):
    """`x W^T + b` from packed integers for up to `most` rows of `x`, dense for more."""

    def __init__(self, dense: nn.Linear, product: "Product", most: int) -> None:
        super().__init__()
        self.dense, self.product, self.most = dense, product, most

    @property
    def weight(self) -> Tensor:
        """The dense weight, for code that asks for it."""
        return self.dense.weight

    def forward(self, x: Float[Tensor, "*rows in"]) -> Float[Tensor, "*rows out"]:
        """The product, packed or dense."""
        flat = x.reshape(-1, x.shape[-1])
        if len(flat) > self.most or x.dtype != self.dense.weight.dtype or torch.is_grad_enabled():
            return self.dense(x)
        found = self.product(flat).reshape(*x.shape[:-1], -1)
        return found if self.dense.bias is None else found + self.dense.bias


#: rows of inputs -> their products with a packed matrix
Product = Callable[[Tensor], Tensor]


class Quickened(NamedTuple):
    """How many linear modules compute packed now, of how many that are stored packed."""

    count: int
    of: int

    def __str__(self) -> str:
        return f"{self.count} of {self.of} packed matrices compute on packed integers"


def product_of(record: Quantized, dtype: torch.dtype) -> Product | None:
    """The kernel that holds a record exactly: 8 bits a row, or 4 bits with a group it knows.

    None where there is none, and for other inputs than bfloat16, where they are slow.

    Example:
        >>> codes = torch.randint(-8, 8, (16, 64), dtype=torch.int8)
        >>> record = Quantized(codes, torch.ones(16, 2, dtype=torch.bfloat16), None, 4, 32)
        >>> x = torch.ones(1, 64, dtype=torch.bfloat16)
        >>> product = product_of(record, torch.bfloat16)
        >>> bool((product(x) - x @ record.dense().bfloat16().T).abs().max() < 2)
        True
    """
    rows, columns = record.codes.shape
    if dtype != torch.bfloat16 or record.zero is not None or rows % 16:
        return None
    if record.scale.shape[1] == 1 and record.group in (0, columns):
        codes, scale = record.codes.contiguous(), record.scale[:, 0].to(dtype)
        return lambda x: torch._weight_int8pack_mm(x, codes, scale)
    if record.bits <= 4 and record.group in GROUPS and columns % record.group == 0:
        codes = torch._convert_weight_to_int4pack_for_cpu(record.codes.int() + 8, 2)
        scale = record.scale.to(dtype).T  # [groups, out]
        both = torch.stack([scale, torch.zeros_like(scale)], -1).contiguous()
        group = record.group
        return lambda x: torch._weight_int4pack_mm_for_cpu(x, codes, group, both)
    return None


def quicken(network: nn.Module, records: Mapping[str, Quantized]) -> Quickened:
    """Let linear modules compute on packed integers where that is faster on this machine.

    Every kind of matrix (shape, bits, groups) is timed once against its dense product, on 1, 16
    and 128 rows; it is used up to the number of rows at which it is faster. Dense weights stay for
    more rows.

    Args:
        network: a resident model on the CPU; modules of it are replaced.
        records: what its linear modules hold, by their path in it.

    Returns:
        How many were replaced.
    """
    most: dict[tuple[object, ...], int] = {}
    count = 0
    for path, record in records.items():
        dense = network.get_submodule(path)
        if not isinstance(dense, nn.Linear):
            continue
        product = product_of(record, dense.weight.dtype)
        if product is None:
            continue
        kind = (*record.codes.shape, record.bits, record.group, dense.weight.dtype)
        if kind not in most:
            most[kind] = faster_up_to(dense, product)
        if most[kind]:
            network.set_submodule(path, PackedLinear(dense, product, most[kind]))
            count += 1
    return Quickened(count, len(records))


def faster_up_to(dense: nn.Linear, product: Product) -> int:
    """The most rows, of those that are timed, up to which a packed product is faster."""
    best = 0
    with torch.no_grad():
        for rows in ROWS:
            x = torch.randn(rows, dense.in_features).to(dense.weight)
            tasks = (lambda x=x: product(x), lambda x=x: dense(x))
            seconds = [_fastest(task) for task in tasks]
            if seconds[0] > ENOUGH * seconds[1]:
                break
            best = rows
    return best


def _fastest(task: Callable[[], Tensor], repeats: int = 5, calls: int = 5) -> float:
    """Seconds of a call: the median of some repetitions of a few calls, after one of each."""
    task()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        for _ in range(calls):
            task()
        times.append((time.perf_counter() - began) / calls)
    return statistics.median(times)
