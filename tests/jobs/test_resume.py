"""A killed job goes on where it was and ends with the same bytes."""

import subprocess
import sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from layerwise.core.plan import DataSpec
from layerwise.jobs.plan import Request, make_plan
from layerwise.jobs.session import Budget


def test_twenty_kills(tmp_path: Path, tokenizer_into) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = tmp_path / "model"
    LlamaForCausalLM(config).save_pretrained(model)
    tokenizer_into(model)
    request = Request(
        str(model), Budget(bits=3.5), allocator="uniform", data=DataSpec(samples=32, length=64)
    )
    plan = tmp_path / "plan.yaml"
    make_plan(request).plan.save(plan)
    worker = Path(__file__).with_name("kill_worker.py")
    done = subprocess.run(
        [sys.executable, str(worker), str(model), str(plan), str(tmp_path), "20"],
        capture_output=True,
        text=True,
        check=True,
    )
    kills, inside, twice, different = map(int, done.stdout.split())
    assert kills >= 20
    assert inside >= 15
    assert twice == 0
    assert different == 0
