"""What the core costs, each beside what it cannot be cheaper than."""

import subprocess
import sys
import time
from functools import partial

import numpy as np
import torch
from scipy.linalg.blas import ssyrk
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.timing import interleaved, table
from layerwise.core.data import Texts
from layerwise.core.find import find_stacks
from layerwise.core.hollow import build_hollow
from layerwise.core.lockstep import walk
from layerwise.core.network import Network
from layerwise.core.open import open_network
from layerwise.core.reader import windows
from layerwise.core.stats import observe
from layerwise.core.stops import Stop
from layerwise.edit.weight.gptq import gptq
from layerwise.jobs.session import load_reader
from layerwise.measure import residual_cosine, second_moment, update_norm


def main() -> None:
    """Print all tables."""
    start()
    finding()
    inspecting()
    solving()


def start() -> None:
    """`layerwise --help` and what it imports."""
    command = [sys.executable, "-m", "layerwise.cli", "--help"]
    found = interleaved({"help": lambda: subprocess.run(command, capture_output=True)})
    listing = [sys.executable, "-X", "importtime", *command[1:]]
    loaded = subprocess.run(listing, capture_output=True, text=True).stderr
    torch_too = any(line.rstrip().endswith(" torch") for line in loaded.splitlines())
    seconds, spread = found["help"]
    rows = [(f"{seconds:.2f} ± {spread:.2f} s", "0.5 s", "yes" if torch_too else "no")]
    table("layerwise --help", ("time", "goal", "imports torch"), rows)


def finding() -> None:
    """Finding the stack of an 80-layer model without weights."""
    config = LlamaConfig(
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=128_256,
    )
    times = []
    for _ in range(5):
        began = time.perf_counter()
        model = build_hollow(LlamaForCausalLM, config, torch.bfloat16)
        ids = torch.arange(14).reshape(2, 7)
        run = partial(model, input_ids=ids, use_cache=False)
        layers = len(find_stacks(model, run)[0].layers)
        times.append(time.perf_counter() - began)
    row = (f"{sorted(times)[2]:.2f} s", f"{min(times):.2f} s", "2 s", layers)
    table("Building and finding a 70B-shaped stack", ("median", "best", "goal", "layers"), [row])


def _ignore(stop: Stop) -> None:
    pass


def _through(network: Network, batches: list) -> None:
    """The forward as far as the last layer, without the head."""
    base = network.module.model  # type: ignore[union-attr]
    with torch.no_grad():
        for batch in batches:
            base(**batch, use_cache=False)


def inspecting() -> None:
    """One pass with probes over one plain forward of the same batches."""
    network = open_network("demo", dtype="float32").load()
    batches = windows(load_reader(open_network("demo")), Texts(samples=16, length=512), "calibrate")
    cheap = {"cosine": residual_cosine(), "norm": update_norm()}

    def moments_alone() -> None:
        for seen in held:
            total = torch.zeros(seen[0].shape[-1], seen[0].shape[-1])
            for x in seen:
                torch.addmm(total, x.T, x)

    found: dict[str, list] = {}
    for stop in walk(network, batches, matrices="watch"):
        if stop.kind == "at":
            for rows in stop.rows:
                found.setdefault(rows.inputs, []).extend(x.float() for x in rows.edited.values())
    held = list(found.values())

    def updates_alone() -> None:
        for seen in held:
            total = np.zeros((seen[0].shape[-1],) * 2, dtype=np.float32, order="F")
            for x in seen:
                ssyrk(1.0, x.numpy().T, beta=1.0, c=total, overwrite_c=True)

    times = interleaved(
        {
            "forward": lambda: _through(network, batches),
            "inspect": lambda: observe(network, batches, cheap),
            "with moments": lambda: observe(network, batches, {"m": second_moment()}),
            "moments alone": moments_alone,
            "updates alone": updates_alone,
        },
        repeats=5,
    )
    forward, moments = times["forward"][0], times["moments alone"][0]
    updates = times["updates alone"][0]
    extra = times["with moments"][0] - forward
    rows = [
        ("inspect / plain forward", f"{times['inspect'][0] / forward:.2f}", "1.3"),
        ("second moments / their full products", f"{extra / moments:.2f}", ""),
        ("second moments / symmetric rank-k updates", f"{extra / updates:.2f}", "1.5"),
        ("second moments + forward / forward", f"{times['with moments'][0] / forward:.2f}", ""),
    ]
    table("One pass over 16 x 512 tokens, demo model, float32", ("what", "ratio", "goal"), rows)


def solving(size: int = 4096) -> None:
    """GPTQ of a square matrix over the work that it cannot avoid."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2 * size, size, generator=generator)
    hessian = x.T @ x / len(x)
    weight = torch.randn(size, size, generator=generator)

    def floor() -> None:
        damped = hessian.clone()
        damped.diagonal().add_(0.01)
        lower = torch.linalg.cholesky(damped)
        factor = torch.linalg.solve_triangular(lower, torch.eye(size), upper=False)
        flow = weight.T.contiguous()
        for start in range(0, size - 128, 128):
            stop = start + 128
            flow[stop:].addmm_(factor[start:stop, stop:].T, flow[start:stop], alpha=-1e-9)

    tasks = {
        "floor": floor,
        "gptq": lambda: gptq(weight, {"second_moment": hessian}, bits=4, group=128),
    }
    times = interleaved(tasks, repeats=3)
    ratio = times["gptq"][0] / times["floor"][0]
    row = (f"{times['gptq'][0]:.1f} s", f"{times['floor'][0]:.1f} s", f"{ratio:.2f}", "2")
    table(
        f"GPTQ of {size} x {size}",
        ("gptq", "Cholesky + inverse factor + update products", "ratio", "goal"),
        [row],
    )
