"""Weights set to zero and products of low rank: promised counts and bytes, neutral settings."""

import json
from typing import Any

import pytest
import torch
from torch import Tensor

from layerwise.core.chain import nearest, outcome, run_chain, squared_errors, weights_left
from layerwise.core.compact import STORED, from_stored, to_stored
from layerwise.core.errors import LayerwiseError
from layerwise.core.method import Method, methods
from layerwise.core.plan import Step
from layerwise.core.weight import Dense, Quantized, Sparse, Sum, Weight

SPARSE = [m for m in methods("weight") if m.function.__annotations__["return"] is Sparse]
THIN = [m for m in methods("weight") if m.errors and m not in SPARSE]
every_sparse = pytest.mark.parametrize("method", SPARSE, ids=lambda m: m.name)
every_thin = pytest.mark.parametrize("method", THIN, ids=lambda m: m.name)
PATTERNS = {"row": (1, 300), "matrix": (12, 300), "block": (12, 128)}
CHAINS: dict[str, list[Step]] = {
    "sparsegpt": [Step("sparsegpt", {"share": 0.3})],
    "2:4": [Step("wanda", {"pattern": "2:4"})],
    "low rank": [Step("low_rank", {"share": 0.25})],
    "quantized factors": [Step("quantized_factors", {"share": 0.5, "bits": 6})],
    "beside": [Step("gptq", {"bits": 3}), Step("low_rank", {"share": 0.1})],
    "zero points": [Step("rtn", {"bits": 3, "group": 33, "symmetric": False})],
    "rotated": [Step("rotate"), Step("gptq", {"bits": 5, "group": 0}), Step("low_rank")],
    "scaled": [Step("scale_channels"), Step("rtn", {"bits": 2})],
}
every_chain = pytest.mark.parametrize("name", CHAINS)


def problem(rows: int = 12, columns: int = 300) -> tuple[Tensor, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=generator) * 0.1
    sizes = (1.5 * torch.rand(columns, generator=generator)).exp()
    mixing = torch.eye(columns) + torch.randn(columns, columns, generator=generator) / columns**0.5
    x = torch.randn(4 * columns, columns, generator=generator) @ mixing * sizes
    moment = x.T @ x / len(x)
    return weight, {"second_moment": moment, "second_moment_diagonal": moment.diagonal()}


def solve(method: Method, weight: Tensor, stats: dict[str, Tensor], **options: Any) -> Weight:
    return run_chain(weight, stats, [Step(method.name, options)])


def damage(record: Weight, weight: Tensor, stats: dict[str, Tensor]) -> float:
    error = (record.dense().float() - weight.float()).double()
    return ((error @ stats["second_moment"].double()) * error).sum().item()


@every_sparse
@pytest.mark.parametrize("pattern", [*PATTERNS, "2:4", "3:7"])
@pytest.mark.parametrize("share", [0.0, 0.25, 0.3, 0.5, 3 / 7, 1.0])
def test_exactly_so_many_stay(method: Method, pattern: str, share: float) -> None:
    weight, stats = problem()
    if ":" in pattern:
        kept, of = map(int, pattern.split(":"))
        if abs(share - kept / of) > 1e-6:
            with pytest.raises(LayerwiseError, match=f"{method.name}, options 'share'.*{pattern}"):
                solve(method, weight, stats, share=share, pattern=pattern)
            return
        rows, width = 1, of
    else:
        rows, width = PATTERNS[pattern]
    record = solve(method, weight, stats, share=share, pattern=pattern)
    assert isinstance(record, Sparse)
    for top in range(0, 12, rows):
        for start in range(0, 300, width):
            unit = record.mask[top : top + rows, start : start + width]
            assert unit.numel() - unit.sum() == int((1 - share) * unit.numel() + 1e-9)
    chain = [Step(method.name, {"share": share, "pattern": pattern})]
    assert weights_left(chain, (12, 300)) == record.values.numel()
    assert outcome(chain, (12, 300), torch.float32).nbytes == record.nbytes


@every_sparse
def test_all_stay_or_all_go(method: Method) -> None:
    weight, stats = problem()
    assert torch.equal(solve(method, weight, stats, share=1.0).dense(), weight)
    assert not solve(method, weight, stats, share=0.0).dense().any()


@every_sparse
def test_no_worse_than_the_smallest_weights(method: Method) -> None:
    """Less is lost on correlated inputs of different sizes, more the more is known of them."""
    weight, stats = problem()
    found = damage(solve(method, weight, stats, share=0.4), weight, stats)
    plain = damage(run_chain(weight, {}, [Step("magnitude", {"share": 0.4})]), weight, stats)
    assert found <= plain * {"magnitude": 1.0, "wanda": 0.9, "sparsegpt": 0.7}[method.name]


@every_sparse
def test_the_size_of_inputs_does_not_count_and_unused_ones_go_first(method: Method) -> None:
    weight, stats = problem()
    record = solve(method, weight, stats, share=0.4)
    tens = solve(method, weight, {k: 1024 * v for k, v in stats.items()}, share=0.4)
    assert torch.equal(record.dense(), tens.dense())
    stats["second_moment"][[3, 50]] = stats["second_moment"][:, [3, 50]] = 0
    found = solve(method, weight, stats, share=0.4).dense()
    assert found.isfinite().all()
    if method.needs:
        assert not found[:, [3, 50]].any()


@every_sparse
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(12, 300), (1, 1), (5, 1), (3, 129)])
def test_deterministic_at_any_shape(
    method: Method, dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    weight, stats = problem(*shape)
    weight = weight.to(dtype)
    kept = weight.clone()
    first, again = solve(method, weight, stats), solve(method, weight.T.contiguous().T, stats)
    assert first.dense().dtype == dtype and first.dense().shape == shape
    assert torch.equal(first.dense(), again.dense())
    assert torch.equal(weight, kept)


@pytest.mark.parametrize(
    ("options", "words"),
    [({"share": 1.5}, "option 'share'"), ({"pattern": "rows"}, "option 'pattern'")]
    + [({"pattern": text}, "option 'pattern'") for text in ("5:4", "0:0", "2:", "-1:4")],
)
@every_sparse
def test_what_is_out_of_range_is_said(method: Method, options: dict, words: str) -> None:
    with pytest.raises(LayerwiseError, match=f"{method.name}, {words}"):
        solve(method, *problem(), **options)


@every_thin
def test_more_ranks_lose_less(method: Method) -> None:
    weight, stats = problem(40, 60)
    shares = (0.1, 0.3, 0.6, 1.0)
    lost = [damage(solve(method, weight, stats, share=s), weight, stats) for s in shares]
    assert lost == sorted(lost, reverse=True)
    assert lost[-1] < 0.05 * lost[0]
    with pytest.raises(LayerwiseError, match=f"{method.name}, options 'share'"):
        solve(method, weight, stats, share=-0.1)


def test_full_rank_is_the_weight_and_the_metric_helps() -> None:
    weight, stats = problem(40, 60)
    lost = {}
    for metric in ("none", "diag", "full"):
        whole = run_chain(weight, stats, [Step("low_rank", {"share": 1.0, "metric": metric})])
        torch.testing.assert_close(whole.dense(), weight, rtol=0, atol=1e-5)
        part = run_chain(weight, stats, [Step("low_rank", {"share": 0.3, "metric": metric})])
        lost[metric] = damage(part, weight, stats)
    assert lost["full"] < lost["diag"] < lost["none"]
    ranked = run_chain(weight, stats, [Step("low_rank", {"rank": 12})])
    again = run_chain(weight, stats, [Step("low_rank", {"share": 0.3})])
    assert torch.equal(ranked.dense(), again.dense())


def test_a_second_moment_that_is_none_is_refused() -> None:
    weight, stats = problem(40, 60)
    stats["second_moment"][3, 4] = torch.nan
    for name in ("low_rank", "quantized_factors", "sparsegpt"):
        with pytest.raises(LayerwiseError, match="second_moment"):
            run_chain(weight, stats, [Step(name)])


def test_ranks_beside_rounding_make_up_for_it() -> None:
    weight, stats = problem(40, 60)
    rounded = run_chain(weight, stats, [Step("gptq", {"bits": 2})])
    both = run_chain(weight, stats, [Step("gptq", {"bits": 2}), Step("low_rank", {"rank": 4})])
    assert isinstance(both, Sum) and torch.equal(both.a.codes, rounded.codes)
    half = run_chain(weight.bfloat16(), stats, [Step("gptq"), Step("low_rank", {"rank": 4})])
    assert half.b.a.value.dtype == torch.bfloat16
    assert damage(both, weight, stats) < 0.9 * damage(rounded, weight, stats)
    whole = run_chain(weight, stats, [Step("gptq", {"bits": 2}), Step("low_rank", {"share": 1.0})])
    torch.testing.assert_close(whole.dense(), weight, rtol=0, atol=1e-5)


@every_chain
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stored_in_the_bytes_that_were_told(name: str, dtype: torch.dtype) -> None:
    weight, stats = problem()
    record = run_chain(weight.to(dtype), stats, CHAINS[name])
    tree, tensors = to_stored(record)
    assert sum(tensor.nbytes for tensor in tensors.values()) == record.nbytes
    told = outcome(CHAINS[name], (12, 300), dtype)
    assert told.nbytes == record.nbytes
    assert told.kinds <= STORED
    again = from_stored(json.loads(json.dumps(tree)), tensors)
    assert torch.equal(again.dense(), record.dense())
    assert again.nbytes == record.nbytes


@every_chain
def test_errors_are_told_without_statistics(name: str) -> None:
    weight, _ = problem()
    plain = nearest(CHAINS[name])
    wanted = (run_chain(weight, {}, plain).dense() - weight).square().sum().item()
    found = squared_errors(weight, [(), plain, plain])
    assert found == pytest.approx([0.0, wanted, wanted], rel=1e-4)


def test_what_stands_for_a_chain() -> None:
    assert nearest([Step("qep"), Step("gptq", {"bits": 3})]) == (Step("rtn", {"bits": 3}),)
    (other,) = nearest([Step("sparsegpt", {"share": 0.3})])
    assert other == Step("magnitude", {"share": 0.3, "pattern": "block"})
    both = nearest([Step("gptq", {"bits": 3}), Step("low_rank", {"rank": 2})])
    assert both == (Step("rtn", {"bits": 3}), Step("low_rank", {"rank": 2}))
    assert isinstance(run_chain(torch.eye(8), {}, both).a, Quantized)
    assert isinstance(run_chain(torch.eye(8), {}, ()), Dense)
