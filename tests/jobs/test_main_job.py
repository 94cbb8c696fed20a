"""Plan, apply, verify, on the shipped model and on tiny ones, through stock engines."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from layerwise.cli import app
from layerwise.core.checkpoint import Checkpoint, read_header
from layerwise.core.errors import LayerwiseError
from layerwise.core.open import open_network
from layerwise.core.plan import DataSpec, Edit, Identity, Plan, Step, read_plan
from layerwise.jobs.apply import apply_plan
from layerwise.jobs.plan import Request, make_plan
from layerwise.jobs.session import Budget
from layerwise.jobs.verify import Settings, verify

SMALL = DataSpec(samples=4, length=64)
QUICK = Settings(documents=4, length=64, speed=False, memory=False)


def plan_of(model: Path, edits: tuple[Edit, ...] = (), **fields: object) -> Plan:
    held = Checkpoint(model)
    identity = Identity(held.structure, held.weights)
    return Plan(model=identity, data=SMALL, edits=edits, **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral", "opt", "falcon"])
def test_without_edits_the_same_tensors_are_written(kind, tiny, tmp_path: Path) -> None:
    model = tiny(kind)
    apply_plan(model, plan_of(model), tmp_path / "out")
    before, after = read_header(model / "model.safetensors"), {}
    for file in (tmp_path / "out").glob("*.safetensors"):
        after |= read_header(file)
    assert {n: (i.shape, i.dtype) for n, i in before.items()} == {
        n: (i.shape, i.dtype) for n, i in after.items()
    }
    assert Checkpoint(model).weights == Checkpoint(tmp_path / "out").weights


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral", "opt", "falcon"])
def test_dense_edit_and_drop_reload_in_transformers(kind, tiny, tmp_path: Path) -> None:
    model = tiny(kind)
    edits = (Edit("*/0/mlp", (Step("rtn", {"bits": 4, "group": 24}),)),)
    depth = len(open_network(model).stack.layers)
    kept = [i for i in range(depth) if i != 1]
    apply_plan(model, plan_of(model, edits, wiring={"decoder": kept}), tmp_path / "out")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    original = AutoModelForCausalLM.from_pretrained(model)
    assert reloaded.config.num_hidden_layers == depth - 1
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert not torch.equal(reloaded(ids).logits, original(ids).logits)
    checked = verify(model, tmp_path / "out", QUICK._replace(naive=False))
    named = {c["name"]: c["ok"] for c in checked.checks}
    assert named["stock transformers gives the logits of the model that was written"]
    assert named["cached equals uncached greedy decoding"]


def test_a_repeated_layer_is_unrolled(tiny, tmp_path: Path) -> None:
    model = tiny("llama")
    apply_plan(model, plan_of(model, wiring={"decoder": [0, 1, 1, 2]}), tmp_path / "out")
    checked = verify(model, tmp_path / "out", QUICK._replace(naive=False))
    assert all(check["ok"] for check in checked.checks)


def test_compressed_tensors_mixed_bits(tiny, tmp_path: Path) -> None:
    model = tiny("llama")
    edits = tuple(
        Edit(select, (Step("gptq", {"bits": bits, "group": group}),))
        for select, bits, group in (
            ("*/*/attention", 2, 32),
            ("*/0/mlp", 3, 32),
            ("*/1/mlp", 5, 0),
            ("*/2/mlp.down", 8, 32),
        )
    )
    plan = plan_of(model, edits, target="compressed-tensors")
    applied = apply_plan(model, plan, tmp_path / "out")
    assert applied.nbytes == Checkpoint(tmp_path / "out").nbytes
    checked = verify(model, tmp_path / "out", QUICK._replace(naive=False))
    assert all(check["ok"] for check in checked.checks), checked.checks


FEW = (Edit("*/*/mlp", (Step("rtn", {"bits": 4, "group": 32}),)),)


def test_a_joint_plan_is_compared_with_the_best_single_technique(tiny, tmp_path: Path) -> None:
    model = tiny("llama")
    plan = plan_of(model, FEW, target="compressed-tensors", wiring={"decoder": [0, 1, 3]})
    apply_plan(model, plan, tmp_path / "out")
    naive = verify(model, tmp_path / "out", QUICK).rows[2]
    assert naive["bytes"] <= Checkpoint(tmp_path / "out").nbytes


def test_dense_edits_are_compared_at_packed_size(tiny, tmp_path: Path) -> None:
    model = tiny("gpt2")
    apply_plan(model, plan_of(model, FEW), tmp_path / "out")
    naive = verify(model, tmp_path / "out", QUICK).rows[2]
    assert naive["what"].startswith("uniform") and "as is" not in naive["what"]


def test_a_plan_that_changes_nothing_costs_nothing(tiny, tmp_path: Path) -> None:
    model = tiny("llama")
    apply_plan(model, plan_of(model), tmp_path / "out")
    found = verify(model, tmp_path / "out", QUICK)
    assert found.rows[1]["kl"] == [0.0, 0.0, 0.0] and found.ratio is None
    assert any("nothing to compare" in warning for warning in found.warnings)


@pytest.mark.parametrize("kind", ["demo"])
def test_planned_bytes_are_the_bytes_written(kind: str, tmp_path: Path) -> None:
    request = Request(kind, Budget(bits=3.0), score="lim", data=SMALL)
    planned = make_plan(request)
    applied = apply_plan(kind, planned.plan, tmp_path / "out")
    assert planned.nbytes == applied.nbytes == Checkpoint(tmp_path / "out").nbytes


def test_every_budget_unit_is_an_upper_bound() -> None:
    whole = Checkpoint(open_network("demo").checkpoint.folder).nbytes
    for budget, limit in (
        (Budget(size=0.3), 0.3 * whole),
        (Budget(bytes=5_000_000), 5_000_000),
    ):
        planned = make_plan(Request("demo", budget, score="zd", allocator="threshold", data=SMALL))
        assert planned.nbytes <= limit


def test_an_impossible_budget_says_what_is_possible() -> None:
    with pytest.raises(LayerwiseError, match="at least --bits"):
        make_plan(Request("demo", Budget(bits=1.0), score="zd", data=SMALL))
    with pytest.raises(LayerwiseError, match="at least --bytes"):
        make_plan(Request("demo", Budget(size=0.01), target="hf", data=SMALL))


@pytest.mark.parametrize("score", ["shortgpt", "deeper_layers", "lim", "measured", "greedy"])
def test_depth_by_every_score(score: str) -> None:
    planned = make_plan(Request("demo", Budget(depth=10), target="hf", score=score, data=SMALL))
    kept = planned.plan.wiring["decoder"]
    assert len(kept) == 10
    assert kept == sorted(set(kept))


def test_a_plan_for_another_model_is_refused(tiny, tmp_path: Path) -> None:
    plan = plan_of(tiny("llama"))
    with pytest.raises(LayerwiseError, match="structure"):
        apply_plan(tiny("gpt2"), plan, tmp_path / "out")


def test_a_target_that_cannot_hold_the_plan(tiny, tmp_path: Path) -> None:
    model = tiny("gpt2")
    edits = (Edit("*", (Step("rtn", {"bits": 4, "group": 32}),)),)
    with pytest.raises(LayerwiseError, match="cannot be packed"):
        apply_plan(model, plan_of(model, edits, target="compressed-tensors"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_zero_points_that_no_stock_reader_takes_are_refused(tiny, tmp_path: Path) -> None:
    model = tiny("llama")
    edits = (Edit("*", (Step("rtn", {"bits": 4, "group": 32, "symmetric": False}),)),)
    with pytest.raises(LayerwiseError, match="zero points"):
        apply_plan(model, plan_of(model, edits, target="compressed-tensors"), tmp_path / "out")


def test_command_line_from_plan_to_report(tmp_path: Path) -> None:
    runner = CliRunner()
    out, small = tmp_path / "out", ["--samples", "4", "--length", "64"]

    def run(*words: str) -> dict:
        done = runner.invoke(app, [*words, "--json"], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return json.loads(done.stdout)

    plan = tmp_path / "plan.yaml"
    made = run("plan", "demo", "--bits", "4", "--allocator", "uniform", "--out", str(plan), *small)
    assert len(made["rows"]) == 48
    dry = run("apply", "demo", str(plan), "--out", str(out), "--dry-run")
    assert not out.exists()
    assert sum(row["bytes"] for row in dry["rows"]) < made["more"]["bytes"]
    run("apply", "demo", str(plan), "--out", str(out))
    found = run(
        "verify",
        "demo",
        str(out),
        "--documents",
        "4",
        "--length",
        "64",
        "--no-speed",
        "--no-memory",
    )
    assert [row["name"] for row in found["rows"]] == ["original", "plan", "naive"]
    assert "<svg" in (out / "report.html").read_text()
    assert read_plan(out / "plan.yaml").budget == {"bits": 4.0}


def test_errors_are_one_line(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["inspect", str(tmp_path / "nothing")])
    assert done.exit_code == 2
    assert done.stderr.lstrip().startswith("error: ")
    assert "Traceback" not in done.output


def test_methods_lists_the_registry() -> None:
    done = CliRunner().invoke(app, ["methods", "--json"])
    names = {row["method"] for row in json.loads(done.stdout)["rows"]}
    assert {"gptq", "rtn", "knapsack", "block_influence", "drop", "hf"} <= names


@pytest.mark.parametrize("target", ["hf", "hf-depth", "compressed-tensors"])
def test_streamed_verification_finds_the_same(tiny, tmp_path: Path, target: str) -> None:
    model = tiny("llama")
    edits = (Edit("*", (Step("gptq", {"bits": 4, "group": 32}),)),)
    wiring = {"decoder": [0, 1, 3]} if target == "hf-depth" else {}
    plan = plan_of(model, edits, wiring=wiring, target=target.removesuffix("-depth"))
    apply_plan(model, plan, tmp_path / "out")
    resident = verify(model, tmp_path / "out", QUICK)
    streamed = verify(model, tmp_path / "out", QUICK._replace(streamed=True))
    for mine, other in zip(streamed.rows[:2], resident.rows, strict=False):
        assert mine["bytes"] == other["bytes"]
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-5)
    assert streamed.rows[1]["kl"] == pytest.approx(resident.rows[1]["kl"], rel=1e-4)
    if not wiring:
        assert streamed.ratio["value"] == pytest.approx(resident.ratio["value"], rel=1e-4)
    assert torch.is_grad_enabled()
    assert "streamed" in streamed.warnings[0]
