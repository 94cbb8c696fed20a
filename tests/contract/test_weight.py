"""Every edit of a matrix: promised bytes, its neutral setting, and no worse than rounding."""

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from layerwise.core.errors import LayerwiseError
from layerwise.core.method import Method, find, methods
from layerwise.core.plan import Step
from layerwise.core.stack import Matrix
from layerwise.core.weight import Dense, Quantized
from layerwise.export import TARGETS
from layerwise.export.compressed_tensors import pack

#: those that leave integers; `test_chain.py` has what holds for every edit of a matrix
INTEGERS = [m for m in methods("weight") if m.function.__annotations__["return"] is Quantized]
every_method = pytest.mark.parametrize("method", INTEGERS, ids=lambda m: m.name)
SWITCHES = ("symmetric", "order", "shrink")
GROUPS = (0, 32, 33, 128)


def with_switches(family: list[Method]) -> list[Any]:
    """Every method with every setting of the switches that it has."""
    rows = []
    for method in family:
        own = [name for name in SWITCHES if name in method.options]
        for values in product((False, True), repeat=len(own)):
            chosen = dict(zip(own, values, strict=True))
            label = "-".join(name for name, value in chosen.items() if value) or "plain"
            rows.append(pytest.param(method, chosen, id=f"{method.name}-{label}"))
    return rows


every_setting = pytest.mark.parametrize(("method", "chosen"), with_switches(INTEGERS))


def problem(rows: int = 12, columns: int = 100, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A matrix and the second moment of correlated inputs of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) * 0.1
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5
    sizes = (1.5 * torch.rand(columns, generator=generator)).exp()
    x = torch.randn(4 * columns, columns, generator=generator) @ (mixing + torch.eye(columns))
    x = x * sizes
    return weight, x.T @ x / len(x)


def solve(
    method: Method, weight: Tensor, moment: Tensor | None = None, **options: Any
) -> Quantized:
    stats = {} if moment is None else {"second_moment": moment}
    if "steps" in method.options:
        options.setdefault("steps", 20)  # of many; what holds does not depend on it
    return method.bind(options, before=Dense(weight), target=weight)(weight, stats)


def damage(record: Quantized, weight: Tensor, moment: Tensor) -> float:
    error = (record.dense() - weight.float()).double()
    return (error @ moment.double() * error).sum().item()


def differing(one: Quantized, other: Quantized) -> float:
    return (one.codes != other.codes).double().mean().item()


def on_grid(group: int = 25, step: float = 2.0**-6) -> Tensor:
    """Weights that 8 bits hold exactly: every group has both ends of its grid."""
    generator = torch.Generator().manual_seed(3)
    codes = torch.randint(-128, 128, (12, 100 // group, group), generator=generator)
    codes[..., 0], codes[..., 1] = -128, 127
    zeros = torch.randint(-128, 128, (12, 100 // group, 1), generator=generator)
    return ((codes - zeros) * step).reshape(12, 100)


@every_setting
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("bits", range(2, 9))
def test_shape_bytes_and_not_worse_than_rounding(
    method: Method, chosen: dict[str, bool], bits: int, group: int
) -> None:
    weight, moment = problem()
    record = solve(method, weight, moment, bits=bits, group=group, **chosen)
    assert record.dense().shape == weight.shape
    assert record.codes.min().item() >= -(2 ** (bits - 1))
    assert record.codes.max().item() < 2 ** (bits - 1)
    assert (record.zero is None) == chosen.get("symmetric", True)

    stored = sum(tensor.nbytes for tensor in pack(record).values())
    matrix = Matrix("d/0", "mlp", "up", "up.weight", None, (12, 100), False, "", "")
    step = Step(method.name, {"bits": bits, "group": group, **chosen})
    assert stored == record.nbytes + 16 == TARGETS["compressed-tensors"].nbytes(matrix, (step,), 4)

    plain = {k: v for k, v in chosen.items() if k != "order"}
    rounded = solve(find("rtn"), weight, moment, bits=bits, group=group, **plain)
    assert damage(record, weight, moment) <= damage(rounded, weight, moment)
    assert damage(record, weight, moment) < 0.7 * (weight.double() @ moment.double() * weight).sum()


@every_setting
@pytest.mark.parametrize("group", [0, 25, 33])
def test_eight_bits_are_neutral_on_their_own_grid(
    method: Method, chosen: dict[str, bool], group: int
) -> None:
    """Zero points reach every grid; without them one half step is lost at the largest weight."""
    weight, moment = on_grid(100 if group == 0 else 25), problem()[1]
    record = solve(method, weight, moment, bits=8, group=group, **chosen)
    if not chosen.get("symmetric", True) and group != 33:
        assert torch.equal(record.dense(), weight)
    assert torch.equal(
        solve(method, 0 * weight, moment, bits=8, group=group, **chosen).dense(), 0 * weight
    )


@every_setting
def test_only_the_shape_of_the_second_moment_counts(
    method: Method, chosen: dict[str, bool]
) -> None:
    weight, moment = problem()
    moment[[3, 50]] = moment[:, [3, 50]] = 0
    record = solve(method, weight, moment, bits=3, group=33, **chosen)
    for factor in (2.0**-12, 2.0**12):
        assert (
            differing(solve(method, weight, factor * moment, bits=3, group=33, **chosen), record)
            == 0
        )
    # a learned code that stands between two grid points may go either way
    ten = solve(method, weight, 10 * moment, bits=3, group=33, **chosen)
    assert differing(ten, record) < 0.005 or damage(ten, weight, moment) == pytest.approx(
        damage(record, weight, moment), rel=1e-3
    )


@every_setting
def test_inputs_that_are_never_used_do_not_touch_the_others(
    method: Method, chosen: dict[str, bool]
) -> None:
    weight, moment = problem()
    dead = torch.zeros(100, dtype=torch.bool)
    dead[[0, 41, 99]] = True
    weight[:, dead] = 100.0 if "second_moment" in method.needs else 0.0
    moment[dead] = moment[:, dead] = 0
    moment *= 1e-6
    record = solve(method, weight, moment, bits=4, group=0, **chosen)
    alone = solve(method, weight[:, ~dead], moment[~dead][:, ~dead], bits=4, group=0, **chosen)
    assert (record.codes[:, ~dead] != alone.codes).double().mean() < 0.005
    assert (record.dense()[:, dead] == 0).all()
    nothing = solve(method, weight, 0 * moment, bits=4, group=32, **chosen)
    assert nothing.dense().isfinite().all()


@every_setting
@pytest.mark.parametrize("sign", [1, -1])
def test_groups_of_one_sign(method: Method, chosen: dict[str, bool], sign: int) -> None:
    """The grid still holds zero, and reaches the largest weight to half a step."""
    weight, moment = problem()
    weight = sign * (weight.abs() + 0.5)
    record = solve(method, weight, moment, bits=4, group=33, **chosen)
    steps = record.scale.repeat_interleave(33, 1)[:, :100]
    if method.name == "rtn" and not chosen["shrink"]:
        assert ((record.dense() - weight).abs() <= 0.5001 * steps).all()
    assert ((record.dense() * sign) >= 0).all()
    assert damage(record, weight, moment) < 0.05 * damage(solve(method, 0 * weight), weight, moment)


@every_setting
def test_groups_of_one_value(method: Method, chosen: dict[str, bool]) -> None:
    """A group of zeros costs no other group anything; a constant one keeps its value."""
    weight, _ = problem()
    weight[:, 32:64], weight[:, 64:96] = 0, 0.3
    record = solve(method, weight, torch.eye(100), bits=4, group=32, **chosen)
    assert torch.equal(record.dense()[:, 32:64], weight[:, 32:64])
    assert record.dense().isfinite().all()
    if not chosen.get("symmetric", True):
        torch.testing.assert_close(record.dense()[:, 64:96], weight[:, 64:96])


@every_method
@pytest.mark.parametrize(
    ("option", "value"), [("bits", 1), ("bits", 9), ("bits", 0), ("bits", -3), ("group", -1)]
)
def test_values_out_of_range_are_shown(method: Method, option: str, value: int) -> None:
    with pytest.raises(LayerwiseError, match=f"{method.name}.*{option}.*found {value}"):
        solve(method, torch.ones(2, 4), **{option: value})


@pytest.mark.parametrize(
    "method", [m for m in INTEGERS if "second_moment" in m.needs], ids=lambda m: m.name
)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e12])
def test_a_second_moment_that_is_none_is_refused(method: Method, value: float) -> None:
    weight, moment = problem()
    moment[3, 4] = moment[4, 3] = value
    with pytest.raises(LayerwiseError, match=f"{method.name}, second_moment"):
        solve(method, weight, moment)


@every_setting
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_deterministic_and_nothing_is_changed(
    method: Method, chosen: dict[str, bool], dtype: torch.dtype
) -> None:
    weight, moment = problem()
    moment[7] = moment[:, 7] = 0
    weight = weight.to(dtype)
    kept, kept_moment = weight.clone(), moment.clone()
    first = solve(method, weight, moment, bits=3, group=33, **chosen)
    again = solve(method, weight.T.contiguous().T, moment, bits=3, group=33, **chosen)
    assert torch.equal(weight, kept)
    assert torch.equal(moment, kept_moment)
    assert torch.equal(first.codes, again.codes)
    assert torch.equal(first.scale, again.scale)
    assert first.scale.dtype == dtype


@every_method
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (5, 1), (3, 129)])
def test_any_shape(method: Method, shape: tuple[int, int]) -> None:
    weight, moment = problem(*shape)
    for options in ({"group": 0}, {"group": 128}, {"symmetric": False}):
        record = solve(method, weight, moment, bits=8, **options)
        torch.testing.assert_close(record.dense(), weight, rtol=0.02, atol=0.02)


@every_method
def test_without_statistics_it_is_rounding(method: Method) -> None:
    weight, _ = problem()
    own = method.values({}).get("shrink", False)
    assert torch.equal(solve(method, weight).codes, solve(find("rtn"), weight, shrink=own).codes)
