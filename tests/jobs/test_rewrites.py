"""Rewrites in whole jobs: plan, apply and verify, stopped and resumed, with other layers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from layerwise.cli import app
from layerwise.core.errors import LayerwiseError
from layerwise.core.fold import FILE, load_folds
from layerwise.core.open import open_network
from layerwise.core.plan import DataSpec, Edit, Plan, Step, parse_plan, read_plan
from layerwise.jobs.apply import apply_plan
from layerwise.jobs.plan import Request, make_plan
from layerwise.jobs.request import identity
from layerwise.jobs.session import Budget
from layerwise.jobs.verify import Settings, verify

SMALL = DataSpec(samples=4, length=32)
QUICK = Settings(documents=3, length=64, speed=False, memory=False)
BOTH = (Step("rotate_stream"), Step("awq"))
IDS = torch.arange(3, 35)[None]


class Stopped(Exception):
    """What stops a job in its middle."""


def plan_of(folder: Path, *chain: Step, select: str = "*", **fields: Any) -> Plan:
    fields = {"target": "hf", "data": SMALL, "rewrites": BOTH} | fields
    return Plan(identity(open_network(folder)), edits=(Edit(select, chain),), **fields)


def stock(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(input_ids=IDS).logits


def test_a_plan_says_its_rewrites(tiny) -> None:
    plan = plan_of(tiny("llama"), Step("rtn"), rewrites=(Step("awq", {"points": 5}),))
    assert parse_plan(plan.to_yaml()) == plan
    assert "rewrites:\n- method: awq\n  options:\n    points: 5\n" in plan.to_yaml()
    with pytest.raises(LayerwiseError, match=r"rewites.*rewrites"):
        parse_plan(plan.to_yaml().replace("rewrites:", "rewites:"))


@pytest.mark.parametrize(
    ("kind", "select"), [("llama", "*"), ("mixtral", "*/*/attention"), ("mamba", "*")]
)
def test_eight_bits_on_rewritten_weights_are_the_original(
    tiny, tmp_path: Path, kind: str, select: str
) -> None:
    """What is written runs in stock transformers, and the head has been untied where it was."""
    plan = plan_of(tiny(kind), Step("rtn", {"bits": 8, "group": 32}), select=select)
    apply_plan(tiny(kind), plan, tmp_path / "out")
    wanted, found = stock(tiny(kind)), stock(tmp_path / "out")
    off = (found - wanted).norm(dim=-1) / wanted.norm(dim=-1)
    assert off.median().item() < 0.05, "a token or two may go to another expert"
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    assert (tmp_path / "out" / FILE).exists()


def test_the_bytes_that_were_promised_and_a_naive_plan_on_the_same_ground(
    tiny, tmp_path: Path
) -> None:
    request = Request(
        tiny("llama", "bfloat16"),
        Budget(size=0.6),
        method="rtn",
        allocator="uniform",
        data=SMALL,
        settings={"menu": {"group": [32]}, "awq": {"points": 4}},
        rewrite="quarot+awq",
    )
    planned = make_plan(request)
    assert planned.plan.rewrites == (Step("rotate_stream"), Step("awq", {"points": 4}))
    applied = apply_plan(request.model, planned.plan, tmp_path / "out")
    assert applied.nbytes == planned.nbytes <= 0.6 * planned.original
    assert {row["rewrite"] for row in applied.rewrites} == {"rotate_stream0", "awq1"}
    for settings in (QUICK, QUICK._replace(streamed=True)):
        found = verify(request.model, tmp_path / "out", settings)
        assert all(check["ok"] for check in found.checks)
        names = {row["name"]: row for row in found.rows}
        assert names["naive"]["what"].startswith("uniform: rotate_stream, awq, then")
        assert names["plan"]["kl"] == pytest.approx(names["naive"]["kl"], rel=1e-2)


def test_a_job_that_was_stopped_has_the_same_bytes(tiny, tmp_path: Path) -> None:
    plan = plan_of(tiny("mixtral"), Step("gptq", {"bits": 3, "group": 32}))
    apply_plan(tiny("mixtral"), plan, tmp_path / "whole")

    for stop in (1, 1):
        count = iter(range(99))

        def progress(what: str, done: int, total: int, count=count, stop=stop) -> None:
            if "awq" in what and next(count) + 1 >= stop:
                raise Stopped

        with pytest.raises(Stopped):
            apply_plan(tiny("mixtral"), plan, tmp_path / "parts", progress=progress)
    apply_plan(tiny("mixtral"), plan, tmp_path / "parts")
    for name in ("model.safetensors", FILE):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize("order", [[0, 2, 3], [0, 1, 1, 3]])
def test_with_layers_left_out_or_repeated(tiny, tmp_path: Path, order: list[int]) -> None:
    """Folds go by the layer of the original; one that runs twice is rewritten once."""
    plain = plan_of(tiny("llama"), Step("rtn", {"bits": 8}), wiring={"decoder": order}, rewrites=())
    apply_plan(tiny("llama"), plain, tmp_path / "plain")
    plan = plan_of(tiny("llama"), Step("rtn", {"bits": 8}), wiring={"decoder": order})
    apply_plan(tiny("llama"), plan, tmp_path / "out")
    wanted, found = stock(tmp_path / "plain"), stock(tmp_path / "out")
    assert ((found - wanted).abs().max() / wanted.abs().max()).item() < 0.05
    layers = {name.split(".")[2] for name in load_folds(tmp_path / "out") if ".layers." in name}
    assert layers == {str(number) for number in order}


def test_what_cannot_be_is_said_before_anything_runs(tiny, tmp_path: Path) -> None:
    request = Request(tiny("llama"), Budget(depth=2), target="hf", rewrite="awq")
    with pytest.raises(LayerwiseError, match="--rewrite awq: allowed is a plan that rounds"):
        make_plan(request)
    with pytest.raises(LayerwiseError, match=r"method 'awk'.*awq"):
        make_plan(request._replace(rewrite="awk", budget=Budget(bits=4), target="gguf"))
    plan = plan_of(tiny("gpt2"), Step("rtn"))
    with pytest.raises(LayerwiseError, match=r"rotate_stream of GPT2.*decoder/0, where .* mean"):
        apply_plan(tiny("gpt2"), plan, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_the_command_line(tiny, tmp_path: Path) -> None:
    out = tmp_path / "small"
    words = f"compress {tiny('llama')} --bits 4 --method clip+rtn --rewrite awq --out {out}"
    options = "--set menu.group=32 --set awq.points=3 --samples 4 --length 32 --documents 3"
    found = CliRunner().invoke(app, [*words.split(), *options.split(), "--allocator", "uniform"])
    assert found.exit_code == 0, found.output
    assert "awq: " in found.output
    assert "no seam at" in found.output
    assert read_plan(out / "plan.yaml").rewrites == (Step("awq", {"points": 3}),)
    report = json.loads((out / "report.json").read_text())
    assert len(report["more"]["rewrites"]) == 4
