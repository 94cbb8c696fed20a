"""The page of architectures, out of the list that the test suite keeps."""

import json
from pathlib import Path

LIST = Path(__file__).parents[1] / "tests" / "architectures" / "passes.json"

STAGES = {
    "stack": "stack found",
    "streaming": "streamed",
    "lockstep": "lockstep",
    "rounding": "rounded",
    "drop": "layer dropped",
    "decoding": "decoding",
    "patching": "patched",
    "parts": "parts patched",
}
TASKS = {
    "causal": "Causal language models",
    "masked": "Masked language models",
    "seq2seq": "Sequence to sequence",
    "image": "Image classification",
}
INTRODUCTION = """# Architectures

Nothing in layerwise knows an architecture by name. This list says what was tried: a tiny random
model of every entry of four Auto mappings of transformers, built by one rule over the names of
configuration fields, goes from the file to greedy decoding.

- **stack found**: the chain of layers, cross-checked against `output_hidden_states`.
- **streamed**: weights brought in layer by layer equal those of `from_pretrained`, bit for bit.
- **lockstep**: a walk that pauses at every matrix gives the plain forward's output, bit for bit.
- **rounded**: one group at 4 bits, written, loaded by stock transformers with the same logits.
- **layer dropped**: a middle layer (or a pair, where layers alternate) left out, written, loaded by
  stock transformers with the logits of the original without it.
- **decoding**: after that, greedy decoding with a cache gives the tokens that it gives without.
- **patched**: the stream before and after every layer, captured and put back in its place, gives
  the plain forward's output, bit for bit; other states in the middle do not.
- **parts patched**: the same for what every part adds to the stream.

An empty cell has its reason below the table. None of them is a wrong result that looks right:
`apply` refuses, or the checks of `verify` fail. *stock* marks what the untouched model of stock
transformers does not do either.
"""


def architectures() -> str:
    """Shares, and a table and its reasons per task."""
    known = json.loads(LIST.read_text())
    lines = [INTRODUCTION, *_shares(known)]
    for task, title in TASKS.items():
        mine = {k.partition("/")[2]: v for k, v in known.items() if k.startswith(f"{task}/")}
        lines += ["", f"## {title}", "", "| type | " + " | ".join(STAGES.values()) + " |"]
        lines.append("|---" * (len(STAGES) + 1) + "|")
        built = {name: found for name, found in mine.items() if not found["build"]}
        for name, found in built.items():
            lines.append(f"| {name} | " + " | ".join(_cell(found[s]) for s in STAGES) + " |")
        lines += ["", *_reasons(mine)]
    return "\n".join(lines) + "\n"


def _shares(known: dict[str, dict[str, str]]) -> list[str]:
    lines = ["| | " + " | ".join(("tried", "run", *STAGES.values())) + " |"]
    lines.append("|---" * (len(STAGES) + 3) + "|")
    for task, title in TASKS.items():
        mine = [found for key, found in known.items() if key.startswith(f"{task}/")]
        built = [found for found in mine if not found["build"]]
        counts = [sum(_fine(found[stage]) for found in built) for stage in STAGES]
        lines.append(
            f"| {title} | " + " | ".join(map(str, (len(mine), len(built), *counts))) + " |"
        )
    return lines


def _fine(reason: str) -> bool:
    return reason == "" or reason.startswith("StockFails")


def _cell(reason: str) -> str:
    return "yes" if reason == "" else "stock" if reason.startswith("StockFails") else ""


def _reasons(mine: dict[str, dict[str, str]]) -> list[str]:
    lines = []
    for name, found in mine.items():
        for stage, reason in found.items():
            if reason:
                label = STAGES.get(stage, "not built")
                lines.append(f"- {name}, {label}: `{reason.replace('`', '')}`")
    return lines
