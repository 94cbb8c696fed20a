"""Records of weights: what they stand for, what they cost, and apart and together again."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from layerwise.core.weight import (
    Dense,
    Gather,
    Product,
    Quantized,
    Sparse,
    Sum,
    Weight,
    flatten,
    packed_bytes,
    unflatten,
)

SIZE = 6  # square, so that any record can stand in any other


def values(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def quantized(seed: int, zero: bool, group: int) -> Quantized:
    generator = torch.Generator().manual_seed(seed)
    groups = -(-SIZE // group) if group else 1
    codes = torch.randint(-8, 8, (SIZE, SIZE), generator=generator).to(torch.int8)
    zeros = torch.randint(-8, 8, (SIZE, groups), generator=generator).to(torch.int8)
    return Quantized(codes, values(seed, SIZE, groups), zeros if zero else None, 4, group)


def sparse(seed: int) -> Sparse:
    mask = values(seed, SIZE, SIZE) > 0
    return Sparse(values(seed, int(mask.sum())), mask)


seeds = st.integers(0, 9)
leaves = (
    st.builds(lambda s: Dense(values(s, SIZE, SIZE)), seeds)
    | st.builds(lambda s: Dense(values(s, SIZE, SIZE).bfloat16().float()), seeds)
    | st.builds(quantized, seeds, st.booleans(), st.sampled_from([0, 2, 4]))
    | st.builds(sparse, seeds)
)
records = st.recursive(
    leaves,
    lambda inner: (
        st.builds(Product, inner, inner)
        | st.builds(Sum, inner, inner)
        | st.builds(lambda r, s: Gather(r, values(s, SIZE).argsort()), inner, seeds)
    ),
    max_leaves=5,
)


def same(one: Weight, other: Weight) -> bool:
    """Equal kinds, fields and tensors, bit for bit."""
    if type(one) is not type(other):
        return False
    for name, mine in vars(one).items():
        yours = vars(other)[name]
        if isinstance(mine, Tensor):
            equal = mine.dtype == yours.dtype and torch.equal(mine, yours)
        else:
            equal = same(mine, yours) if isinstance(mine, Weight) else mine == yours
        if not equal:
            return False
    return True


@given(record=records)
def test_apart_and_together_again(record: Weight) -> None:
    tree, tensors = flatten(record, "x:")
    assert all(name.startswith("x:") for name in tensors)
    again = unflatten(json.loads(json.dumps(tree)), tensors)
    assert same(again, record)
    assert torch.equal(again.dense(), record.dense())
    assert again.nbytes == record.nbytes


def test_quantized_with_a_short_last_group() -> None:
    codes = torch.tensor([[-2, -1, 0, 1, 1]], dtype=torch.int8)
    scale, zero = torch.tensor([[1.0, 10.0, 0.5]]), torch.tensor([[0, -1, 1]], dtype=torch.int8)
    assert Quantized(codes, scale, None, 2, 2).dense().tolist() == [[-2, -1, 0, 10, 0.5]]
    assert Quantized(codes, scale, zero, 2, 2).dense().tolist() == [[-2, -1, 10, 20, 0]]
    assert Quantized(codes, scale[:, :1], None, 2, 0).dense().tolist() == [[-2, -1, 0, 1, 1]]


def test_the_product_is_formed_in_float32() -> None:
    """A reader that multiplies in bfloat16 gets our value rounded to it."""
    codes = torch.tensor([[127, -77]], dtype=torch.int8)
    scale = torch.tensor([[0.013]], dtype=torch.bfloat16)
    dense = Quantized(codes, scale, None, 8, 0).dense()
    assert dense.dtype == torch.float32
    assert torch.equal(dense.bfloat16(), codes.bfloat16() * scale)


def test_the_others_stand_for() -> None:
    a, b = values(1, 3, 4), values(2, 4, 5)
    assert torch.equal(Product(Dense(a), Dense(b)).dense(), a @ b)
    assert torch.equal(Sum(Dense(a), Dense(2 * a)).dense(), 3 * a)
    order = torch.tensor([2, 0, 3, 1])
    assert torch.equal(Gather(Dense(a), order).dense(), a[:, order])
    mask = torch.tensor([[True, False], [False, True]])
    assert Sparse(torch.tensor([5.0, 7.0]), mask).dense().tolist() == [[5, 0], [0, 7]]


def test_bytes() -> None:
    dense, mask = Dense(values(0, 3, 5)), torch.ones(3, 5, dtype=torch.bool)
    assert dense.nbytes == 60
    assert Sparse(values(0, 15), mask).nbytes == 60 + 2
    assert Sum(dense, dense).nbytes == Product(dense, dense).nbytes == 120
    assert Gather(dense, torch.arange(5)).nbytes == 60 + 40


@pytest.mark.parametrize(
    ("bits", "group", "zero", "scale", "expected"),
    [
        (4, 0, False, torch.float32, 10 * 4 * 4 + 10 * 4),
        (3, 0, False, torch.bfloat16, 10 * 4 * 3 + 10 * 2),
        (3, 8, False, torch.bfloat16, 10 * 4 * 3 + 10 * 4 * 2),
        (3, 8, True, torch.float16, 10 * 4 * 3 + 10 * 4 * 2 + 4 * 4 * 1),
        (8, 30, True, torch.float32, 10 * 4 * 8 + 10 * 4 + 4 * 3),
    ],
)
def test_packed_bytes(bits: int, group: int, zero: bool, scale: torch.dtype, expected: int) -> None:
    """Ten rows of thirty columns."""
    assert packed_bytes((10, 30), bits, group, zero, scale) == expected
