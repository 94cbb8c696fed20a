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
    "loop": "looped",
    "copy": "copied",
    "drafts": "drafts",
    "stock_exit": "stock exit",
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
- **looped**: what was left out runs twice instead, with a cache slot for each time; the logits are
  those of the original given its own state once more, and cached decoding gives the tokens of
  uncached decoding. **copied**: the same with weights of its own.
- **drafts**: two of four layers draft, the rest verifies, and the text is that of plain decoding.
- **stock exit**: what `generate(assistant_early_exit=2)` of stock transformers does there. *yes*:
  fewer layers draft, and the text is the same; *ignored*: all layers do; else the text is another
  one, or it *fails*.

An empty cell has its reason below the table. None of them is a wrong result that looks right:
`apply` and `run` refuse, or the checks of `verify` fail. Where the logits of a loop are not close,
a layer computes something else in its second place, and `run` and `apply` say which one; but those
of Reformer are right: its layers pass on two streams, of which this check puts back one. *stock*
marks what the untouched model of stock transformers does not do either.
"""


def architectures() -> str:
    """Shares, and a table and its reasons per task."""
    known = json.loads(LIST.read_text())
    lines = [INTRODUCTION, *_shares(known)]
    for task, title in TASKS.items():
        mine = {k.partition("/")[2]: v for k, v in known.items() if k.startswith(f"{task}/")}
        built = {name: found for name, found in mine.items() if not found["build"]}
        stages = [stage for stage in STAGES if any(stage in found for found in built.values())]
        header = ("type", *(STAGES[stage] for stage in stages))
        lines += ["", f"## {title}", "", f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
        for name, found in built.items():
            lines.append(f"| {name} | " + " | ".join(_cell(s, found[s]) for s in stages) + " |")
        lines += ["", *_reasons(mine)]
    return "\n".join(lines) + "\n"


def _shares(known: dict[str, dict[str, str]]) -> list[str]:
    lines = ["| | " + " | ".join(("tried", "run", *STAGES.values())) + " |"]
    lines.append("|---" * (len(STAGES) + 3) + "|")
    for task, title in TASKS.items():
        mine = [found for key, found in known.items() if key.startswith(f"{task}/")]
        built = [found for found in mine if not found["build"]]
        counts = [_count(built, stage) for stage in STAGES]
        lines.append(
            f"| {title} | " + " | ".join(map(str, (len(mine), len(built), *counts))) + " |"
        )
    return lines


def _count(built: list[dict[str, str]], stage: str) -> str:
    asked = [found[stage] for found in built if stage in found]
    return str(sum(map(_fine, asked))) if asked else ""


def _fine(reason: str) -> bool:
    return reason == "" or reason.startswith("StockFails")


def _cell(stage: str, reason: str) -> str:
    if reason and stage == "stock_exit":
        told = reason.removeprefix("AssertionError: ")
        return "fails" if told == reason else told.partition(":")[0]
    return "yes" if reason == "" else "stock" if reason.startswith("StockFails") else ""


def _reasons(mine: dict[str, dict[str, str]]) -> list[str]:
    lines = []
    for name, found in mine.items():
        for stage, reason in found.items():
            if reason and stage != "stock_exit":
                label = STAGES.get(stage, "not built")
                lines.append(f"- {name}, {label}: `{reason.replace('`', '')}`")
    return lines
