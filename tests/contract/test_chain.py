"""Chains of edits: neutral settings, exact bytes, frames that undo themselves, never NaN."""

import json
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

import layerwise.families as families
from layerwise.core.chain import goes_by_rows, run_chain
from layerwise.core.errors import LayerwiseError
from layerwise.core.frame import innermost
from layerwise.core.gaussian import gaussian_grid
from layerwise.core.plan import Step
from layerwise.core.weight import Dense, Weight, flatten, some_rows, unflatten

assert families
GPTQ = ("gptq", {"bits": 3, "group": 32})
#: chains that round, by what they are known as
CHAINS: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "rotate, gptq": [("rotate", {}), GPTQ],
    "rsq": [("rotate", {}), ("token_importance", {}), GPTQ],
    "qep, gptq": [("qep", {}), GPTQ],
    "awq": [("scale_channels", {"bits": 3, "group": 32}), ("rtn", {"bits": 3, "group": 32})],
    "gptq, comq": [GPTQ, ("comq", {"bits": 3, "group": 32, "scale_step": True})],
    "gaussian": [("gaussian", {"levels": 8, "group": 32})],
    "gaussian, row": [("gaussian", {"levels": 8, "group": 0})],
    "higgs": [("rotate", {}), ("gaussian", {"levels": 8})],
    "higgs, pairs": [("rotate", {}), ("gaussian", {"levels": 64, "dim": 2})],
    "higgs, refined": [("rotate", {}), ("gaussian", {"levels": 8}), ("refine", {})],
    "higgs, fed back": [("rotate", {}), ("gaussian", {}), ("refine", {"by": "feedback"})],
    "trit planes": [("trit_planes", {"group": 33})],
    "trit planes, refined": [("trit_planes", {"group": 0}), ("refine", {})],
}
every_chain = pytest.mark.parametrize("name", CHAINS)


def steps(name: str) -> list[Step]:
    return [Step(method, options) for method, options in CHAINS[name]]


def solve(name: str, weight: Tensor, stats: Mapping[str, Any] | None = None) -> Weight:
    return run_chain(weight, stats or {}, steps(name))


def problem(rows: int = 12, columns: int = 100) -> tuple[Tensor, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=generator) * 0.1
    sizes = (1.5 * torch.rand(columns, generator=generator)).exp()
    mixing = torch.eye(columns) + torch.randn(columns, columns, generator=generator) / columns**0.5
    x = torch.randn(4 * columns, columns, generator=generator) @ mixing * sizes
    clean = x + 0.05 * torch.randn(x.shape, generator=generator) * sizes
    tokens = torch.rand(len(x), 1, generator=generator)
    stats = {
        "second_moment": x.T @ x / len(x),
        "attended_moment": (x * tokens).T @ x / len(x),
        "cross_moment": (clean - x).T @ x / len(x),
    }
    return weight, stats


def damage(record: Weight, weight: Tensor, moment: Tensor) -> float:
    error = record.dense().double() - weight.double()
    return ((error @ moment.double()) * error).sum().item()


@every_chain
def test_better_than_two_bits_and_kept_apart_and_together(name: str) -> None:
    weight, stats = problem()
    record = solve(name, weight, stats)
    assert record.dense().shape == weight.shape
    coarse = run_chain(weight, {}, [Step("rtn", {"bits": 2, "group": 32})])
    moment = stats["second_moment"]
    assert damage(record, weight, moment) < damage(coarse, weight, moment)
    tree, tensors = flatten(record)
    again = unflatten(json.loads(json.dumps(tree)), tensors)
    assert torch.equal(again.dense(), record.dense())
    assert again.nbytes == record.nbytes
    assert record.nbytes < weight.nbytes / 4


@pytest.mark.parametrize("name", [n for n in CHAINS if goes_by_rows(steps(n))])
def test_rows_are_solved_alike_with_others_around_them(name: str) -> None:
    weight, stats = problem()
    together, alone = solve(name, weight, stats), solve(name, weight[4:], stats)
    moment, rows = stats["second_moment"], slice(4, len(weight))
    some = some_rows(together, rows)
    assert torch.equal(some.dense(), together.dense()[rows])
    lost = [damage(record, weight[rows], moment) for record in (some, alone)]
    assert lost[0] == pytest.approx(lost[1], rel=0.01)


@every_chain
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_deterministic_and_nothing_is_changed(name: str, dtype: torch.dtype) -> None:
    weight, stats = problem()
    weight = weight.to(dtype)
    kept, before = weight.clone(), {k: v.clone() for k, v in stats.items()}
    first, again = solve(name, weight, stats), solve(name, weight.T.contiguous().T, stats)
    assert torch.equal(first.dense(), again.dense())
    assert torch.equal(weight, kept)
    assert all(torch.equal(stats[k], v) for k, v in before.items())


@every_chain
def test_only_the_shape_of_the_moments_counts(name: str) -> None:
    weight, stats = problem()
    record = innermost(solve(name, weight, stats))
    tens = innermost(solve(name, weight, {k: 1024 * v for k, v in stats.items()}))
    assert torch.equal(record.dense(), tens.dense())
    # codes that stand between two grid points may go either way, and those behind them with them
    ten = solve(name, weight, {k: 10 * v for k, v in stats.items()})
    close = innermost(ten).dense().isclose(record.dense(), rtol=1e-4, atol=1e-6)
    moment, plain = stats["second_moment"], solve(name, weight, stats)
    assert close.double().mean() > 0.99 or damage(ten, weight, moment) == pytest.approx(
        damage(plain, weight, moment), rel=0.02
    )


@every_chain
def test_groups_of_zeros_of_one_value_and_of_one_sign(name: str) -> None:
    weight, stats = problem()
    moment = stats["second_moment"]
    for edited in (0 * weight, 0 * weight + 0.3, weight.abs() + 0.5, -weight.abs() - 0.5):
        record = solve(name, edited, stats)
        assert record.dense().isfinite().all()
        assert damage(record, edited, moment) <= 0.1 * damage(Dense(0 * edited), edited, moment)
    some = weight.clone()
    some[3], some[:, 64:96] = 0, 0
    assert solve(name, some, stats).dense()[3].abs().max() == 0


@every_chain
def test_inputs_that_are_never_used_change_nothing(name: str) -> None:
    weight, stats = problem()
    for moment in stats.values():
        moment[[3, 50]] = 0
        moment[:, [3, 50]] = 0
    first = solve(name, weight, stats).dense()
    assert first.isfinite().all()
    assert solve(name, weight, {k: 0 * v for k, v in stats.items()}).dense().isfinite().all()
    if name in ("qep, gptq", "gptq, comq"):
        weight[:, [3, 50]] = 100.0
        used = torch.ones(100, dtype=torch.bool)
        used[[3, 50]] = False
        assert torch.equal(solve(name, weight, stats).dense()[:, used], first[:, used])


@every_chain
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (5, 1), (3, 129)])
def test_any_shape(name: str, shape: tuple[int, int]) -> None:
    weight, stats = problem(*shape)
    record = solve(name, weight, stats)
    assert record.dense().shape == shape
    assert record.dense().isfinite().all()
    assert solve(name, weight).dense().isfinite().all()


@pytest.mark.parametrize(
    "neutral",
    [
        ("qep", {"alpha": 0.0}),
        ("rotate", {"block": 1, "seed": -1}),
        ("scale_channels", {"points": 1}),
    ],
    ids=lambda step: step[0],
)
def test_neutral_settings_are_bit_equal_to_the_base(neutral: tuple[str, dict[str, Any]]) -> None:
    weight, stats = problem()
    base = run_chain(weight, stats, [Step(*GPTQ)])
    found = run_chain(weight, stats, [Step(*neutral), Step(*GPTQ)])
    assert torch.equal(innermost(found).codes, base.codes)
    assert torch.equal(found.dense(), base.dense())
    alone = run_chain(weight, stats, [Step(*neutral)])
    assert torch.equal(alone.dense(), weight)


def test_equal_token_weights_are_bit_equal_to_the_base() -> None:
    weight, stats = problem()
    stats["attended_moment"] = stats["second_moment"]
    base = run_chain(weight, stats, [Step(*GPTQ)])
    found = run_chain(weight, stats, [Step("token_importance"), Step(*GPTQ)])
    assert torch.equal(found.codes, base.codes)


def test_refining_never_makes_it_worse() -> None:
    weight, stats = problem()
    moment = stats["second_moment"]
    grids = [("gaussian", {"levels": 8}), ("trit_planes", {}), ("rtn", {"bits": 2})]
    for first in grids:
        start = run_chain(weight, stats, [Step(*first)])
        for by in ("descent", "feedback"):
            better = run_chain(weight, stats, [Step(*first), Step("refine", {"by": by})])
            assert damage(better, weight, moment) < damage(start, weight, moment)
            assert better.nbytes == start.nbytes
        none = run_chain(weight, stats, [Step(*first), Step("refine", {"sweeps": 0})])
        assert torch.equal(none.dense(), start.dense())


def test_exact_bytes() -> None:
    weight = torch.ones(4, 200, dtype=torch.bfloat16)
    trits = run_chain(weight, {}, [Step("trit_planes", {"group": 128})])
    assert trits.nbytes == 2 * (4 * 40 + 4 * 2 * 2)
    single = run_chain(weight, {}, [Step("gaussian", {"levels": 8, "group": 128})])
    assert single.nbytes == 4 * 4 * 19 + 4 * 2 * 2  # 600 bits in 19 words
    pairs = run_chain(weight, {}, [Step("gaussian", {"levels": 64, "dim": 2, "group": 0})])
    assert pairs.nbytes == 4 * 4 * 19 + 4 * 2
    turned = run_chain(weight, {}, [Step("rotate"), Step("rtn", {"bits": 4, "group": 0})])
    assert turned.nbytes == 4 * 100 + 4 * 2 + 25
    scaled = run_chain(weight, {}, [Step("scale_channels"), Step("rtn", {"bits": 4, "group": 0})])
    assert scaled.nbytes == 4 * 100 + 4 * 2 + 400


def test_scaling_is_never_worse_than_rounding_alone() -> None:
    weight, stats = problem()
    moment = stats["second_moment"]
    rounded = run_chain(weight, stats, [Step("rtn", {"bits": 3, "group": 32})])
    assert damage(solve("awq", weight, stats), weight, moment) < 0.95 * damage(
        rounded, weight, moment
    )


def test_what_does_not_fit_is_said() -> None:
    weight, stats = problem()
    for steps, words in (
        ([("refine", {})], "refine, the step before it: .* found Dense"),
        ([("rtn", {"bits": 3}), ("comq", {"bits": 4})], "comq, options 'bits'"),
        ([("gaussian", {"levels": 3, "dim": 2})], "gaussian grid"),
        ([("gaussian", {"levels": 300})], "gaussian grid"),
        ([("rotate", {"block": 0})], "rotate, option 'block'"),
        ([("trit_planes", {"rounds": 0})], "trit_planes"),
        ([("qep", {"damping": -1.0})], "qep, option 'damping'"),
    ):
        with pytest.raises(LayerwiseError, match=words):
            run_chain(weight, stats, [Step(*step) for step in steps])
    stats["cross_moment"][0, 0] = torch.nan
    with pytest.raises(LayerwiseError, match="qep, second_moment and cross_moment"):
        solve("qep, gptq", weight, stats)


@pytest.mark.parametrize(
    ("levels", "dim", "error"),
    [(4, 1, 0.11748), (8, 1, 0.034548), (16, 1, 0.009501), (16, 2, None), (64, 2, None)],
)
def test_gaussian_grids(levels: int, dim: int, error: float | None) -> None:
    """Their error, as given and on samples; in a plane it is smaller at the same bits."""
    grid = gaussian_grid(levels, dim)
    assert grid.points.shape == (levels, dim)
    if error is not None:
        assert grid.error == pytest.approx(error, rel=1e-3)
    else:
        assert grid.error < gaussian_grid(round(levels ** (1 / dim))).error
    x = torch.randn(60000, dim, generator=torch.Generator().manual_seed(0))
    found = torch.cdist(x, grid.points).amin(1).square().mean() / dim
    assert found.item() == pytest.approx(grid.error, rel=0.03)
