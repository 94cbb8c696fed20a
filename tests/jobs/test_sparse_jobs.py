"""Sparse and low-rank plans as whole jobs: exact budgets, folders that layerwise opens again."""

import re
from pathlib import Path

import pytest
import torch

import layerwise
from layerwise.core.checkpoint import Checkpoint
from layerwise.core.errors import LayerwiseError
from layerwise.core.plan import DataSpec, Edit, Identity, Plan, Step
from layerwise.jobs.apply import apply_plan
from layerwise.jobs.plan import Request, make_plan, reached
from layerwise.jobs.session import Budget
from layerwise.jobs.verify import Settings, verify

SMALL = DataSpec(samples=4, length=64)
QUICK = Settings(documents=2, length=32, speed=False, memory=False)
MENU = {"menu": {"share": [0.2, 0.4, 0.6, 0.8], "bits": [4], "group": [32]}}


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def request(model: Path, **fields: object) -> Request:
    given = {"settings": MENU, "data": SMALL, "target": "compact", **fields}
    return Request(model, given.pop("budget"), **given)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        ("llama", "sparsegpt"),
        ("gpt2", "gptq+low_rank"),
        ("llama", "gptq,wanda,quantized_factors"),
    ],
)
def test_compact_holds_records_and_is_opened_again(
    tiny, tmp_path: Path, kind: str, method: str
) -> None:
    model, out = tiny(kind), tmp_path / "out"
    asked = request(model, budget=Budget(size=0.7), method=method, score="lim")
    planned = make_plan(asked)
    applied = apply_plan(model, planned.plan, out, check=method == "sparsegpt")
    assert applied.nbytes == planned.nbytes == Checkpoint(out).nbytes
    assert applied.nbytes <= 0.7 * Checkpoint(model).nbytes
    found = verify(model, out, QUICK._replace(naive=method == "sparsegpt"))
    assert all(check["ok"] for check in found.checks), found.checks
    assert found.rows[1]["bytes"] == applied.nbytes
    if method == "sparsegpt":
        assert found.rows[2]["name"] == "naive"
        assert found.rows[2]["bytes"] <= applied.nbytes
    edited = layerwise.open(out, dtype="float32").load()
    assert edited.module(input_ids=torch.arange(9)[None]).logits.isfinite().all()


def test_a_budget_of_zeros_in_a_dense_folder(tiny, tmp_path: Path) -> None:
    model, out = tiny("llama"), tmp_path / "out"
    asked = request(
        model,
        budget=Budget(sparsity=0.55),
        method="wanda",
        target="hf",
        allocator="uniform",
        settings={},
    )
    planned = make_plan(asked)
    assert "% of these weights zero" in reached(planned)
    assert 0.55 <= planned.zeros < 0.555
    apply_plan(model, planned.plan, out, check=False)
    network = layerwise.open(out)
    zeros = total = 0
    for layer in network.layers():
        tensors = network.fetch(layer)
        for matrix in layer.matrices:
            weight = matrix.view(tensors[matrix.parameter])
            zeros, total = zeros + int((weight == 0).sum()), total + weight.numel()
    assert zeros / total == pytest.approx(planned.zeros)
    found = verify(model, out, QUICK)
    assert found.rows[2]["what"].startswith("uniform: ")
    assert found.rows[2]["kl"] == pytest.approx(found.rows[1]["kl"], rel=1e-4)


@pytest.mark.parametrize(("score", "chosen"), [("owl", "spread_ratios"), ("", "lamp")])
def test_ratios_meet_the_budget(tiny, score: str, chosen: str) -> None:
    asked = request(
        tiny("llama"),
        budget=Budget(sparsity=0.6),
        method="wanda",
        target="hf",
        score=score,
        allocator=chosen,
        settings={},
    )
    planned = make_plan(asked)
    assert 0.6 <= planned.zeros < 0.62
    shares = {edit.chain[0].options["share"] for edit in planned.plan.edits}
    assert len(shares) > 1


def test_what_cannot_be_met_is_said(tiny, tmp_path: Path) -> None:
    model = tiny("llama")
    for fields, words in (
        ({"budget": Budget(size=0.5), "target": "hf", "method": "wanda"}, "zeros at their full"),
        ({"budget": Budget(sparsity=0.5), "target": "hf"}, "with --method"),
        ({"budget": Budget(sparsity=0.95), "method": "wanda"}, "at most --sparsity 79.5%"),
        ({"budget": Budget(size=0.01), "method": "low_rank"}, "at least --bytes"),
        ({"budget": Budget(size=0.9), "method": "gaussian"}, r"--size 100\.0%"),
    ):
        with pytest.raises(LayerwiseError, match=words):
            make_plan(request(model, **fields))
    with pytest.raises(LayerwiseError, match=r"share 0\.5 with pattern 2:4"):
        settings = {"wanda": {"pattern": "2:4"}}
        make_plan(request(model, budget=Budget(sparsity=0.5), method="wanda", settings=settings))
    held = Checkpoint(model)
    edits = (Edit("*", (Step("trit_planes"),)),)
    plan = Plan(Identity(held.structure, held.weights), target="compact", data=SMALL, edits=edits)
    with pytest.raises(LayerwiseError, match="a record of Trits"):
        apply_plan(model, plan, tmp_path / "out")


def test_broken_records_are_one_clear_error(tiny, tmp_path: Path) -> None:
    model, out = tiny("llama"), tmp_path / "out"
    asked = request(model, budget=Budget(size=0.8), method="magnitude", allocator="uniform")
    apply_plan(model, make_plan(asked).plan, out, check=False)
    records = out / "records.json"
    records.write_text(records.read_text().replace('"Sparse"', '"Spares"', 1))
    with pytest.raises(LayerwiseError, match=r"records\.json"):
        layerwise.open(out)


def test_a_search_takes_only_what_lowers_the_loss(tiny, tmp_path: Path) -> None:
    """LASER: the trace's best of all edits that were tried, and nothing where none is better."""
    model = tiny("gpt2")
    fields = {"budget": Budget(size=1.0), "method": "low_rank", "target": "hf", "score": "greedy"}
    settings = {"low_rank": {"metric": "none"}, "menu": {"share": [0.05, 0.9]}}
    keep = ("*/1-9", "*/0/attention")
    planned = make_plan(request(model, **fields, settings=settings, keep=keep))
    tried, before, after = re.findall(r"[\d.]+", planned.note)
    assert int(tried) >= 4
    assert float(after) <= float(before)
    assert bool(planned.plan.edits) == (float(after) < float(before))
    with pytest.raises(LayerwiseError, match="--size 100%"):
        make_plan(request(model, **{**fields, "budget": Budget(size=0.9), "target": "compact"}))
