"""Nothing is lost and nothing half-written looks whole: full disks, signals, two runs at once."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from layerwise.cli import app
from layerwise.core import machine
from layerwise.core.checkpoint import Checkpoint
from layerwise.core.errors import LayerwiseError
from layerwise.core.journal import Journal
from layerwise.core.plan import DataSpec, Edit, Identity, Plan, Step
from layerwise.jobs import checks
from layerwise.jobs.apply import apply_plan, beside

SMALL = DataSpec(samples=4, length=32)


def plan_of(model: Path, method: str = "gptq", data: DataSpec = SMALL) -> Plan:
    held = Checkpoint(model)
    edits = (Edit("*", (Step(method, {"bits": 4, "group": 32}),)),)
    return Plan(model=Identity(held.structure, held.weights), data=data, edits=edits)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a file system is not allowed here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(disk: Path, left: int) -> Path:
    """Take all but so many bytes of a disk."""
    ballast = disk / "ballast"
    ballast.write_bytes(bytes(shutil.disk_usage(disk).free - left))
    return ballast


def test_a_disk_that_is_too_small_is_refused_before_the_first_layer(
    tiny, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(small_disk, 100_000)
    monkeypatch.setattr(Journal, "write", lambda *args: pytest.fail("a layer was solved"))
    with pytest.raises(LayerwiseError, match=r"free.*needed: result .* journal"):
        apply_plan(tiny("llama"), plan_of(tiny("llama")), small_disk / "out")
    assert [p.name for p in small_disk.iterdir()] == ["ballast"]


@pytest.mark.parametrize("method", ["gptq", "rtn"])
def test_a_disk_that_fills_up_leaves_a_journal_to_go_on_from(
    tiny, small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    model, plan = tiny("llama"), plan_of(tiny("llama"), method)
    apply_plan(model, plan, tmp_path / "whole")
    ballast = fill(small_disk, 300_000)
    monkeypatch.setattr("layerwise.jobs.apply.check_disk", lambda *args: None)
    monkeypatch.setattr("layerwise.jobs.solve.QUICK", 0.0)
    with pytest.raises(OSError) as raised:
        apply_plan(model, plan, small_disk / "out")
    assert raised.value.errno == errno.ENOSPC
    assert "free some space" in str(machine.told(raised.value))
    assert not (small_disk / "out").exists()
    lines = (beside(small_disk / "out", "journal") / "journal.jsonl").read_text().splitlines()
    kept = sum(line.startswith('{"layer"') and line.endswith("}") for line in lines)
    assert kept > 0
    ballast.unlink()
    solved: list[str] = []
    write = Journal.write
    monkeypatch.setattr(
        Journal,
        "write",
        lambda self, layer, *rest: (solved.append(layer), write(self, layer, *rest)),
    )
    apply_plan(model, plan, small_disk / "out")
    assert len(solved) == 4 - kept
    assert contents(small_disk / "out") == contents(tmp_path / "whole")


def test_the_command_line_says_it_in_one_line(tiny, small_disk: Path, tmp_path: Path) -> None:
    plan = tmp_path / "plan.yaml"
    plan_of(tiny("llama")).save(plan)
    fill(small_disk, 100_000)
    found = CliRunner().invoke(
        app, ["apply", str(tiny("llama")), str(plan), "--out", str(small_disk / "out")]
    )
    assert found.exit_code == 2
    assert len(found.stderr.strip().splitlines()) == 1
    assert "Traceback" not in found.output


def test_too_little_memory_is_forecast(tiny, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(machine, "available_memory", lambda: 50_000)
    with pytest.raises(LayerwiseError, match=r"memory: .*needed: a layer and its edits .*hidden"):
        apply_plan(tiny("llama"), plan_of(tiny("llama")), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_two_runs_on_one_folder(tiny, tmp_path: Path) -> None:
    model, plan = tiny("llama"), plan_of(tiny("llama"))
    held = Journal(beside(tmp_path / "out", "journal"), {})
    with pytest.raises(LayerwiseError, match="another run"):
        apply_plan(model, plan, tmp_path / "out")
    held.remove()
    apply_plan(model, plan, tmp_path / "out")


def test_a_read_only_place(tiny, tmp_path: Path) -> None:
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a file system is not allowed here")
    try:
        plan = tmp_path / "plan.yaml"
        plan_of(tiny("llama")).save(plan)
        arguments = ["apply", str(tiny("llama")), str(plan), "--out", str(folder / "out")]
        found = CliRunner().invoke(app, arguments)
        assert found.exit_code == 2
        assert "Read-only file system" in found.stderr or "free" in found.stderr
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_inputs_that_changed_between_stop_and_resume(tiny, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny("llama"), model)
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"line {i} of {i * i}" * 20 for i in range(400)))
    plan = plan_of(model, data=DataSpec(source=str(text), samples=4, length=32))
    out = tmp_path / "out"
    stopped = pytest.MonkeyPatch()
    stopped.setattr(Journal, "write", _stop_after_two(Journal.write))
    with pytest.raises(KeyboardInterrupt):
        apply_plan(model, plan, out)
    stopped.undo()
    whole = text.read_text()
    text.write_text(whole.replace("line", "row"))
    with pytest.raises(LayerwiseError, match="a change in data"):
        apply_plan(model, plan, out)
    text.write_text(whole)
    weights = load_file(model / "model.safetensors")
    save_file({k: 2 * v for k, v in weights.items()}, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(LayerwiseError, match="weights"):
        apply_plan(model, plan, out)
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    apply_plan(model, plan, out)


def _stop_after_two(write):
    count = iter(range(1, 100))

    def stopping(self, *args) -> None:
        write(self, *args)
        if next(count) == 2:
            raise KeyboardInterrupt

    return stopping


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_a_journal(tiny, tmp_path: Path, number: int) -> None:
    model, file, out = tiny("llama"), tmp_path / "plan.yaml", tmp_path / "out"
    plan = plan_of(model, data=DataSpec(samples=32, length=128))
    plan.save(file)
    command = [sys.executable, "-m", "layerwise.cli", "apply", str(model), str(file)]
    process = subprocess.Popen(
        [*command, "--out", str(out)],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    journal = beside(out, "journal") / "journal.jsonl"
    while process.poll() is None and (
        not journal.exists() or journal.read_bytes().count(b'{"layer"') < 1
    ):
        time.sleep(0.002)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + number, said
    assert said.strip().splitlines()[-1] == "stopped; the same command goes on where it was"
    assert not out.exists()
    apply_plan(model, plan, out)


def test_a_result_that_reloads_as_something_else_gets_no_name(
    tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(*args: object) -> torch.nn.Module:
        module = load(*args)
        module.get_input_embeddings().weight.data.mul_(1.5)
        return module

    load = checks.load_stock
    monkeypatch.setattr(checks, "load_stock", wrong)
    with pytest.raises(LayerwiseError, match="gives the logits of the model that was written"):
        apply_plan(tiny("llama"), plan_of(tiny("llama")), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_decoding_that_differs_with_a_cache_gets_no_name(
    tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny("llama")
    counts = iter([(3, 32), (32, 32)])
    monkeypatch.setattr(checks, "agrees_cached", lambda *args: next(counts))
    with pytest.raises(LayerwiseError, match="3 of 32 tokens"):
        apply_plan(model, plan_of(model), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    counts = iter([(3, 32), (3, 32)])
    applied = apply_plan(model, plan_of(model), tmp_path / "out")
    assert applied.warnings == [
        "cached equals uncached greedy decoding: 3 of 32 tokens, as in the original"
    ]
