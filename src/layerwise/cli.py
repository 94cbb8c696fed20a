"""The command line: thin; nothing heavy is imported before a command runs."""

import hashlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer

from layerwise import __version__

app = typer.Typer(
    name="layerwise",
    help="Open any deep network as a stack of layers: see what every layer does, decide what "
    "every layer gets under one budget, apply it, and prove what it cost.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Model = Annotated[str, typer.Argument(help="A folder, a hub id, or `demo`.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]
Dry = Annotated[bool, typer.Option("--dry-run", help="Say what would be done, write nothing.")]
Set = Annotated[
    list[str], typer.Option("--set", help="method.option=value; `layerwise methods` lists them.")
]
Keep = Annotated[list[str], typer.Option("--keep", help="Selector of what stays as it is.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 ...")]
Dtype = Annotated[str, typer.Option(help="Compute type; auto is the checkpoint's.")]
Seed = Annotated[int, typer.Option(help="Seed of every random choice.")]
Data = Annotated[
    str, typer.Option(help="stdlib, a text file, .jsonl, .parquet, a folder, a hub id.")
]
Samples = Annotated[int, typer.Option(min=1, help="Windows of text to calibrate on.")]
Length = Annotated[int, typer.Option(min=16, help="Tokens in a window.")]
Documents = Annotated[int, typer.Option(min=1, help="Documents to evaluate on.")]
Size = Annotated[str, typer.Option(help="Share of the input's bytes that may remain: 20%.")]
Bytes = Annotated[str, typer.Option("--bytes", help="Bytes of the result: 2GB, 1.5GiB.")]
Bits = Annotated[
    float | None, typer.Option(help="Mean bits per weight of the allocatable matrices.")
]
Depth = Annotated[str, typer.Option(help="Layers that may remain: 9 or 75%.")]
Target = Annotated[str, typer.Option(help="hf or compressed-tensors.")]
Method = Annotated[str, typer.Option(help="How matrices are edited: gptq, rtn.")]
Score = Annotated[str, typer.Option(help="sensitivity, lim, zd; greedy, shortgpt ... for depth.")]
EngineName = Annotated[
    str, typer.Option("--engine", help="Where trials and solves run: threads, processes or ray.")
]
Workers = Annotated[int, typer.Option(min=0, help="How many at once; 0 for what the cores feed.")]
Streamed = Annotated[bool, typer.Option("--streamed", help="Verify with one layer in memory.")]
Check = Annotated[bool, typer.Option(help="Reload the result before it gets its name.")]
Allocator = Annotated[str, typer.Option(help="knapsack, threshold or uniform.")]


class Output:
    """What a command found, printed at its end as a table or as one JSON object."""

    def __init__(self, command: str, model: str, as_json: bool, settings: dict[str, Any]) -> None:
        self.command, self.model, self.as_json = command, model, as_json
        self.settings = settings
        self.began = time.monotonic()
        self.rows: list[dict[str, Any]] = []
        self.files: list[str] = []
        self.warnings: list[str] = []
        self.more: dict[str, Any] = {}

    def table(self, title: str, rows: list[dict[str, Any]], *columns: str) -> None:
        """Show a table; the last one is the command's own."""
        self.rows = rows
        if not self.as_json:
            from layerwise.report.terminal import print_table

            print_table(title, rows, columns)

    def say(self, line: str) -> None:
        """A line for people."""
        if not self.as_json:
            typer.echo(line)

    def as_dict(self) -> dict[str, Any]:
        """The object that `--json` prints."""
        import msgspec

        from layerwise.report.answer import Answer

        answer = Answer(
            layerwise=__version__,
            command=self.command,
            model=self.model,
            settings=self.settings,
            rows=self.rows,
            files=self.files,
            warnings=self.warnings,
            seconds=round(time.monotonic() - self.began, 3),
            more=self.more,
        )
        return msgspec.to_builtins(answer)

    def end(self, last: str) -> None:
        """Close with one line that says where the result is."""
        for warning in self.warnings:
            typer.echo(f"warning: {warning}", err=True)
        if self.as_json:
            typer.echo(json.dumps(self.as_dict()))
        else:
            typer.echo(last)


class Stopped(KeyboardInterrupt):
    """The user, or the system, ended the command by a signal."""


def _stop(number: int, frame: object) -> None:
    raise Stopped(number)


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Register a command; an error that a user can mend is one line and exit status 2."""

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> None:
        from layerwise.core.errors import LayerwiseError
        from layerwise.core.machine import told

        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
        signal.signal(signal.SIGTERM, _stop)
        signal.signal(signal.SIGINT, _stop)
        try:
            function(*args, **kwargs)
        except LayerwiseError as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(2) from None
        except (OSError, MemoryError) as error:
            known = told(error)
            if known is None:
                raise
            typer.echo(f"error: {known}", err=True)
            raise typer.Exit(2) from None
        except Stopped as stopped:
            typer.echo("stopped; the same command goes on where it was", err=True)
            raise typer.Exit(128 + stopped.args[0]) from None

    return app.command()(run)


def _quiet() -> None:
    """Keep other libraries' progress bars and advice off the terminal."""
    os.environ["TQDM_DISABLE"] = "1"
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        from loguru import logger

        logger.disable("compressed_tensors")
    except ImportError:
        pass


@command
def inspect(
    model: Model,
    data: Data = "stdlib",
    measures: Annotated[
        str, typer.Option(help="Names, or `all`; those of `methods --family describe` too.")
    ] = "",
    labels: Annotated[str, typer.Option(help="Documents with a label: .jsonl or .csv.")] = "",
    noise: Annotated[str, typer.Option(help="Put this in front of every labelled text.")] = "",
    respond: Annotated[int, typer.Option(min=0, help="Let it write so many tokens more.")] = 0,
    against: Annotated[str, typer.Option(help="A second model, side by side.")] = "",
    out: Annotated[str, typer.Option(help="Write a page: atlas.html.")] = "",
    samples: Samples = 128,
    length: Length = 512,
    seed: Seed = 0,
    set_: Set = [],
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Measure every layer in one pass over the data."""
    _quiet()
    from layerwise.core.data import Texts
    from layerwise.core.plan import settings
    from layerwise.jobs.against import inspect_models
    from layerwise.jobs.session import check_out
    from layerwise.jobs.wanted import MEASURES, Wanted
    from layerwise.report.terminal import progress_bar

    output = Output("inspect", model, as_json, {"data": data, "samples": samples, "length": length})
    if out:
        check_out(Path(out))
    _say_data(output, data)
    names = tuple(name.strip() for name in measures.split(",") if name.strip()) or MEASURES
    wanted = Wanted(names, settings(set_), labels, noise, respond)
    texts = Texts(data, seed, samples, length)
    with progress_bar(as_json) as progress:
        found = inspect_models(
            model,
            against,
            texts,
            wanted,
            device=device,
            dtype=dtype,
            progress=progress,
            say=lambda line: typer.echo(line, err=True),
        )
    stacks = ", ".join(stack.container for stack in found.network.stacks)
    output.table(f"{model}: {stacks}", found.rows, "layer", "bytes", *found.columns)
    for line in found.lines():
        output.say(line)
    output.warnings += found.warnings
    output.more = dict(found.more)
    if out:
        from layerwise.jobs.pages import inspect_section, write_page

        write_page(Path(out), f"{model}, layer by layer", [inspect_section(model, found, data)])
        output.files.append(out)
    output.end(f"the page is in {out}" if out else f"{len(found.rows)} layers of {model}")


@command
def plan(
    model: Model,
    out: Annotated[str, typer.Option(help="Where to write the plan.")] = "plan.yaml",
    size: Size = "",
    bytes_: Bytes = "",
    bits: Bits = None,
    depth: Depth = "",
    target: Target = "",
    method: Method = "gptq",
    score: Score = "",
    allocator: Allocator = "knapsack",
    data: Data = "stdlib",
    samples: Samples = 128,
    length: Length = 512,
    seed: Seed = 0,
    keep: Keep = [],
    set_: Set = [],
    device: Device = "auto",
    dtype: Dtype = "auto",
    engine: EngineName = "threads",
    workers: Workers = 0,
    dry_run: Dry = False,
    as_json: Json = False,
) -> None:
    """Decide what every layer gets under a budget, and write that as a file."""
    _quiet()
    from layerwise.jobs.session import check_out

    request = _request(locals())
    if not dry_run:
        check_out(Path(out))
    output = Output("plan", model, as_json, {"budget": request.budget.as_dict()})
    planned = _plan(output, request)
    if not dry_run:
        planned.plan.save(Path(out))
        output.files.append(out)
    output.end(f"the plan is in {out}" if not dry_run else "nothing was written (--dry-run)")


@command
def apply(
    model: Model,
    plan: Annotated[str, typer.Argument(help="The plan file.")],
    out: Annotated[str, typer.Option(help="The folder to write.")],
    device: Device = "auto",
    dtype: Dtype = "auto",
    other_weights: Annotated[bool, typer.Option(help="Allow other weights.")] = False,
    check: Check = True,
    engine: EngineName = "threads",
    workers: Workers = 0,
    dry_run: Dry = False,
    as_json: Json = False,
) -> None:
    """Apply a plan and write a checkpoint; goes on where it was stopped."""
    _quiet()
    output = Output("apply", model, as_json, {"plan": plan, "out": out})
    options = {"device": device, "dtype": dtype, "other_weights": other_weights, "check": check}
    _apply(output, model, plan, out, dry_run, options | {"engine": _engine(engine, workers)})
    output.end(f"the checkpoint is in {out}" if not dry_run else "nothing was written (--dry-run)")


@command
def verify(
    model: Model,
    folder: Annotated[str, typer.Argument(help="What `apply` wrote.")],
    data: Data = "",
    documents: Documents = 64,
    length: Length = 512,
    naive: Annotated[bool, typer.Option(help="Build the naive plan of the same size.")] = True,
    speed: Annotated[bool, typer.Option(help="Measure speed.")] = True,
    memory: Annotated[bool, typer.Option(help="Measure memory in fresh processes.")] = True,
    streamed: Streamed = False,
    device: Device = "auto",
    dtype: Annotated[str, typer.Option(help="In which type both are compared.")] = "float32",
    as_json: Json = False,
) -> None:
    """Compare a result with its original and with a naive plan of the same size."""
    _quiet()
    from layerwise.jobs.verify import Settings

    settings = Settings(documents, length, naive, speed, memory, device, dtype, data, streamed)
    output = Output("verify", model, as_json, {"folder": folder, **settings._asdict()})
    _verify(output, model, Path(folder), settings)
    output.end(f"the report is in {Path(folder) / 'report.html'}")


@command
def compress(
    model: Model,
    out: Annotated[str, typer.Option(help="The folder to write.")],
    size: Size = "",
    bytes_: Bytes = "",
    bits: Bits = None,
    depth: Depth = "",
    target: Target = "",
    method: Method = "gptq",
    score: Score = "",
    allocator: Allocator = "knapsack",
    data: Data = "stdlib",
    samples: Samples = 128,
    length: Length = 512,
    documents: Documents = 64,
    naive: Annotated[bool, typer.Option(help="Build the naive plan of the same size.")] = True,
    streamed: Streamed = False,
    check: Check = True,
    seed: Seed = 0,
    keep: Keep = [],
    set_: Set = [],
    device: Device = "auto",
    dtype: Dtype = "auto",
    engine: EngineName = "threads",
    workers: Workers = 0,
    dry_run: Dry = False,
    as_json: Json = False,
) -> None:
    """Plan, apply and verify in one go; stopped, the same command goes on."""
    _quiet()
    from layerwise.jobs.verify import Settings

    request = _request(locals())
    output = Output("compress", model, as_json, {"budget": request.budget.as_dict(), "out": out})
    digest = hashlib.sha256(repr(request._replace(engine=None)).encode()).hexdigest()[:12]
    kept = Path(out).with_name(f".{Path(out).name}.{digest}.plan.yaml")
    _check_new(Path(out))
    if not kept.exists():
        planned = _plan(output, request)
        if dry_run:
            output.end("nothing was written (--dry-run)")
            return
        planned.plan.save(kept)
    given = {"device": device, "dtype": dtype, "check": check, "engine": request.engine}
    _apply(output, model, str(kept), out, False, given)
    settings = Settings(documents, length, naive, device=device, streamed=streamed)
    kept.unlink()
    _verify(output, model, Path(out), settings)
    output.end(f"the checkpoint and its report are in {out}")


@command
def methods(
    family: Annotated[str, typer.Option(help="Only this family.")] = "",
    as_json: Json = False,
) -> None:
    """List every method: family, one line, paper, options."""
    import layerwise.families as families
    from layerwise.core.errors import LayerwiseError, nearest
    from layerwise.core.method import FAMILIES
    from layerwise.core.method import methods as registered

    assert families
    if family and family not in FAMILIES:
        raise LayerwiseError(
            "--family",
            allowed=", ".join(FAMILIES),
            found=family,
            fix=nearest(family, FAMILIES, "choose one of these"),
        )
    output = Output("methods", "", as_json, {"family": family})
    rows = [
        {
            "method": m.name,
            "family": m.family,
            "what": m.summary,
            "aliases": list(m.aliases),
            "paper": m.paper,
            "options": {k: repr(p.default) for k, p in m.options.items()},
        }
        for m in registered(family or None)
    ]
    shown = [r | {"options": ", ".join(f"{k}={v}" for k, v in r["options"].items())} for r in rows]
    output.table("methods", shown, "method", "family", "what", "paper", "options", "aliases")
    output.rows = rows
    output.end(f"{len(rows)} methods; set an option with --set method.option=value")


@command
def demo(
    out: Annotated[str, typer.Option(help="The folder to write.")] = "layerwise-demo",
    as_json: Json = False,
) -> None:
    """The whole story on the shipped model: inspect, plan, apply, verify, one page."""
    _quiet()
    from layerwise.jobs.demo import run_demo
    from layerwise.report.terminal import progress_bar

    output = Output("demo", "demo", as_json, {"out": out})
    with progress_bar(as_json) as progress:
        run_demo(Path(out), output, progress)
    page = Path(out) / "index.html"
    output.end(f"the page is in {page} ({time.monotonic() - output.began:.0f} s)")


def _say_data(output: Output, data: str) -> None:
    if data == "stdlib":
        version = ".".join(map(str, sys.version_info[:3]))
        output.say(
            f"data: source text of the Python {version} standard library (--data changes it)"
        )


def _request(given: dict[str, Any]) -> Any:
    """A planner's request out of the options of a command."""
    from layerwise.core.errors import LayerwiseError
    from layerwise.core.folder import find_folder
    from layerwise.core.plan import DataSpec, settings
    from layerwise.jobs.plan import Request
    from layerwise.jobs.session import Budget, parse_bits, parse_bytes, parse_share

    named = [n for n in ("size", "bytes_", "bits", "depth") if given[n] not in ("", None)]
    if len(named) != 1:
        raise LayerwiseError(
            "budget",
            allowed="exactly one of --size, --bytes, --bits, --depth",
            found=", ".join("--" + n.rstrip("_") for n in named) or "none",
            fix="give one, such as --size 25%",
        )
    depth = None
    if given["depth"]:
        depth = _layers(find_folder(given["model"]), given["depth"], parse_share)
    budget = Budget(
        parse_share(given["size"], "--size") if given["size"] else None,
        parse_bytes(given["bytes_"]) if given["bytes_"] else None,
        parse_bits(given["bits"]) if given["bits"] is not None else None,
        depth,
    )
    return Request(
        given["model"],
        budget,
        target=given["target"] or ("hf" if given["depth"] else "compressed-tensors"),
        method=given["method"],
        score=given["score"],
        allocator=given["allocator"],
        data=DataSpec(given["data"], given["seed"], given["samples"], given["length"]),
        keep=tuple(given["keep"]),
        settings=settings(given["set_"]),
        device=given["device"],
        dtype=given["dtype"],
        engine=_engine(given["engine"], given["workers"]),
    )


def _engine(kind: str, workers: int) -> Any:
    """Where independent work is done."""
    from layerwise.core.errors import LayerwiseError
    from layerwise.core.fan import Engine

    if kind not in ("threads", "processes", "ray"):
        raise LayerwiseError(
            "--engine", allowed="threads, processes or ray", found=kind, fix="choose one of them"
        )
    return Engine(kind, workers)


def _check_new(out: Path) -> None:
    """A folder that is to be written must not exist, and its place must be writable."""
    from layerwise.core.errors import LayerwiseError
    from layerwise.jobs.session import check_out

    if out.exists():
        raise LayerwiseError(
            f"--out {out}",
            allowed="a new folder",
            found="one that exists",
            fix="choose another name or remove it",
        )
    check_out(out)


def _layers(folder: Path, text: str, share: Callable[[str, str], float]) -> int:
    """How many layers `9` or `75%` are."""
    if text.strip().isdigit():
        return int(text)
    from layerwise.core.network import open_network

    return max(1, int(share(text, "--depth") * len(open_network(folder).layers())))


def _plan(output: Output, request: Any) -> Any:
    from layerwise.jobs.plan import make_plan, reached
    from layerwise.report.terminal import progress_bar

    _say_data(output, request.data.source)
    with progress_bar(output.as_json) as progress:
        planned = make_plan(request, progress)
    key = "group" if planned.menus else "layer"
    output.table("plan", planned.rows, key, "option", "bytes", "importance", "damage")
    output.more["bytes"] = planned.nbytes
    output.say(reached(planned))
    return planned


def _apply(
    output: Output,
    model: str,
    plan: str,
    out: str,
    dry_run: bool,
    options: dict[str, Any],
) -> None:
    from layerwise.core.machine import write_whole
    from layerwise.core.plan import read_plan
    from layerwise.jobs.apply import apply_plan, preview
    from layerwise.jobs.card import write_card
    from layerwise.report.terminal import progress_bar

    read = read_plan(Path(plan))
    if not dry_run:
        _check_new(Path(out))
    if dry_run:
        rows = preview(model, read, options["other_weights"])
        output.table("would be applied", rows, "layer", "from", "options", "bytes")
        return
    with progress_bar(output.as_json) as progress:
        applied = apply_plan(model, read, Path(out), progress=progress, **options)
    output.table("applied", applied.rows, "layer", "from", "options", "bytes", "error", "seconds")
    output.files.append(out)
    output.warnings += applied.warnings
    output.more["bytes"] = applied.nbytes
    write_card(Path(out), model, read)
    report = Path(out) / "report.json"
    write_whole(report, json.dumps(output.as_dict(), indent=1))


def _verify(output: Output, model: str, folder: Path, settings: Any) -> None:
    from layerwise.core.machine import write_whole
    from layerwise.core.plan import read_plan
    from layerwise.jobs.card import write_card
    from layerwise.jobs.pages import plan_section, write_page
    from layerwise.jobs.verify import verify as run
    from layerwise.report.terminal import progress_bar

    with progress_bar(output.as_json) as progress:
        found = run(model, folder, settings, progress)
    columns = ("name", "bytes", "loss", "kl", "agree", "prefill", "decode", "memory")
    output.table("verified", found.rows, *columns)
    for row in found.rows[1:]:
        output.say(f"{row['name']}: {row['what']}")
    output.warnings += found.warnings
    output.more |= {"checks": found.checks, "ratio": found.ratio, "verdict": found.verdict}
    for check in found.checks:
        output.say(f"{'ok ' if check['ok'] else 'NO '} {check['name']}: {check['found']}")
    output.say(found.verdict)
    write_card(folder, model, read_plan(folder / "plan.yaml"), found)
    section = plan_section(folder, found)
    write_page(folder / "report.html", f"{folder.name}: {model}", [section])
    report = folder / "report.json"
    before = json.loads(report.read_text()) if report.exists() else {}
    write_whole(report, json.dumps(before | {"verify": output.as_dict()}, indent=1))
    output.files.append(str(folder / "report.html"))


if __name__ == "__main__":
    app()
