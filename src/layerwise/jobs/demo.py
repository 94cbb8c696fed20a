"""The whole story on the shipped model, in about two minutes on two cores."""

import json
import shutil
from pathlib import Path
from typing import Any

from layerwise.core.data import Texts
from layerwise.core.errors import LayerwiseError
from layerwise.core.machine import write_whole
from layerwise.core.plan import DataSpec
from layerwise.jobs.apply import apply_plan
from layerwise.jobs.atlas import atlas_sections
from layerwise.jobs.card import write_card
from layerwise.jobs.inspect import inspect_model
from layerwise.jobs.pages import plan_section, write_page
from layerwise.jobs.plan import Request, make_plan
from layerwise.jobs.session import Budget, Progress, check_out
from layerwise.jobs.verify import Settings, verify

DATA = DataSpec(samples=32, length=256)


def run_demo(out: Path, output: Any, progress: Progress) -> None:
    """Inspect, plan 3 bits and 75% of the depth, apply, verify, and write one page.

    Args:
        out: the folder for both checkpoints and the page; results of an earlier run go first.
        output: where tables and lines are shown.
        progress: called with what is done, how far, and out of how much.
    """
    if out.exists():
        _remove_earlier(out)
    check_out(out).mkdir()
    texts = Texts(DATA.source, DATA.seed, DATA.samples, DATA.length)
    inspected = inspect_model("demo", texts, progress=progress)
    columns = ("layer", "bytes", *inspected.columns)
    output.table("every layer, one pass", inspected.rows, *columns)
    sections = atlas_sections(inspected)[:3]
    rows: list[dict[str, Any]] = []
    for name, title, request in (
        ("3-bits", "3 bits per weight", Request("demo", Budget(bits=3.0), data=DATA)),
        ("9-layers", "75% of the depth", Request("demo", Budget(depth=9), target="hf", data=DATA)),
    ):
        plan = make_plan(request, progress).plan
        plan.save(out / f"{name}.yaml")
        applied = apply_plan("demo", plan, out / name, progress=progress)
        write_whole(out / name / "report.json", json.dumps({"rows": applied.rows}, indent=1))
        settings = Settings(documents=24, length=256, memory=False)
        found = verify("demo", out / name, settings, progress)
        write_card(out / name, "demo", plan, found)
        output.table(title, found.rows, "name", "bytes", "loss", "kl", "agree", "decode")
        for row in found.rows[1:]:
            output.say(f"{row['name']}: {row['what']}")
        output.say(found.verdict + "\n")
        output.warnings += found.warnings
        rows += [{"plan": name, **row} for row in found.rows]
        sections.append(plan_section(out / name, found, title))
        output.files.append(str(out / name))
    output.rows = rows
    write_page(out / "index.html", "layerwise on its demo model", sections)
    output.files.append(str(out / "index.html"))


def _remove_earlier(out: Path) -> None:
    """Remove the result of an earlier demo, and nothing else.

    Raises:
        LayerwiseError: something else is in its place.
    """
    own = {"3-bits", "9-layers", "3-bits.yaml", "9-layers.yaml", "index.html"}
    inside = {p.name for p in out.iterdir()} if out.is_dir() else {out.name}
    foreign = sorted(name for name in inside - own if not name.startswith((".3-bits", ".9-layers")))
    if foreign:
        raise LayerwiseError(
            f"--out {out}",
            allowed="a new folder, or one with nothing but an earlier demo",
            found=f"{foreign[0]!r} in it",
            fix="choose another name",
        )
    shutil.rmtree(out)
