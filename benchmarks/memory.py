"""Peak memory of `apply` as the network gets deeper: it must stay flat."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

from benchmarks.timing import table
from layerwise.core.folder import demo_folder

DEPTHS = (4, 8, 16)

WORKER = """
import sys, torch
from pathlib import Path
from layerwise.core.plan import DataSpec, Edit, Identity, Plan, Step
from layerwise.core.checkpoint import Checkpoint
from layerwise.jobs.apply import apply_plan
from layerwise.jobs.measure import PeakMemory
model, out = sys.argv[1:]
held = Checkpoint(Path(model))
plan = Plan(
    model=Identity(held.structure, held.weights),
    data=DataSpec(samples=4, length=128),
    edits=(Edit("*", (Step("gptq", {"bits": 4, "group": 128}),)),),
)
with PeakMemory() as memory:
    apply_plan(model, plan, Path(out))
print(memory.peak - memory.start)
"""


def random_llama(folder: Path, depth: int) -> int:
    """A random checkpoint, one shard a layer; returns its bytes."""
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=depth,
        num_attention_heads=16,
        num_key_value_heads=16,
        architectures=["LlamaForCausalLM"],
        dtype="float32",
    )
    config.save_pretrained(folder)
    where, total = {}, 0
    for number in range(depth + 1):
        names = {}
        if number == depth:
            names["model.embed_tokens.weight"] = (2048, 1024)
            names["model.norm.weight"] = (1024,)
            names["lm_head.weight"] = (2048, 1024)
        else:
            prefix = f"model.layers.{number}."
            for part in ("q", "k", "v", "o"):
                names[f"{prefix}self_attn.{part}_proj.weight"] = (1024, 1024)
            for part, shape in (
                ("gate", (4096, 1024)),
                ("up", (4096, 1024)),
                ("down", (1024, 4096)),
            ):
                names[f"{prefix}mlp.{part}_proj.weight"] = shape
            for part in ("input_layernorm", "post_attention_layernorm"):
                names[f"{prefix}{part}.weight"] = (1024,)
        generator = torch.Generator().manual_seed(number)
        tensors = {n: 0.02 * torch.randn(s, generator=generator) for n, s in names.items()}
        file = f"model-{number:05d}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(tensors, file)
        total += sum(t.nbytes for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((demo_folder() / name).read_bytes())
    return total


def main() -> None:
    """Print the table."""
    rows = []
    for depth in DEPTHS:
        with tempfile.TemporaryDirectory() as name:
            model = Path(name) / "model"
            model.mkdir()
            total = random_llama(model, depth)
            done = subprocess.run(
                [sys.executable, "-c", WORKER, str(model), str(Path(name) / "out")],
                capture_output=True,
                text=True,
                check=True,
            )
            peak = int(done.stdout.strip().splitlines()[-1])
            rows.append((depth, f"{total / 1e6:.0f} MB", f"{peak / 1e6:.0f} MB"))
    header = ("layers", "checkpoint", "peak over the idle process")
    table("Memory of apply (GPTQ, streamed, float32)", header, rows)
