"""Feed-forward parts as experts: neutral when all run, by definition when some do, and stored."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

import layerwise
from layerwise.cli import app
from layerwise.core.checkpoint import Checkpoint
from layerwise.core.errors import LayerwiseError
from layerwise.core.plan import DataSpec, Experts, Heal, Identity, Plan
from layerwise.core.routing import Mixed, Routed, mixture, neurons_of, route
from layerwise.jobs.experts import convert_folder, policy
from layerwise.jobs.heal import apply_healed, heal_folder
from layerwise.jobs.verify import Settings, verify
from layerwise.train.experts import energy_of, fit_experts

BATCH = {"input_ids": torch.arange(3, 27).reshape(2, 12)}


def plan_for(model: Path, how: Experts, **fields: Any) -> Plan:
    held, text = Checkpoint(model), model.with_suffix(".txt")
    if not text.exists():
        text.write_text("\n\n".join(f"line {i} of {i * i}" * 20 for i in range(400)))
    data = DataSpec(source=str(text), samples=2, length=64)
    identity = Identity(held.structure, held.weights)
    return Plan(identity, target="compact", data=data, experts=how, **fields)


def test_worked_example_of_two_experts() -> None:
    """`relu(x_1) + relu(x_2)` in two experts, routed by the larger `x`: two are always right, one
    is where the other `x` is no positive number."""
    x = torch.tensor([[3.0, -1.0], [-1.0, 2.0], [3.0, 2.0]])
    one, both = (
        mixture(x, x, k, lambda e, rows: rows[:, e, None].relu().expand(-1, 2), gated=False)
        for k in (1, 2)
    )
    assert one[:, 0].tolist() == [3.0, 2.0, 3.0]
    assert both[:, 0].tolist() == [3.0, 2.0, 5.0]


@pytest.mark.parametrize("active", [1, 3, 4])
@pytest.mark.parametrize("gated", [True, False])
def test_a_mixture_is_the_sum_that_the_definition_says(active: int, gated: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x, scores = torch.randn(2, 5, 6, generator=generator), torch.randn(2, 5, 4, generator=generator)
    matrices = torch.randn(4, 6, 6, generator=generator)
    found = mixture(x, scores, active, lambda e, rows: rows @ matrices[e], gated)
    for row, own, got in zip(*(t.flatten(0, 1) for t in (x, scores, found)), strict=True):
        p = own.softmax(0)
        best = p.argsort(descending=True)[:active].tolist()
        wanted = sum((p[e] if gated else 1) * (row @ matrices[e]) for e in best)
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "falcon", "neox"])
def test_all_experts_with_gates_of_one_are_the_dense_part(tiny, kind: str) -> None:
    network = layerwise.open(tiny(kind)).load()
    wanted = network.run(BATCH).logits
    for layer in network.layers():
        route(layer, Routed(torch.zeros(4, 64), torch.zeros(4), 4))
    torch.testing.assert_close(network.run(BATCH).logits, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_some_experts_run_their_neurons_alone(tiny, kind: str) -> None:
    """A slice against the part with all other neurons silenced."""
    network = layerwise.open(tiny(kind)).load()
    layer = network.layers()[1]
    neurons = neurons_of(layer)
    module = layer.module.get_submodule(neurons.module)
    mixed = Mixed(module, module.forward, Routed(torch.zeros(4, 64), torch.zeros(4), 1), neurons)
    x = torch.randn(7, 64, generator=torch.Generator().manual_seed(0))
    found, width = mixed.expert(2, x), neurons.size // 4
    down = next(m for m in layer.matrices if m.role == "down")
    weight = layer.module.get_parameter(down.parameter)
    kept = torch.zeros(neurons.size)
    kept[2 * width : 3 * width] = 1
    weight.data *= kept[:, None] if down.transposed else kept
    torch.testing.assert_close(found, module(x), rtol=1e-4, atol=1e-5)


def fitted(tiny, how: Experts, active: int, count: int = 600) -> Any:
    layer = layerwise.open(tiny("llama")).load().layers()[1]
    generator = torch.Generator().manual_seed(0)
    kinds = 2 * torch.randn(6, 64, generator=generator)  # tokens of six kinds
    seen, held = (
        kinds[torch.randint(6, (count,), generator=generator)]
        + 0.2 * torch.randn(count, 64, generator=generator)
        for _ in range(2)
    )
    return fit_experts(layer, seen, held, how, active, torch.float32), layer


def test_no_steps_are_neutral_and_steps_help(tiny) -> None:
    plain, layer = fitted(tiny, Experts(active=0.5, count=4, steps=0), 2)
    for name, tensor in plain.tensors.items():
        own = layer.module.get_parameter(name)
        assert torch.equal(tensor.flatten().sort().values, own.flatten().sort().values)
    assert plain.errors[3][0] < 1e-10
    assert plain.covered[3] == pytest.approx(1.0)
    how = Experts(active=0.5, count=4, steps=60, rate=3e-3, batch=128)
    better, _ = fitted(tiny, how, 2)
    assert better.errors[1][1] < 0.9 * plain.errors[1][1], "of tokens it was not trained on"
    alike, _ = fitted(tiny, Experts(active=0.5, count=4, steps=0, routed=False), 2)
    assert not alike.routed.router.any()
    assert plain.errors[1][1] < alike.errors[1][1], "tokens of six kinds can be told apart"
    again, _ = fitted(tiny, how, 2)
    assert all(torch.equal(t, better.tensors[name]) for name, t in again.tensors.items())


def test_neurons_are_sorted_by_what_they_add(tiny) -> None:
    layer = layerwise.open(tiny("llama")).load().layers()[1]
    x, module = torch.randn(9, 64, generator=torch.Generator().manual_seed(0)), layer.module.mlp
    found = energy_of(module, neurons_of(layer), x)
    activity = module.act_fn(module.gate_proj(x)) * module.up_proj(x)
    for neuron in (0, 5, 95):
        added = activity[:, neuron, None] * module.down_proj.weight[:, neuron]
        torch.testing.assert_close(found[neuron], added.square().sum(1).mean())


def brute_force(covered: dict[str, Tensor], costs: dict[str, list[int]], limit: float) -> Any:
    """Every `tau` there is, from the largest down."""
    levels = {0.0, *(v for c in covered.values() for v in c.tolist())}
    for tau in sorted(levels, reverse=True):
        found = {}
        for key, c in covered.items():
            enough = [k for k in range(len(c)) if c[k] >= tau] or [len(c) - 1]
            found[key] = enough[0] + 1
        if sum(costs[key][k - 1] for key, k in found.items()) <= limit:
            return found
    return None


@pytest.mark.parametrize("limit", [3.0, 5.0, 8.0, 11.5, 20.0])
def test_the_policy_is_the_largest_weight_that_fits(limit: float) -> None:
    generator = torch.Generator().manual_seed(int(limit))
    shares = torch.rand(3, 4, generator=generator).sort(1, descending=True).values
    covered = {str(i): (row / row.sum()).cumsum(0) for i, row in enumerate(shares)}
    costs = {key: [1, 2, 3, 4] for key in covered}
    assert policy(covered, costs, limit) == brute_force(covered, costs, limit)
    with pytest.raises(LayerwiseError, match="one expert a layer"):
        policy(covered, costs, 2.0)


def test_a_folder_of_experts(tiny, tmp_path: Path) -> None:
    model, out = tiny("llama"), tmp_path / "out"
    how = Experts(active=0.6, count=4, steps=4, batch=32)
    nbytes, rows = convert_folder(model, out, plan_for(model, how))
    assert nbytes == Checkpoint(out).nbytes
    assert nbytes == Checkpoint(model).nbytes + 4 * (4 * 64 * 4 + 4 * 4 + 8)
    whole = sum(row["parameters"] for row in rows)
    assert whole == 4 * 3 * 64 * 96
    assert sum(row["active_parameters"] for row in rows) <= 0.6 * whole
    found = verify(model, out, Settings(documents=2, length=32, speed=False, memory=False))
    assert all(check["ok"] for check in found.checks), found.checks
    assert "the same for all tokens" in found.rows[2]["what"]
    again = apply_healed(model, layerwise.read_plan(out / "plan.yaml"), tmp_path / "again")
    assert Checkpoint(again.folder).weights == Checkpoint(out).weights
    with pytest.raises(LayerwiseError, match="found experts"):
        heal_folder(model, out, tmp_path / "healed", Heal(steps=1))
    held = Checkpoint(out)
    bare = Plan(Identity(held.structure, held.weights), data=DataSpec(samples=1, length=16))
    with pytest.raises(LayerwiseError, match=r"4 experts.*which layerwise itself runs"):
        apply_healed(out, bare, tmp_path / "dense")


def test_what_cannot_be(tiny, tmp_path: Path) -> None:
    model, out = tiny("llama"), tmp_path / "out"
    how = Experts(active=0.5, count=5, steps=0)
    with pytest.raises(LayerwiseError, match="without wiring"):
        convert_folder(model, out, plan_for(model, how, wiring={"decoder": [0, 1]}))
    with pytest.raises(LayerwiseError, match="in one module"):
        neurons_of(layerwise.open(tiny("opt")).layers()[0])
    with pytest.raises(LayerwiseError, match="a number of experts that divides"):
        convert_folder(model, out, plan_for(model, how))


def test_the_command(tiny, tmp_path: Path) -> None:
    model, out = tiny("llama"), tmp_path / "out"
    plan_for(model, Experts(active=0.5))
    words = ["experts", str(model), "--out", str(out), "--data", str(model.with_suffix(".txt"))]
    few = ["--samples", "2", "--length", "32", "--set", "experts.steps=2"]
    found = CliRunner().invoke(app, [*words, "--active", "50%", *few])
    assert found.exit_code == 0, found.output
    assert "run for a token, routers counted" in found.output
    wrong = CliRunner().invoke(app, [*words[:2], "--out", "x", "--set", "experts.count=1"])
    assert wrong.exit_code == 2
    assert "experts.count, experts.steps" in " ".join(wrong.output.split())
