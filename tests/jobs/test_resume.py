"""A killed job goes on where it was and ends with the same bytes."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from layerwise.core.folder import demo_folder
from layerwise.core.plan import DataSpec
from layerwise.jobs.plan import Request, make_plan
from layerwise.jobs.session import Budget


def test_twenty_kills(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=8,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    model = tmp_path / "model"
    LlamaForCausalLM(config).save_pretrained(model)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo_folder() / name, model)
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"line {i} of {i * i}" * 20 for i in range(400)))
    data = DataSpec(source=str(text), samples=16, length=32)
    settings = {"menu": {"group": [32]}}
    request = Request(
        str(model), Budget(bits=4.5), allocator="uniform", data=data, settings=settings
    )
    plan = tmp_path / "plan.yaml"
    make_plan(request).plan.save(plan)
    worker = Path(__file__).with_name("kill_worker.py")
    done = subprocess.run(
        [sys.executable, str(worker), str(model), str(plan), str(tmp_path), "20"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    kills, inside, twice, different = map(int, done.stdout.split())
    assert kills == 20
    assert inside >= 15
    assert twice == 0
    assert different == 0
