"""The main job from Python: the commands as functions, with the options of the command line.

planned = layerwise.make_plan("demo", bits=3)
layerwise.apply_plan("demo", planned, "small")
print(layerwise.verify("demo", "small").verdict)
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
from transformers.utils import logging
from typer.main import get_command

from layerwise.cli import app
from layerwise.core.errors import LayerwiseError
from layerwise.core.plan import Plan, read_plan
from layerwise.jobs import plan as planning
from layerwise.jobs import verify as verifying
from layerwise.jobs.apply import Applied
from layerwise.jobs.card import write_card
from layerwise.jobs.heal import apply_healed, asked_to_heal, check_asked, to_be_healed
from layerwise.jobs.request import Planned
from layerwise.jobs.session import Progress, silent
from layerwise.steps import engine_of, request_of

#: what the reader of options raises, in which every mistake ends
_USAGE: Any = typer.BadParameter.__base__


@contextmanager
def _without_bars() -> Iterator[None]:
    """No bars of transformers, one for every layer that is read; `progress` tells how far it is."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


@_without_bars()
def make_plan(
    model: str | Path, *, heal: int = 0, progress: Progress = silent, **options: Any
) -> Planned:
    """Decide what every layer gets under a budget: `layerwise plan`.

    Args:
        model: a folder, a hub id, or `demo`.
        heal: steps of distillation that are to follow.
        progress: called with what is done, how far, and out of how much.
        options: those of `layerwise plan`, by their names: a budget, such as `bits=3`, `size=0.25`
            or `depth=9`, and `method`, `target`, `samples`, `keep`, `set=["gptq.group=64"]`, ...

    Returns:
        The `plan`, and what it was made of: `rows`, exact `nbytes`, menus, damage.

    Raises:
        LayerwiseError: an option is unknown or has a wrong value, or the budget cannot be met.

    Example:
        >>> planned = make_plan("demo", bits=4, method="rtn", score="zd", allocator="uniform")
        >>> planned.nbytes
        4599616
    """
    given = _options("plan", model, **options)
    how, given["set_"] = asked_to_heal(heal, given["set_"])
    request = request_of(given)
    if how:
        check_asked("heal", request)
    planned = planning.make_plan(request, progress)
    return planned._replace(plan=to_be_healed(planned.plan, how)) if how else planned


@_without_bars()
def apply_plan(
    model: str | Path,
    plan: Plan | Planned | str | Path,
    out: str | Path,
    *,
    progress: Progress = silent,
    **options: Any,
) -> Applied:
    """Write the checkpoint of a plan, or of a plan's file: `layerwise apply`.

    Raises:
        LayerwiseError: the plan is for another model, or cannot be applied.
    """
    given = _options("apply", model, "", out=out, **options)
    wanted = plan.plan if isinstance(plan, Planned) else plan
    wanted = wanted if isinstance(wanted, Plan) else read_plan(wanted)
    how = {name: given[name] for name in ("device", "dtype", "other_weights", "check")}
    how["engine"] = engine_of(given["engine"], given["workers"])
    applied = apply_healed(model, wanted, Path(out), progress=progress, **how)
    write_card(Path(out), str(model), wanted)
    return applied


@_without_bars()
def verify(
    model: str | Path, folder: str | Path, *, progress: Progress = silent, **options: Any
) -> verifying.Verified:
    """Compare what was written with its original and a naive plan: `layerwise verify`.

    Returns:
        `rows` of the models with loss, KL and agreement, each with its interval; `checks`; the
        `ratio` of the KLs; and the `verdict` in a sentence.

    Raises:
        LayerwiseError: the folder holds no plan, or stock transformers cannot load it.
    """
    given = _options("verify", model, folder, **options)
    known = verifying.Settings._fields
    settings = verifying.Settings(**{name: given[name] for name in known})
    return verifying.verify(model, Path(folder), settings, progress)


def _options(command: str, *given: Any, **options: Any) -> dict[str, Any]:
    """What a command makes of its options, read as those of the command line are."""
    words: list[str] = []
    for name, value in options.items():
        flag = name.rstrip("_").replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is not None:
            values = value if isinstance(value, list | tuple) else [value]
            words += [f"--{flag}={each}" for each in values]
    reader: Any = get_command(app)
    words += ["--", *map(str, given)]
    try:
        return reader.commands[command].make_context(command, words).params
    except _USAGE as error:
        raise LayerwiseError(
            f"options of {command}",
            allowed=f"what `layerwise {command}` takes, and of the right type",
            found=error.format_message(),
            fix=f"`layerwise {command} --help` lists them",
        ) from None
