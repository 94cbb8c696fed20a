"""Healing: it helps, changes nothing without steps, and goes on where it was stopped."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec import structs
from typer.testing import CliRunner

import layerwise
from layerwise.cli import app
from layerwise.core.checkpoint import Checkpoint
from layerwise.core.errors import LayerwiseError
from layerwise.core.journal import Journal
from layerwise.core.plan import DataSpec, Edit, Heal, Identity, Plan, Step
from layerwise.core.sites import At
from layerwise.jobs import verify as verification
from layerwise.jobs.apply import apply_plan
from layerwise.jobs.heal import apply_healed, heal_folder
from layerwise.jobs.verify import Settings, verify
from layerwise.train import heal_layers
from layerwise.train import healing as training

HOW = Heal(steps=12, rank=4, rate=3e-3, batch=2, samples=8, length=32, every=4)


@pytest.fixture
def edited(tiny, tmp_path: Path) -> Callable[..., tuple[Path, Path]]:
    """A tiny original and what a plan makes of it."""

    def make(order: list[Any], target: str = "hf") -> tuple[Path, Path]:
        model, folder = tiny("llama"), tmp_path / "edited"
        apply_plan(model, plan_for(model, order, target), folder)
        return model, folder

    return make


def plan_for(model: Path, order: list[Any], target: str = "hf", **fields: Any) -> Plan:
    held = Checkpoint(model)
    identity, text = Identity(held.structure, held.weights), model.with_suffix(".txt")
    if not text.exists():
        text.write_text("\n\n".join(f"line {i} of {i * i}" * 20 for i in range(400)))
    data, wiring = DataSpec(source=str(text), samples=1, length=16), {"decoder": order}
    return Plan(identity, target=target, wiring=wiring, data=data, **fields)  # type: ignore


@pytest.mark.parametrize(
    ("order", "target"),
    [
        ([0, 1, 3], "hf"),
        ([0, {"layer": 1, "parts": ["mlp"]}, 2, 3], "hf"),
        ([0, {"layer": 1, "parts": ["mlp"]}, 1, 3], "compact"),
    ],
    ids=["layers", "parts", "compact"],
)
def test_it_comes_closer_to_the_original(edited, tmp_path: Path, order: Any, target: str) -> None:
    model, folder = edited(order, target)
    nbytes, rows = heal_folder(model, folder, tmp_path / "out", HOW)
    assert [row["step"] for row in rows] == [0, 4, 8, 12]
    assert min(row["kl"] for row in rows) < rows[0]["kl"]
    assert nbytes == Checkpoint(folder).nbytes
    before, after = (Checkpoint(f).read(Checkpoint(f).tensors) for f in (folder, tmp_path / "out"))
    zero = [name for name, t in before.items() if not t.any()]
    assert all(not after[name].any() for name in zero), "what is left out stays left out"
    settings = Settings(documents=2, length=32, speed=False, memory=False, naive=target == "hf")
    found = verify(model, tmp_path / "out", settings)
    assert all(check["ok"] for check in found.checks), found.checks
    if target == "hf":
        assert found.rows[-1]["what"].endswith("healed equally")


def test_no_steps_change_nothing(edited, tmp_path: Path) -> None:
    model, folder = edited([0, 1, 3])
    heal_folder(model, folder, tmp_path / "out", Heal(steps=0, samples=8, length=32))
    assert Checkpoint(tmp_path / "out").weights == Checkpoint(folder).weights


def test_the_plan_alone_gives_the_same_bytes(edited, tmp_path: Path) -> None:
    model, folder = edited([0, 1, 3])
    heal_folder(model, folder, tmp_path / "out", HOW)
    plan = layerwise.read_plan(tmp_path / "out" / "plan.yaml")
    assert plan.heal == HOW
    apply_healed(model, plan, tmp_path / "again")
    assert Checkpoint(tmp_path / "again").weights == Checkpoint(tmp_path / "out").weights


def test_it_goes_on_with_the_same_bytes(edited, tmp_path: Path, monkeypatch) -> None:
    model, folder = edited([0, 1, 3])
    heal_folder(model, folder, tmp_path / "whole", HOW)
    note = training.Course.note

    def stopping(self: training.Course, step: int, value: float) -> None:
        note(self, step, value)
        if step == 8:
            raise KeyboardInterrupt

    monkeypatch.setattr(training.Course, "note", stopping)
    with pytest.raises(KeyboardInterrupt):
        heal_folder(model, folder, tmp_path / "out", HOW)
    monkeypatch.setattr(training.Course, "note", note)
    steps: list[int] = []
    heal_folder(
        model, folder, tmp_path / "out", HOW, progress=lambda what, done, total: steps.append(done)
    )
    assert steps == [9, 10, 11, 12]
    assert Checkpoint(tmp_path / "out").weights == Checkpoint(tmp_path / "whole").weights


@pytest.mark.parametrize("mode", ["full", "layers"])
def test_every_mode_helps_and_goes_on_with_the_same_bytes(
    edited, tmp_path: Path, monkeypatch, mode: Any
) -> None:
    model, folder = edited([0, {"layer": 1, "parts": ["mlp"]}, 3])
    how = structs.replace(HOW, mode=mode)
    _, rows = heal_folder(model, folder, tmp_path / "whole", how)
    if mode == "full":
        assert min(row["kl"] for row in rows) < rows[0]["kl"]
    else:
        assert [row["layer"] for row in rows] == ["decoder/0", "decoder/1", "decoder/2"]
        assert rows[0]["steps"] == rows[0]["before"] == 0, "nothing is left out around it"
        assert all(row["error"] < row["before"] for row in rows[1:])
    before, after = (
        Checkpoint(f).read(Checkpoint(f).tensors) for f in (folder, tmp_path / "whole")
    )
    assert all(not after[name].any() for name, t in before.items() if not t.any())
    kept = [n for n in before if n.endswith("norm.weight") or "embed" in n]
    assert any(not torch.equal(before[n], after[n]) for n in kept), "vectors are trained too"
    owner, name = (training.Course, "note") if mode == "full" else (Journal, "write")
    own, calls = getattr(owner, name), []

    def stopping(self: Any, *args: Any) -> None:
        own(self, *args)
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(owner, name, stopping)
    with pytest.raises(KeyboardInterrupt):
        heal_folder(model, folder, tmp_path / "out", how)
    heal_folder(model, folder, tmp_path / "out", how)
    assert len(calls) == (4 if mode == "full" else 3), "what was done is done again"
    assert Checkpoint(tmp_path / "out").weights == Checkpoint(tmp_path / "whole").weights


def test_a_layer_learns_what_the_original_hands_to_the_next(tiny) -> None:
    """With layer 1 left out, layer 0 is to give what layer 2 gets; clean, and its own input."""
    model = tiny("llama")
    teacher, student = layerwise.open(model), layerwise.open(model, wiring={"decoder": [0, 2, 3]})
    batch = {"input_ids": torch.arange(3, 27).reshape(2, 12)}
    how = Heal(steps=0, mode="layers")
    found = heal_layers(teacher, student, {"decoder": [0, 2, 3]}, [batch], [batch], how)
    streams = layerwise.open(model).load().cache(batch)
    first = layerwise.open(model, wiring={"decoder": [0, 2, 3]}).load().cache(batch)
    errors = [
        ((a - b).square().sum() / b.square().sum()).item()
        for a, b in ((first[At(i)], streams[At(j)]) for i, j in ((0, 1), (1, 2), (2, 3)))
    ]
    assert [row["before"] for row in found.rows] == pytest.approx(errors, rel=1e-5)
    assert torch.is_grad_enabled()


def test_layers_one_by_one_are_for_orders_that_only_drop(edited, tmp_path: Path) -> None:
    model, folder = edited([0, 1, 1, 3])
    with pytest.raises(LayerwiseError, match="only left out"):
        heal_folder(model, folder, tmp_path / "out", structs.replace(HOW, mode="layers"))


def test_compress_heals_and_goes_on(tiny, tmp_path: Path, monkeypatch) -> None:
    model = tiny("llama")
    text = plan_for(model, [0, 1, 2, 3]).data.source
    words = ["compress", str(model), "--depth", "3", "--score", "shortgpt", "--samples", "2"]
    words += ["--length", "32", "--documents", "2", "--data", text, "--heal", "8"]
    for setting in ("rank=4", "rate=0.003", "samples=8", "length=32", "every=4"):
        words += ["--set", f"heal.{setting}"]
    monkeypatch.setattr(verification, "speeds", lambda models, batches: [(1.0, 1.0)] * 2)
    monkeypatch.setattr(verification, "peak_memory", lambda folder, dtype: 1)
    note = training.Course.note

    def stopping(self: training.Course, step: int, value: float) -> None:
        note(self, step, value)
        if step == 4:
            raise SystemExit(3)

    monkeypatch.setattr(training.Course, "note", stopping)
    assert CliRunner().invoke(app, [*words, "--out", str(tmp_path / "out")]).exit_code == 3
    monkeypatch.setattr(training.Course, "note", note)
    found = CliRunner().invoke(app, [*words, "--out", str(tmp_path / "out")])
    assert found.exit_code == 0, found.output
    assert "healed for 8 steps" in found.output and "healed equally" in found.output
    assert not list(tmp_path.glob(".out*"))
    plan = layerwise.read_plan(tmp_path / "out" / "plan.yaml")
    assert plan.heal is not None and (plan.heal.steps, plan.heal.rank) == (8, 4)
    apply_healed(model, plan, tmp_path / "again")
    assert Checkpoint(tmp_path / "again").weights == Checkpoint(tmp_path / "out").weights
    wrong = ["compress", str(model), "--bits", "4", "--heal", "8", "--out", str(tmp_path / "no")]
    assert "rounded weights" in CliRunner().invoke(app, wrong).output


def test_it_stops_early_and_keeps_the_best(tiny) -> None:
    teacher, student = (layerwise.open(tiny("llama")).load() for _ in range(2))
    batch = {"input_ids": torch.arange(3, 27).reshape(2, 12)}
    how = Heal(steps=40, rank=2, rate=0.5, every=1, patience=2)
    found = training.heal(teacher, student, [batch], [batch], how)
    assert [row["step"] for row in found.rows] == [0, 1, 2]
    own = dict(student.module.named_parameters())
    assert all(torch.equal(t, own[name]) for name, t in found.tensors.items())


def test_a_step_is_that_of_the_definition(tiny) -> None:
    """One step of AdamW from zero moves each entry of `B` by the rate against its gradient."""
    teacher = layerwise.open(tiny("llama")).load()
    student = layerwise.open(tiny("llama"), wiring={"decoder": [0, 1, 3]}).load()
    batch = {"input_ids": torch.arange(3, 27).reshape(2, 12)}
    how = Heal(steps=1, rank=2, rate=1e-4, every=1)
    found = training.heal(teacher, student, [batch], [batch], how)
    name = "model.layers.0.mlp.down_proj.weight"
    weight = student.module.get_parameter(name)
    a = training.additions(student, 2, 0)[name][1]
    b = torch.zeros(weight.shape[0], 2, requires_grad=True)
    p = teacher.run(batch).logits.softmax(-1)
    q = torch.func.functional_call(student.module, {name: weight + b @ a}, (), batch).logits
    loss = (p * (p.log() - q.log_softmax(-1))).sum(-1).mean()
    (gradient,) = torch.autograd.grad(loss, [b])
    moved = -how.rate * gradient / (gradient.abs() + 1e-8)
    torch.testing.assert_close(found.tensors[name], weight + moved @ a, rtol=1e-4, atol=1e-6)


def test_one_clear_error(edited, tiny, tmp_path: Path) -> None:
    model, folder = edited([0, 1, 3])
    heal_folder(model, folder, tmp_path / "out", Heal(steps=0, samples=8, length=32))
    with pytest.raises(LayerwiseError, match="healed before"):
        heal_folder(model, tmp_path / "out", tmp_path / "twice", HOW)
    edits = (Edit("*", (Step("rtn", {"bits": 4}),)),)
    plan = plan_for(model, [0, 1, 3], edits=edits)
    apply_plan(model, plan, tmp_path / "rounded")
    with pytest.raises(LayerwiseError, match="rounded weights"):
        heal_folder(model, tmp_path / "rounded", tmp_path / "no", HOW)
    with pytest.raises(LayerwiseError, match="plan, model structure"):
        heal_folder(tiny("gpt2"), folder, tmp_path / "no", HOW)
    words = ["heal", str(model), str(folder), "--out", str(tmp_path / "no"), "--set"]
    for setting in ("heal.ranks=2", "heal.rank=0", "gptq.bits=3"):
        found = CliRunner().invoke(app, [*words, setting])
        assert found.exit_code == 2
        assert "heal.rank, heal.rate" in " ".join(found.output.split())
    assert not (tmp_path / "no").exists()


def test_the_command(edited, tmp_path: Path) -> None:
    model, folder = edited([0, 1, 3])
    words = ["--steps", "2", "--set", "heal.samples=4", "--set", "heal.length=32"]
    found = CliRunner().invoke(
        app, ["heal", str(model), str(folder), "--out", str(tmp_path / "out"), *words]
    )
    assert found.exit_code == 0, found.output
    assert "the checkpoint is in" in found.output
    assert "healed for 2 steps" in (tmp_path / "out" / "README.md").read_text()
    words = ["--documents", "2", "--length", "32", "--no-naive", "--no-speed", "--no-memory"]
    checked = CliRunner().invoke(app, ["verify", str(model), str(tmp_path / "out"), *words])
    assert checked.exit_code == 0, checked.output
