"""From results to the sections of a page."""

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from layerwise.core.machine import write_whole
from layerwise.core.plan import read_plan
from layerwise.export import TARGETS
from layerwise.jobs.verify import Verified


def plan_section(folder: Path, found: Verified, title: str = "") -> dict[str, Any]:
    """What every layer got, and what it cost."""
    plan = read_plan(folder / "plan.yaml")
    budget = ", ".join(f"--{key} {value:g}" for key, value in plan.budget.items())
    rows = [dict(row) for row in found.rows]
    engine = TARGETS[plan.target].engine
    package = "xllamacpp" if engine == "llama.cpp" else engine
    rows[1]["loads"] = f"{package} {version(package)}"
    return {
        "kind": "plan",
        "title": title or f"{budget}, target {plan.target}",
        "budget": budget,
        "rows": rows,
        "ratio": found.ratio,
        "verdict": found.verdict,
        "layers": found.layers,
        "checks": found.checks,
    }


def write_page(path: Path, title: str, sections: Sequence[Mapping[str, Any]]) -> None:
    """Write a page; it is there whole or not at all."""
    from layerwise.report import page

    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, page(title, sections))
