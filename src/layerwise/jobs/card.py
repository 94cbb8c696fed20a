"""The model card of a written folder."""

from pathlib import Path

from layerwise.core.machine import write_whole
from layerwise.core.plan import Plan, describe
from layerwise.export import TARGETS
from layerwise.jobs.verify import Verified
from layerwise.report.terminal import show, show_bytes

_HOW = {
    "transformers": """```python
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("{}")
```""",
    "layerwise": """```sh
layerwise run {} "..."
```

The layers are held once each, edited matrices as `records.json` says; `wiring.yaml` says in which
order they run. Stock engines read neither and would compute something else, if anything.""",
    "llama.cpp": """```sh
llama-cli -m {}/model.gguf
```""",
}


def write_card(folder: Path, model: str, plan: Plan, verified: Verified | None = None) -> None:
    """Say what the folder is, how to load it, and, once verified, what it cost."""
    engine = TARGETS[plan.target].engine
    budget = ", ".join(f"--{key} {value:g}" for key, value in plan.budget.items())
    lines = [
        "---",
        f"library_name: {engine}",
        "tags: [layerwise]",
        "---",
        f"# {folder.name}",
        "",
        f"Made from `{model}` with layerwise, {budget or 'by hand'}: {describe(plan)}.",
        "",
        *_HOW[engine].format(folder.name).splitlines(),
    ]
    if verified is None:
        lines += ["", "Not verified yet: `layerwise verify`."]
    else:
        lines += ["", verified.verdict, "", "| model | size | loss | KL to the original |"]
        lines.append("|---|---|---|---|")
        for row in verified.rows:
            cells = (row["name"], show_bytes(row["bytes"]), show(row["loss"]), show(row["kl"]))
            lines.append("| " + " | ".join(cells) + " |")
    write_whole(folder / "README.md", "\n".join(lines) + "\n")
