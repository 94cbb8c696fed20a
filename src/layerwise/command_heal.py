"""The command `heal`: an edited network learns what its original answers."""

import json
from pathlib import Path
from typing import Annotated

import typer

from layerwise.console import Output, command, quiet
from layerwise.options import Device, Json, Model, Set


@command
def heal(
    model: Model,
    folder: Annotated[str, typer.Argument(help="What `apply` wrote, with fewer layers or parts.")],
    out: Annotated[str, typer.Option(help="The folder to write.")],
    steps: Annotated[int, typer.Option(min=0, help="Steps of training, at most.")] = 300,
    set_: Set = [],
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Train an edited checkpoint on what the original answers; goes on where it was stopped."""
    quiet()
    from layerwise.core.machine import write_whole
    from layerwise.core.plan import read_plan
    from layerwise.jobs.card import write_card
    from layerwise.jobs.heal import heal_folder, how_to_heal
    from layerwise.report.terminal import progress_bar

    output = Output("heal", model, as_json, {"folder": folder, "out": out, "steps": steps})
    how = how_to_heal(steps, set_)
    with progress_bar(as_json) as progress:
        nbytes, rows = heal_folder(
            model, Path(folder), Path(out), how, device=device, progress=progress
        )
    output.table("healed", rows, *rows[0])
    output.more["bytes"] = nbytes
    output.files.append(out)
    write_card(Path(out), model, read_plan(Path(out) / "plan.yaml"))
    write_whole(Path(out) / "report.json", json.dumps(output.as_dict(), indent=1))
    output.end(f"the checkpoint is in {out}")
