"""`make bench`: every figure of the documentation, each from its own table.

python -m benchmarks              all of them
python -m benchmarks core memory  some
python -m benchmarks --write      all of them, into docs/measured.md
"""

import importlib
import os
import platform
import sys
from pathlib import Path

import torch
import transformers

from benchmarks.timing import PRINTED

NAMES = (
    "core",
    "memory",
    "scale",
    "allocation",
    "solvers",
    "sparsity",
    "activation",
    "inspect",
    "interventions",
    "heal",
    "gguf",
)
PAGE = Path(__file__).parents[1] / "docs" / "measured.md"


def written() -> str:
    """The page of all tables, and the machine that they were measured on."""
    machine = (
        f"{os.cpu_count()} cores, {platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"
    )
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    lines = [
        "# What was measured",
        "",
        f"`python -m benchmarks --write` on {machine}, {versions}.",
        "Times are medians of interleaved repetitions; ratios were taken in one run. Intervals are",
        "95% over documents. The second model is GPT-2-shaped and was trained on documentation;",
        "nothing is tuned on it.",
    ]
    return "\n".join((*lines, *PRINTED)) + "\n"


if __name__ == "__main__":
    names = [name for name in sys.argv[1:] if name != "--write"] or NAMES
    for name in names:
        importlib.import_module(f"benchmarks.{name}").main()
    if "--write" in sys.argv:
        PAGE.write_text(written())
