"""Visits of shared layers with something of their own, against a slow, obvious reference."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import layerwise
from layerwise.cli import app
from layerwise.core.adapters import Adapted, Factored, adapted, load_adapters, low_rank
from layerwise.core.checkpoint import Checkpoint
from layerwise.core.errors import LayerwiseError
from layerwise.core.method import find
from layerwise.core.open import unrolled
from layerwise.core.plan import DataSpec, Heal, Identity, Plan
from layerwise.core.quality import Quality
from layerwise.core.shards import write_safetensors
from layerwise.core.stats import Scores
from layerwise.core.visits import entries_of, parse_wiring
from layerwise.jobs.apply import apply_plan
from layerwise.jobs.contest import Contest
from layerwise.jobs.heal import heal_folder
from layerwise.jobs.measure import agrees_cached
from layerwise.jobs.naive import naive_depth
from layerwise.jobs.plan import Request, make_plan
from layerwise.jobs.session import Budget
from layerwise.jobs.units import layer_bytes
from layerwise.jobs.verify import Settings, verify
from layerwise.report.terminal import show_bytes

BATCH = {"input_ids": torch.arange(3, 27).reshape(2, 12)}
FEW = ["--samples", "2", "--length", "16"]


def tied(model: Path, rank: int, count: int = 2, pick: str = "mean") -> list[Any]:
    stack = layerwise.open(model).stack
    choose = find("tie").bind({"count": count, "rank": rank, "pick": pick})
    return entries_of(choose(stack, Scores({}, "layer", "")))


def plan_for(model: Path, order: list[Any], target: str = "compact") -> Plan:
    held = Checkpoint(model)
    wiring, data = {"decoder": order}, DataSpec(samples=1, length=16)
    identity = Identity(held.structure, held.weights)
    return Plan(identity, target=target, wiring=wiring, data=data)  # type: ignore[arg-type]


def logits(model: Path, **how: Any) -> Tensor:
    return layerwise.open(model, **how).load().run(BATCH).logits


def by_hand(model: Path, rank: int, loop: int = 2) -> Tensor:
    """Stock code, every layer overwritten by mean + the best product of a rank, vectors kept."""
    stock = AutoModelForCausalLM.from_pretrained(model).eval()
    layers = next(m for m in stock.modules() if isinstance(m, torch.nn.ModuleList))
    before = [{n: p.detach().clone() for n, p in layer.named_parameters()} for layer in layers]
    with torch.no_grad():
        for place, layer in enumerate(layers):
            members = before[place % loop :: loop]
            for name, p in layer.named_parameters():
                if p.ndim < 2:
                    continue
                mean = sum(one[name] for one in members) / len(members)
                for own, shared in zip(
                    *(t if p.ndim == 3 else t[None] for t in (p, mean)), strict=True
                ):
                    u, s, v = torch.linalg.svd(own - shared, full_matrices=False)
                    own.copy_(shared + u[:, :rank] @ s.diag()[:rank, :rank] @ v[:rank])
        return stock(**BATCH, use_cache=False).logits


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral", "opt"])
def test_a_tied_stack_computes_what_the_definition_says(tiny, kind: str) -> None:
    model = tiny(kind)
    count = len(layerwise.open(model).stack.layers) - 2
    network = layerwise.open(model, wiring={"decoder": tied(model, 5, count)}).load()
    torch.testing.assert_close(network.run(BATCH).logits, by_hand(model, 5), rtol=1e-3, atol=1e-4)
    same, total = agrees_cached(network.module, BATCH["input_ids"], 12)
    assert same == total


@pytest.mark.parametrize(
    ("kind", "pick"),
    [
        *((kind, "mean") for kind in ("llama", "gpt2", "mixtral", "falcon", "mamba")),
        ("llama", "step"),
        ("llama", "lower"),
    ],
)
def test_the_full_rank_is_exact(tiny, kind: str, pick: str) -> None:
    model = tiny(kind)
    found = logits(model, wiring={"decoder": tied(model, 128, 1, pick)})
    assert torch.equal(found, logits(model))


def test_what_is_left_of_the_residual_falls_with_the_rank(tiny) -> None:
    network = layerwise.open(tiny("llama"))
    own, shared = (network.fetch(layer) for layer in network.layers()[:2])
    name = "mlp.up_proj.weight"
    values = torch.linalg.svdvals(own[name] - shared[name])
    for rank in range(38):  # 39 (64 + 96) are more than 64 times 96
        left = (adapted(shared, low_rank(own, shared, rank))[name] - own[name]).norm()
        torch.testing.assert_close(left, values[rank:].norm())
    assert torch.equal(adapted(shared, low_rank(own, shared, 39))[name], own[name])


def test_worked_example_of_two_layers() -> None:
    """`diag(3, 1)` and `diag(1, 2)` share `diag(2, 1.5)`: 1.25 is left, then 0.25 of rank 1."""
    one, shared = {"w": torch.tensor([3.0, 1.0]).diag()}, {"w": torch.tensor([2.0, 1.5]).diag()}
    errors = [(adapted(shared, low_rank(one, shared, r))["w"] - one["w"]).square() for r in (0, 1)]
    assert [round(error.sum().item(), 6) for error in errors] == [1.25, 0.0]  # 1 of 2 is no smaller
    wide = {n: torch.block_diag(t["w"], torch.zeros(6, 6)) for n, t in (("a", one), ("b", shared))}
    left = adapted({"w": wide["b"]}, low_rank({"w": wide["a"]}, {"w": wide["b"]}, 1))["w"]
    assert (left - wide["a"]).square().sum().item() == pytest.approx(0.25)


@pytest.mark.parametrize(("kind", "rank"), [("gpt2", 4)])
def test_a_folder_holds_shared_layers_and_adapters(
    tiny, tmp_path: Path, kind: str, rank: int
) -> None:
    model, out = tiny(kind), tmp_path / "out"
    order = tied(model, rank, 1 if kind == "gpt2" else 2)
    applied = apply_plan(model, plan_for(model, order), out)
    assert torch.equal(logits(out), logits(model, wiring={"decoder": order}))
    held = Checkpoint(out)
    assert applied.nbytes == held.nbytes
    files = [out / "model.safetensors", *out.glob("layerwise.adapters")]
    heads = sum(int.from_bytes(file.read_bytes()[:8], "little") + 8 for file in files)
    assert held.nbytes == sum(file.stat().st_size for file in files) - heads
    network = layerwise.open(out)
    layer = network.layers()[-1]
    shapes = {n: p.shape for n, p in layer.module.named_parameters()}
    wanted = sum(rank * sum(s) if len(s) == 2 else s[0] for s in shapes.values()) if rank else 0
    differ = sum(own.nbytes for own in network.adapters.get(layer.path, {}).values())
    assert differ <= 4 * wanted  # norms that are equal need nothing
    assert differ >= 4 * sum(rank * sum(s) for s in shapes.values() if len(s) == 2)


def test_shared_tensors_stay_shared_and_products_stay_in_factors(tiny) -> None:
    model = tiny("llama")
    network = layerwise.open(model, wiring={"decoder": tied(model, 4)}).load()
    held = [dict(la.module.named_parameters()) for la in network.layers()]
    assert all(held[0][name] is held[2][name] for name in held[0])
    modules = [m for la in network.layers() for m in la.module.modules()]
    kinds = [type(vars(m).get("forward")) for m in modules]
    assert kinds.count(Factored) == 4 * 7
    assert kinds.count(Adapted) == 0  # norms of a new model are all alike


def test_a_budget_of_bytes_shares_as_few_layers_as_it_can(tiny) -> None:
    model = tiny("llama")
    whole, settings = Checkpoint(model).nbytes, {"tie": {"rank": 4}}
    request = Request(model, Budget(size=1.0), "compact", score="tie", settings=settings)
    by_depth = {n: make_plan(request._replace(budget=Budget(depth=n))).nbytes for n in (1, 2, 3)}
    assert by_depth[1] < by_depth[2] < by_depth[3] < whole
    for kept, nbytes in by_depth.items():
        planned = make_plan(request._replace(budget=Budget(bytes=nbytes)))
        assert planned.nbytes == nbytes
        visits = parse_wiring(planned.plan.wiring["decoder"], 4, "wiring")
        assert len({(visit.layer, visit.mix) for visit in visits}) == kept


def test_plan_apply_verify_run_and_heal(tiny, tmp_path: Path) -> None:
    model, plan, out = tiny("llama", "bfloat16"), tmp_path / "plan.yaml", tmp_path / "out"
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"line {i} of {i * i}" * 20 for i in range(200)))
    options = ["--score", "tie", "--set", "tie.rank=4", "--target", "compact"]
    options += ["--data", str(text)]
    words = ["plan", str(model), "--depth", "2", *options, "--out", str(plan), *FEW]
    printed = CliRunner().invoke(app, words)
    assert printed.exit_code == 0, printed.output
    assert "decoder/1 + rank 4" in printed.output
    read = layerwise.read_plan(plan)
    applied = apply_plan(model, read, out)
    assert show_bytes(applied.nbytes) in printed.output
    settings = Settings(documents=1, length=32, naive=False, speed=False, memory=False)
    found = verify(model, out, settings)
    assert all(check["ok"] for check in found.checks), found.checks
    assert "4 with adapters on shared layers" in found.rows[1]["what"]
    assert sum(row["bytes"] for row in found.layers) < applied.nbytes
    assert not any(row["dropped"] for row in found.layers)
    how = Heal(steps=3, rank=4, rate=3e-3, batch=2, samples=6, length=32, every=3)
    nbytes, rows = heal_folder(model, out, tmp_path / "healed", how)
    assert nbytes == applied.nbytes
    assert min(row["kl"] for row in rows) < rows[0]["kl"]
    words = ["run", str(tmp_path / "healed"), "def total(", "--max-tokens", "4"]
    assert CliRunner().invoke(app, words).exit_code == 0
    words = ["run", str(model), "def total(", "--plan", str(plan), "--max-tokens", "4"]
    assert CliRunner().invoke(app, words).exit_code == 0


def test_the_naive_plan_of_a_tie_drops_layers_of_the_same_bytes(tiny, monkeypatch) -> None:
    model, same = tiny("llama"), Quality(*[np.ones(2)] * 4)
    plan, sizes = plan_for(model, tied(model, 4)), layer_bytes(layerwise.open(model))
    nbytes = Checkpoint(model).nbytes - sizes["decoder/0"]
    monkeypatch.setattr(Contest, "qualities", lambda self, edited: (same, same))
    for room, dropped in ((-1, 2), (sizes["decoder/0"], 0)):
        naive = naive_depth(Contest(model, plan, nbytes + room, ()))
        assert (naive is None) == (dropped == 0)
        assert naive is None or naive.nbytes == nbytes - (dropped - 1) * sizes["decoder/0"]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_it_can_be_written_out_for_stock_engines(tiny, tmp_path: Path, kind: str) -> None:
    model, order = tiny(kind), tied(tiny(kind), 4, 1)
    apply_plan(model, plan_for(model, order, "hf"), tmp_path / "hf")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    with torch.no_grad():
        found = stock(**BATCH).logits
    wanted = logits(model, wiring={"decoder": order})
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_a_folder_with_adapters_can_be_written_out(tiny, tmp_path: Path) -> None:
    model, compact = tiny("llama"), tmp_path / "compact"
    apply_plan(model, plan_for(model, tied(model, 4)), compact)
    network = unrolled(layerwise.open(compact))
    layer = network.layers()[3]
    wanted = adapted(network.fetch_shared(layer), network.adapters[layer.path])
    assert all(torch.equal(t, wanted[name]) for name, t in network.fetch(layer).items())
    loaded = network.load().run(BATCH).logits
    torch.testing.assert_close(loaded, logits(compact), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("adapter", "found"),
    [
        ("a", "none in this folder"),
        ("", "found {'layer': 1, 'adapter': ''}"),
        ({"of": 9, "rank": 1}, "layer numbers from 0 to 3"),
        ({"of": 1, "rank": -1}, "layer numbers from 0 to 3"),
        ({"of": 1}, "layer numbers from 0 to 3"),
        ({"of": 1, "rank": 1.0}, "layer numbers from 0 to 3"),
    ],
)
def test_one_clear_error(tiny, adapter: Any, found: str) -> None:
    with pytest.raises(LayerwiseError, match=found):
        layerwise.open(tiny("llama"), wiring={"decoder": [0, {"layer": 1, "adapter": adapter}]})


def test_broken_adapters(tiny, tmp_path: Path) -> None:
    model, out = tiny("llama"), tmp_path / "out"
    apply_plan(model, plan_for(model, tied(model, 2)), out)
    file = out / "layerwise.adapters"
    whole = load_adapters(out)
    assert whole.keys() == {"decoder/0", "decoder/1", "decoder/2", "decoder/3"}
    name = "decoder/0|mlp.up_proj.weight|"
    for tensors, found in (
        ({f"{name}a.value": torch.ones(96, 2)}, "both factors"),
        ({"decoder/0": torch.ones(2)}, "a visit, a tensor and a factor"),
        ({f"{name}value": torch.full((96, 64), torch.nan)}, "finite numbers"),
        ({f"{name}value": torch.ones(64, 96)}, "found .64, 96. for mlp.up_proj.weight"),
        ({"decoder/0|mlp.no|value": torch.ones(2)}, "found mlp.no"),
    ):
        others = {f"decoder/{n}||value": torch.empty(0) for n in (0, 1, 2, 3)}
        write_safetensors(file, {**others, **tensors})
        with pytest.raises(LayerwiseError, match=found):
            layerwise.open(out)
    file.unlink()
    with pytest.raises(LayerwiseError, match="adapter '0'"):
        layerwise.open(out)


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["--size", "70%", "--score", "tie", "--set", "tie.rank=128"], "what --score tie shares"),
        (["--depth", "2", "--score", "tie", "--set", "tie.rank=-1"], "a rank of 0 or more"),
        (["--depth", "2", "--score", "drop"], "one of every layer"),
    ],
)
def test_one_clear_line(tiny, words: list[str], found: str) -> None:
    result = CliRunner().invoke(
        app, ["plan", str(tiny("llama")), *words, "--target", "compact", *FEW]
    )
    assert result.exit_code == 2
    assert found in " ".join(result.output.split())
