"""The command `experts`: feed-forward parts are cut into experts, of which a token runs a few."""

import json
from pathlib import Path
from typing import Annotated

import typer

from layerwise.console import Output, command, quiet
from layerwise.options import Data, Device, Json, Length, Model, Samples, Seed, Set


@command
def experts(
    model: Model,
    out: Annotated[str, typer.Option(help="The folder to write.")],
    active: Annotated[str, typer.Option(help="Share of these parameters a token runs.")] = "75%",
    data: Data = "stdlib",
    samples: Samples = 16,
    length: Length = 512,
    seed: Seed = 0,
    set_: Set = [],
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Cut feed-forward parts into experts, of which each token runs a few."""
    quiet()
    from layerwise.core.machine import write_whole
    from layerwise.core.open import open_network
    from layerwise.core.plan import DataSpec, Plan
    from layerwise.jobs.card import write_card
    from layerwise.jobs.experts import convert_folder, how_to_cut
    from layerwise.jobs.request import identity
    from layerwise.report.terminal import progress_bar
    from layerwise.steps import say_data

    output = Output("experts", model, as_json, {"active": active, "out": out, "data": data})
    how = how_to_cut(active, set_)
    say_data(output, data)
    spec = DataSpec(data, seed, samples, length)
    plan = Plan(identity(open_network(model)), target="compact", data=spec, experts=how)
    with progress_bar(as_json) as progress:
        nbytes, rows = convert_folder(model, Path(out), plan, device=device, progress=progress)
    output.table("converted", rows, "layer", "experts", "active", "error", "error_held_out")
    whole = sum(row["parameters"] for row in rows)
    share = sum(row["active_parameters"] for row in rows) / whole
    output.say(f"{share:.1%} of the parameters of these parts run for a token, routers counted")
    output.more |= {"bytes": nbytes, "active": share}
    output.files.append(out)
    write_card(Path(out), model, plan)
    write_whole(Path(out) / "report.json", json.dumps(output.as_dict(), indent=1))
    output.end(f"the checkpoint is in {out}")
