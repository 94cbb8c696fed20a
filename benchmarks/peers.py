"""GPTQ of a whole model beside llm-compressor and GPTQModel: seconds, and the loss after it.

    python -m benchmarks.peers FOLDER             virtual environments; made there if there are none
    python -m benchmarks.peers FOLDER float32     stored in one dtype

The same checkpoint, the same windows of text, 4 bits, symmetric, groups of 128, damping 0.01,
columns in the order of their inputs with grids fitted beforehand, full ranges, as many threads, the
dtype of the checkpoint, which is stored in bfloat16 and in float32. Each runs in a process of its
own; the clock runs from the loaded text to the written folder, without imports. All three are
loaded again and asked for the loss in the same way, by the code of its own environment.

In which dtype a tool computes is up to it: on a processor without instructions for bfloat16
layerwise takes float32.
"""

import shutil
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from benchmarks.apart import environment, found_by
from benchmarks.models import Model, models
from benchmarks.timing import table
from layerwise.core.data import Texts
from layerwise.core.folder import find_folder
from layerwise.core.open import open_network
from layerwise.core.reader import samples_of, windows
from layerwise.jobs.session import load_reader

#: what every environment has as this one has it
SAME = (f"torch=={torch.__version__.partition('+')[0]}", "safetensors")
SAMPLES, LENGTH, DOCUMENTS, THREADS = 64, 256, 32, 1
KINDS = ("bfloat16", "float32")

#: around what each of them does: text in, seconds and loss out
FRAME = """
import json, sys, time
import torch
from safetensors.torch import load_file
torch.set_num_threads(int(sys.argv[4]))
folder, out = sys.argv[1], sys.argv[2]
text = load_file(sys.argv[3])
rows = list(text["calibrate"])
documents = [text[k] for k in sorted(text) if k.startswith("evaluate")]
{imports}
began = time.perf_counter()
{work}
seconds = time.perf_counter() - began
{load}
loss = count = 0.0
with torch.no_grad():
    for ids in documents:
        logits = model(ids[None]).logits[0, :-1].float()
        loss += torch.nn.functional.cross_entropy(logits, ids[1:], reduction="sum").item()
        count += len(ids) - 1
print("FOUND" + json.dumps({"seconds": seconds, "loss": loss / count, "version": version}))
"""

OURS = {
    "imports": """
import layerwise
from pathlib import Path
from transformers import AutoModelForCausalLM
from layerwise.core.checkpoint import Checkpoint
from layerwise.core.plan import DataSpec, Edit, Identity, Plan, Step
from layerwise.jobs import apply as job
job.windows = lambda *given: [{"input_ids": ids} for ids in torch.stack(rows).split(8)]
version = layerwise.__version__
""",
    "work": """
held = Checkpoint(Path(folder))
step = Step("gptq", {"bits": 4, "group": 128, "shrink": False})
plan = Plan(
    Identity(held.structure, held.weights), target="compressed-tensors", edits=(Edit("*", (step,)),)
)
job.apply_plan(folder, plan, Path(out), check=False)
""",
    "load": 'model = AutoModelForCausalLM.from_pretrained(out, dtype="auto")',
}
LLM_COMPRESSOR = {
    "imports": """
from datasets import Dataset
from llmcompressor import oneshot, __version__ as version
from llmcompressor.modifiers.quantization import GPTQModifier
from transformers import AutoModelForCausalLM
""",
    "work": """
model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
held = Dataset.from_list(
    [{"input_ids": r.tolist(), "attention_mask": [1] * len(r)} for r in rows]
)
weights = {
    "num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128,
    "observer": "memoryless_minmax", "actorder": "static",
}
recipe = GPTQModifier(
    config_groups={"all": {"targets": ["Linear"], "weights": weights}},
    ignore=["lm_head"],
    dampening_frac=0.01,
)
oneshot(
    model=model, dataset=held, recipe=recipe, max_seq_length=len(rows[0]),
    num_calibration_samples=len(rows), shuffle_calibration_samples=False,
)
model.save_pretrained(out, save_compressed=True)
""",
    "load": 'model = AutoModelForCausalLM.from_pretrained(out, dtype="auto")',
}
GPTQ_MODEL = {
    "imports": """
import gptqmodel
gptqmodel._default_cpu_workers = lambda: 2
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
version = gptqmodel.__version__
""",
    "work": """
config = QuantizeConfig(bits=4, group_size=128, sym=True, desc_act=False, damp_percent=0.01)
model = GPTQModel.load(folder, config)
model.quantize(
    [{"input_ids": r.tolist(), "attention_mask": [1] * len(r)} for r in rows], batch_size=8
)
model.save(out)
""",
    "load": 'model = GPTQModel.load(out, device="cpu", backend=BACKEND.TORCH)',
}
PEERS: dict[str, tuple[dict[str, str], tuple[str, ...]]] = {
    "llm-compressor": (LLM_COMPRESSOR, ("llmcompressor",)),
    "GPTQModel": (GPTQ_MODEL, ("gptqmodel",)),
}


def measured(python: Path, code: dict[str, str], folder: Path, text: Path) -> dict[str, Any]:
    """What one of them says, or the end of its error."""
    script = FRAME
    for name, lines in code.items():
        script = script.replace(f"{{{name}}}", lines)
    env = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(THREADS)}
    with TemporaryDirectory() as place:
        words = folder, Path(place, "out"), text, THREADS
        return found_by(python, script, *words, cwd=place, env=env)


def text_of(model: Model, path: Path) -> None:
    """Windows to calibrate on and documents to evaluate on, as tokens."""
    reader = load_reader(open_network(model.folder))
    found = windows(reader, Texts(model.data, 0, SAMPLES, LENGTH), "calibrate")
    held = samples_of(reader, Texts(model.data, 0, 0, LENGTH), "evaluate", DOCUMENTS)
    tokens = {"calibrate": torch.cat([b["input_ids"] for b in found])}
    tokens |= {f"evaluate{i:03d}": b["input_ids"][0].clone() for i, b in enumerate(held)}
    save_file(tokens, path)


def main(folder: str, *kinds: str, repeats: int = 3) -> None:
    """Print a table per model and dtype: the middle of some runs, taken in turn, and their span."""
    runs = {"layerwise": (Path(sys.executable), OURS)}
    for name, (code, packages) in PEERS.items():
        place_of = Path(folder, name).resolve()
        runs[name] = (environment(place_of, (*SAME, *packages)), code)
    for model in models():
        for kind in kinds or KINDS:
            with TemporaryDirectory() as place:
                text, held = Path(place, "text.safetensors"), Path(place, "model")
                text_of(model, text)
                stored_as(find_folder(model.folder), held, kind)
                found: dict[str, list[dict[str, Any]]] = {name: [] for name in runs}
                for _ in range(repeats):
                    for name, (python, code) in runs.items():
                        found[name].append(measured(python, code, held, text))
                        print(model.name, kind, name, found[name][-1], file=sys.stderr)
            _print(f"{model.name} model in {kind}", found)


def stored_as(folder: Path, copy: Path, kind: str) -> None:
    """A copy of a model folder with its weights in another dtype."""
    shutil.copytree(folder, copy)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, kind))
    model.save_pretrained(copy)


def _print(title: str, found: dict[str, list[dict[str, Any]]]) -> None:
    middle = {
        name: sorted(r["seconds"] for r in runs)[len(runs) // 2]
        for name, runs in found.items()
        if all("seconds" in r for r in runs)
    }
    rows = []
    for name, runs in found.items():
        if name not in middle:
            rows.append((name, "", next(r["error"] for r in runs if "error" in r), "", ""))
            continue
        seconds = [r["seconds"] for r in runs]
        span = f"{middle[name]:.1f} ({min(seconds):.1f} to {max(seconds):.1f})"
        over = f"{middle[name] / middle['layerwise']:.1f}"
        rows.append((name, runs[0]["version"], span, over, f"{runs[0]['loss']:.4f}"))
    header = ("by", "version", "seconds", "over layerwise", "loss after")
    table(f"GPTQ at 4 bits, {title}, beside peers", header, rows)


if __name__ == "__main__":
    main(*sys.argv[1:] or ("out/peers",))
