"""Linear modules that compute on packed integers."""

from pathlib import Path

import pytest
import torch
from torch import nn

from layerwise.core.method import find
from layerwise.core.weight import Quantized
from layerwise.run import kernels


def packed(bits: int, group: int, dtype: torch.dtype) -> tuple[nn.Sequential, Quantized]:
    """A linear module that holds what its record says."""
    torch.manual_seed(0)
    dense = nn.Linear(256, 64).to(dtype)
    made = find("rtn").bind({"bits": bits, "group": group})(dense.weight.data, {})
    dense.weight.data = made.dense().to(dtype)
    return nn.Sequential(dense), made


@pytest.mark.parametrize(("bits", "group"), [(8, 0), (5, 0), (4, 32), (3, 64), (2, 256)])
def test_packed_products_are_the_dense_ones(
    bits: int, group: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "faster_up_to", lambda dense, product: 4)
    module, record = packed(bits, group, torch.bfloat16)
    few, many = (torch.randn(2, n, 256, dtype=torch.bfloat16) for n in (2, 5))
    with torch.no_grad():
        wanted = [module(x) for x in (few, many)]
        found = kernels.quicken(module, {"0": record})
        assert (found.count, found.of) == (1, 1)
        got = [module(x) for x in (few, many)]
    assert torch.equal(got[1], wanted[1]), "more rows are computed dense"
    torch.testing.assert_close(got[0], wanted[0], rtol=0.02, atol=0.02)
    assert torch.equal(module[0].weight, record.dense().bfloat16())


def test_grids_without_a_kernel_and_slow_kernels_stay_dense(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module, record = packed(6, 64, torch.bfloat16)
    assert kernels.quicken(module, {"0": record}).count == 0
    module, record = packed(4, 64, torch.bfloat16)
    monkeypatch.setattr(kernels, "_fastest", lambda task: 1.0)
    assert kernels.quicken(module, {"0": record}).count == 0
    assert isinstance(module[0], nn.Linear)


def test_a_folder_computes_packed_and_says_so(tmp_path: Path, monkeypatch) -> None:
    from typer.testing import CliRunner

    from layerwise.cli import app

    monkeypatch.setattr(kernels, "faster_up_to", lambda dense, product: 128)
    out, plan = tmp_path / "out", tmp_path / "plan.yaml"
    for words in (
        f"plan demo --bits 4.2 --method rtn --allocator uniform --set menu.bits=4 --out {plan}",
        f"apply demo {plan} --out {out}",
        f"run {out} import --max-tokens 4",
    ):
        answer = CliRunner().invoke(app, words.split())
        assert answer.exit_code == 0, answer.output
    assert "84 of 84 packed matrices" in answer.output
