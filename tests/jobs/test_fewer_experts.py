"""Experts left out, from the command line to a folder of stock transformers."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from asked import SMALL, run
from torch.testing import assert_close
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from layerwise.cli import app
from layerwise.core.checkpoint import Checkpoint
from layerwise.core.find_experts import without_experts
from layerwise.core.open import open_network
from layerwise.core.plan import DataSpec, Edit, Identity, Plan, Step, read_plan
from layerwise.core.stats import Scores
from layerwise.jobs.contest import contest_on
from layerwise.jobs.fewer import WAYS, able_experts, at_random, best_saliency, saliencies
from layerwise.jobs.narrow import Candidate, Dense
from layerwise.jobs.request import Request
from layerwise.jobs.session import Budget, silent

pytestmark = pytest.mark.usefixtures("few_plans")


@pytest.mark.parametrize("heal", ["", "--heal 2 --set heal.samples=4 --set heal.length=32"])
def test_the_least_salient_go(heal: str, tiny: Callable[..., Path], tmp_path: Path) -> None:
    model, out = tiny("mixtral"), tmp_path / "out"
    words = f"compress {model} --size 80% --allow expert {SMALL} {heal} --documents 2 --out {out}"
    found = run(words)
    plan = read_plan(out / "plan.yaml")
    (kept,) = plan.units.values()
    assert [len(numbers) for numbers in kept.values()] == [3, 3, 3] and not plan.widths
    before, after = Checkpoint(model).nbytes, Checkpoint(out).nbytes
    planned = [row["bytes"] for row in found["more"]["edge"] if row["chosen"]]
    assert planned == [after] and after <= 0.8 * before
    naive = found["rows"][-1]
    assert naive["name"] == "naive" and naive["bytes"] == after
    assert "num_local_experts 3; left out" in naive["what"]
    assert ("healed equally" in naive["what"]) == bool(heal)
    stock = AutoModelForCausalLM.from_pretrained(out).eval()
    assert stock.config.num_local_experts == 3
    ids = torch.arange(20)[None]
    narrow = without_experts(open_network(model), plan.units).load().module
    with torch.no_grad():
        mine, stored = narrow(input_ids=ids).logits, stock(ids).logits
    if not heal:
        assert_close(mine, stored, rtol=1e-5, atol=1e-6)


def test_the_saliency_that_measures_best_is_taken(tiny: Callable[..., Path]) -> None:
    network = open_network(tiny("mixtral"))
    data = DataSpec(samples=2, length=32)
    request = Request(tiny("mixtral"), Budget(size=0.8), "hf", data=data)
    found = saliencies(request, network, silent)
    assert [scores.origin for scores in found] == [f"expert_saliency ({way})" for way in WAYS]
    asked = request._replace(settings={"reap": {"by": "norm"}})
    assert saliencies(asked, network, silent) == [found[WAYS.index("norm")]]
    dense, contest = Dense(request, network, able_experts(network)), contest_on(request, network)
    candidate = Candidate((), {"num_local_experts": 2})

    def kl(scores: Scores) -> float:
        return contest.roughly(replace(dense, saliency=scores).plan(candidate)).estimate("kl").value

    every = [*found, at_random(found[0], torch.Generator().manual_seed(1))]
    assert best_saliency(dense, every, candidate, contest, silent) == min(every, key=kl)


def test_beside_layers_and_widths(tiny: Callable[..., Path], tmp_path: Path) -> None:
    model, out = tiny("mixtral"), tmp_path / "p.yaml"
    found = run(f"plan {model} --size 60% --allow expert,width,layer {SMALL} --out {out}")
    least = min(row["expected"] for row in found["more"]["edge"])
    assert [r["expected"] for r in found["more"]["edge"] if r["chosen"]] == [least]
    assert any("num_local_experts" in row["plan"] for row in found["more"]["edge"])
    run(f"apply {model} {out} --out {tmp_path / 'out'} --json")
    taken = next(row for row in found["more"]["edge"] if row["chosen"])
    assert Checkpoint(tmp_path / "out").nbytes == taken["bytes"]


def test_a_plan_by_hand_with_an_order_and_edits(tiny: Callable[..., Path], tmp_path: Path) -> None:
    model, out = tiny("mixtral"), tmp_path / "out"
    held = Checkpoint(model)
    plan = Plan(
        Identity(held.structure, held.weights),
        data=DataSpec(samples=1, length=32),
        wiring={"decoder": [0, 2]},
        units={"num_local_experts": {"decoder/0": [0, 3], "decoder/2": [1, 2]}},
        edits=(Edit("decoder/*/mlp.down", (Step("rtn", {"bits": 8}),)),),
    )
    plan.save(tmp_path / "p.yaml")
    assert read_plan(tmp_path / "p.yaml") == plan
    found = run(f"apply {model} {tmp_path / 'p.yaml'} --out {out} --json")
    assert "experts 1, 2 stay" in found["rows"][1]["options"] and not found["warnings"]
    stock = AutoModelForCausalLM.from_pretrained(out)
    assert (stock.config.num_hidden_layers, stock.config.num_local_experts) == (2, 2)
    router = open_network(model).layers()[2]
    rows = open_network(model).fetch(router)["mlp.gate.weight"][[1, 2]]
    assert torch.equal(stock.model.layers[1].mlp.gate.weight, rows)
    found = run(f"verify {model} {out} --documents 2 --length 32 --json")
    assert all(check["ok"] for check in found["more"]["checks"])


@pytest.mark.parametrize(
    ("kind", "words", "said"),
    [
        ("llama", "--size 80% --allow expert", "can change places"),
        ("mixtral", "--size 30% --allow expert", "at least --bytes"),
        ("mixtral", "--size 80% --allow expert --score shortgpt", "expert_saliency"),
        ("mixtral", "--size 80% --allow expert --target gguf", "--target hf"),
        ("mixtral", "--size 80% --allow expert,bits", "width, expert and layer"),
        ("mixtral", "--flops 80% --allow expert", "at least --flops 100"),
    ],
)
def test_what_cannot_be_is_refused(
    kind: str, words: str, said: str, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    given = f"plan {tiny(kind)} {words} --samples 2 --length 32 --out {tmp_path / 'p.yaml'}"
    found = CliRunner().invoke(app, given.split())
    assert found.exit_code == 2
    assert said in " ".join(found.stderr.split())
