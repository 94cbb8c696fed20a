"""The command line: thin; nothing heavy is imported before a command runs."""

import hashlib
import time
from pathlib import Path
from typing import Annotated

import typer

from layerwise.console import Output, app, command, quiet
from layerwise.options import (
    Allocator,
    Allow,
    Bits,
    Bytes,
    Check,
    Data,
    Depth,
    Device,
    Documents,
    Dry,
    Dtype,
    EngineName,
    Flops,
    HealSteps,
    Json,
    Keep,
    Kl,
    Length,
    Method,
    Model,
    Parts,
    Rewrite,
    Samples,
    Score,
    Seed,
    Set,
    Size,
    Sparsity,
    Speed,
    Streamed,
    Target,
    Workers,
)
from layerwise.steps import (
    engine_of,
    list_methods,
    request_of,
    run_apply,
    run_imatrix,
    run_inspect,
    run_plan,
    run_verify,
)


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
    prompt: Annotated[
        list[str], typer.Option(help="Read on the page, layer by layer; again for more.")
    ] = [],
    samples: Samples = 128,
    length: Length = 512,
    seed: Seed = 0,
    set_: Set = [],
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Measure every layer in one pass over the data."""
    quiet()
    from layerwise.core.data import Texts
    from layerwise.core.plan import settings
    from layerwise.jobs.wanted import MEASURES, Wanted

    output = Output("inspect", model, as_json, {"data": data, "samples": samples, "length": length})
    names = tuple(name.strip() for name in measures.split(",") if name.strip()) or MEASURES
    wanted = Wanted(names, settings(set_), labels, noise, respond)
    texts = Texts(data, seed, samples, length)
    found = run_inspect(output, against, texts, wanted, prompt, out, device, dtype)
    output.end(f"the page is in {out}" if out else f"{len(found.rows)} layers of {model}")


@command
def plan(
    model: Model,
    out: Annotated[str, typer.Option(help="Where to write the plan.")] = "plan.yaml",
    size: Size = "",
    bytes_: Bytes = "",
    bits: Bits = None,
    depth: Depth = "",
    sparsity: Sparsity = "",
    parts: Parts = "",
    flops: Flops = "",
    speed: Speed = "",
    kl: Kl = None,
    allow: Allow = "",
    target: Target = "",
    method: Method = "",
    rewrite: Rewrite = "",
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
    quiet()
    from layerwise.jobs.session import check_out

    request = request_of(locals())
    if not dry_run:
        check_out(Path(out))
    output = Output("plan", model, as_json, {"budget": request.budget.as_dict()})
    planned = run_plan(output, request)
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
    quiet()
    output = Output("apply", model, as_json, {"plan": plan, "out": out})
    options = {"device": device, "dtype": dtype, "other_weights": other_weights, "check": check}
    run_apply(output, model, plan, out, dry_run, options | {"engine": engine_of(engine, workers)})
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
    quiet()
    from layerwise.jobs.verify import Settings

    settings = Settings(documents, length, naive, speed, memory, device, dtype, data, streamed)
    output = Output("verify", model, as_json, {"folder": folder, **settings._asdict()})
    run_verify(output, model, Path(folder), settings)
    output.end(f"the report is in {Path(folder) / 'report.html'}")


@command
def compress(
    model: Model,
    out: Annotated[str, typer.Option(help="The folder to write.")],
    size: Size = "",
    bytes_: Bytes = "",
    bits: Bits = None,
    depth: Depth = "",
    sparsity: Sparsity = "",
    parts: Parts = "",
    flops: Flops = "",
    speed: Speed = "",
    kl: Kl = None,
    allow: Allow = "",
    target: Target = "",
    method: Method = "",
    rewrite: Rewrite = "",
    score: Score = "",
    allocator: Allocator = "knapsack",
    data: Data = "stdlib",
    samples: Samples = 128,
    length: Length = 512,
    heal: HealSteps = 0,
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
    """Plan, apply, heal and verify in one go; stopped, the same command goes on."""
    quiet()
    from layerwise.jobs.heal import asked_to_heal, check_asked, to_be_healed
    from layerwise.jobs.session import check_new
    from layerwise.jobs.verify import Settings

    how, set_ = asked_to_heal(heal, set_)
    request = request_of(locals())
    if how:
        check_asked("--heal", request)
    output = Output("compress", model, as_json, {"budget": request.budget.as_dict(), "out": out})
    digest = hashlib.sha256(repr((request._replace(engine=None), how)).encode()).hexdigest()[:12]
    kept = Path(out).with_name(f".{Path(out).name}.{digest}.plan.yaml")
    check_new(Path(out))
    if not kept.exists():
        made = run_plan(output, request).plan
        if dry_run:
            output.end("nothing was written (--dry-run)")
            return
        (to_be_healed(made, how) if how else made).save(kept)
    given = {"device": device, "dtype": dtype, "check": check, "engine": request.engine}
    run_apply(output, model, str(kept), out, False, given)
    settings = Settings(documents, length, naive, device=device, streamed=streamed)
    kept.unlink()
    run_verify(output, model, Path(out), settings)
    output.end(f"the checkpoint and its report are in {out}")


@command
def imatrix(
    model: Model,
    out: Annotated[str, typer.Option(help="The file: .dat, or .gguf.")],
    data: Data = "stdlib",
    samples: Samples = 128,
    length: Length = 512,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Measure an importance matrix for llama.cpp: the mean square of every input."""
    quiet()
    output = Output("imatrix", model, as_json, {"data": data, "samples": samples, "length": length})
    run_imatrix(output, model, Path(out), data, samples, length, seed)
    output.end(f"the importance matrix is in {out}")


@command
def methods(
    family: Annotated[str, typer.Option(help="Only this family.")] = "",
    as_json: Json = False,
) -> None:
    """List every method: family, one line, paper, options."""
    output = Output("methods", "", as_json, {"family": family})
    list_methods(output, family)
    output.end(f"{len(output.rows)} methods; set an option with --set method.option=value")


@command
def demo(
    out: Annotated[str, typer.Option(help="The folder to write.")] = "layerwise-demo",
    as_json: Json = False,
) -> None:
    """The whole story on the shipped model: inspect, plan, apply, verify, one page."""
    quiet()
    from layerwise.jobs.demo import run_demo
    from layerwise.report.terminal import progress_bar

    output = Output("demo", "demo", as_json, {"out": out})
    with progress_bar(as_json) as progress:
        run_demo(Path(out), output, progress)
    page = Path(out) / "index.html"
    output.end(f"the page is in {page} ({time.monotonic() - output.began:.0f} s)")


from layerwise import command_experts as command_experts  # noqa: E402  the command `experts`
from layerwise import command_heal as command_heal  # noqa: E402  the command `heal`
from layerwise import command_run as command_run  # noqa: E402  the command `run`

if __name__ == "__main__":
    app()
