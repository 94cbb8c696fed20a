"""A network of 1 GB and one of 8 GB with the same layers: peak memory, and time over the floor."""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.memory import random_llama
from benchmarks.timing import table
from layerwise.core.shards import forget

DEPTHS = (20, 120)
#: on a disk, which the folder for temporary files need not be
OUT = Path(__file__).parents[1] / "out"

COMPRESS = """
import sys
from typer.testing import CliRunner
from layerwise.cli import app
from layerwise.jobs.measure import PeakMemory
model, out = sys.argv[1:]
arguments = f"compress {model} --out {out} --bits 4.2 --method rtn --allocator uniform"
arguments += " --streamed --no-check --samples 4 --length 128 --documents 4"
with PeakMemory() as memory:
    found = CliRunner().invoke(app, arguments.split())
assert found.exit_code == 0, found.output
print(memory.peak - memory.start)
"""

#: what planning leaves behind: the sha256 of the weights, in the user's cache
PLANNED = """
import sys
from pathlib import Path
from layerwise.core.checkpoint import Checkpoint
print(Checkpoint(Path(sys.argv[1])).weights)
"""

APPLY = """
import os, sys, time
from pathlib import Path
from typer.testing import CliRunner
from layerwise.cli import app
from layerwise.core.checkpoint import Checkpoint
from layerwise.core.plan import Edit, Identity, Plan, Step
import layerwise.jobs.heal
from layerwise.jobs.measure import PeakMemory
model, out, target = sys.argv[1:]
held = Checkpoint(Path(model))
began = time.perf_counter()
with PeakMemory() as memory:
    plan = Plan(
        model=Identity(held.structure, held.weights),
        target=target,
        edits=(Edit("*", (Step("rtn", {"bits": 4, "group": 128}),)),),
    )
    plan.save(Path(out + ".yaml"))
    done = CliRunner().invoke(app, ["apply", model, out + ".yaml", "--out", out, "--no-check"])
    assert done.exit_code == 0, done.output
    os.sync()
nbytes = sum(path.stat().st_size for path in Path(out).glob("*.safetensors"))
print(time.perf_counter() - began, nbytes, memory.peak - memory.start)
"""


def forget_all(folder: Path) -> None:
    """Drop a folder's files from the page cache, so that they are read from the disk."""
    os.sync()
    for path in folder.iterdir():
        with path.open("rb") as file:
            forget(file.fileno())


def read_rate(folder: Path) -> float:
    """Bytes per second of reading a folder's files from the disk, one after another."""
    forget_all(folder)
    total, began = 0, time.perf_counter()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while data := file.read(1 << 24):
                total += len(data)
    return total / (time.perf_counter() - began)


def write_rate(folder: Path, nbytes: int) -> float:
    """Bytes per second of writing so many bytes until they are on the disk."""
    block = os.urandom(1 << 24)
    began = time.perf_counter()
    with (folder / "rate").open("wb", buffering=0) as file:
        for _ in range(nbytes >> 24):
            file.write(block)
        os.fsync(file.fileno())
    seconds = time.perf_counter() - began
    (folder / "rate").unlink()
    return (nbytes >> 24 << 24) / seconds


def product_rate() -> float:
    """Multiplications and additions per second of a product as wide as a layer's."""
    a, b = torch.randn(1024, 1024), torch.randn(1024, 4096)
    a @ b
    began = time.perf_counter()
    for _ in range(5):
        a @ b
    return 5 * 2 * 1024 * 1024 * 4096 / (time.perf_counter() - began)


def run(worker: str, *arguments: str) -> list[str]:
    """What a fresh process printed last."""
    done = subprocess.run(
        [sys.executable, "-c", worker, *arguments], capture_output=True, text=True, check=True
    )
    return done.stdout.strip().splitlines()[-1].split()


def main() -> None:
    """Print both tables."""
    OUT.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=OUT) as name:
        place = Path(name)
        os.environ["XDG_CACHE_HOME"] = str(place / "cache")
        memory, speed = [], []
        for depth in DEPTHS:
            model = place / f"model-{depth}"
            model.mkdir()
            total = random_llama(model, depth)
            (peak,) = run(COMPRESS, str(model), str(place / "small"))
            memory.append((depth, f"{total / 1e9:.2f} GB", f"{int(peak) / 1e6:.0f} MB"))
            shutil.rmtree(place / "small")
            if depth == DEPTHS[-1]:
                speed = [throughput(place, model, total, t) for t in ("hf", "compressed-tensors")]
            shutil.rmtree(model)
    header = ("layers", "checkpoint", "peak over the idle process")
    table("Memory of compress (round to nearest, streamed, float32)", header, memory)
    table("apply, round to nearest, from the disk to the disk", SPEED, speed)


SPEED = ("target", "read", "written", "floor", "apply", "ratio", "peak")


def throughput(place: Path, model: Path, total: int, target: str) -> tuple[str, ...]:
    """Time of `apply` over reading the input once and writing the output once.

    Not counted is what the program itself is loaded in. The disk's rate is that of as many bytes:
    the first ones are written faster.
    """
    run(PLANNED, str(model))
    reading, products = read_rate(model), product_rate()
    forget_all(model)
    seconds, written, peak = map(float, run(APPLY, str(model), str(place / target), target))
    shutil.rmtree(place / target)
    os.sync()
    writing = write_rate(place, int(written))
    floor = total / reading + written / writing + 2 * 32 * total / 4 / products
    return (
        target,
        f"{total / 1e9:.2f} GB at {reading / 1e9:.2f} GB/s",
        f"{written / 1e9:.2f} GB at {writing / 1e9:.2f} GB/s",
        f"{floor:.1f} s",
        f"{seconds:.1f} s",
        f"{seconds / floor:.2f}",
        f"{peak / 1e6:.0f} MB",
    )
