"""The steps that several commands share: what was asked, and plan, apply and verify for people."""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from layerwise.console import Output


def say_data(output: Output, data: str) -> None:
    """Say what the default data is whenever it is used."""
    if data == "stdlib":
        version = ".".join(map(str, sys.version_info[:3]))
        output.say(
            f"data: source text of the Python {version} standard library (--data changes it)"
        )


def request_of(given: dict[str, Any]) -> Any:
    """A planner's request out of the options of a command."""
    from layerwise.core.errors import LayerwiseError
    from layerwise.core.folder import find_folder
    from layerwise.core.plan import DataSpec, settings
    from layerwise.jobs.request import NARROWER, Request
    from layerwise.jobs.session import Budget, parse_bytes, parse_positive, parse_share, parse_speed

    units = ("size", "bytes_", "bits", "depth", "sparsity", "flops", "speed", "kl")
    named = [n for n in units if given[n] not in ("", None)]
    if len(named) != 1:
        raise LayerwiseError(
            "budget",
            allowed="exactly one of --size, --bytes, --bits, --depth, --sparsity, --flops, "
            "--speed, --kl",
            found=", ".join("--" + n.rstrip("_") for n in named) or "none",
            fix="give one, such as --size 25%",
        )
    depth, parts = None, tuple(filter(None, given["parts"].split("+")))
    if given["depth"]:
        depth = _units(find_folder(given["model"]), given["depth"], parts, parse_share)
    budget = Budget(
        parse_share(given["size"], "--size") if given["size"] else None,
        parse_bytes(given["bytes_"]) if given["bytes_"] else None,
        parse_positive(given["bits"], "--bits", 3.5) if given["bits"] is not None else None,
        depth,
        parse_share(given["sparsity"], "--sparsity") if given["sparsity"] else None,
        parse_share(given["flops"], "--flops") if given["flops"] else None,
        parse_speed(given["speed"]) if given["speed"] else None,
        parse_positive(given["kl"], "--kl", 0.05) if given["kl"] is not None else None,
    )
    faster = given["flops"] or given["speed"]
    allow = given["allow"] or ("width,layer" if faster else "bits")
    dense = given["depth"] or given["sparsity"] or not NARROWER.isdisjoint(allow.split(","))
    return Request(
        given["model"],
        budget,
        target=given["target"] or ("hf" if dense else "compressed-tensors"),
        method=given["method"],
        score=given["score"],
        allocator=given["allocator"],
        data=DataSpec(given["data"], given["seed"], given["samples"], given["length"]),
        keep=tuple(given["keep"]),
        settings=settings(given["set_"]),
        device=given["device"],
        dtype=given["dtype"],
        engine=engine_of(given["engine"], given["workers"]),
        rewrite=given["rewrite"],
        parts=parts,
        allow=tuple(allow.split(",")),
    )


def engine_of(kind: str, workers: int) -> Any:
    """Where independent work is done."""
    from layerwise.core.errors import LayerwiseError
    from layerwise.core.fan import Engine

    if kind not in ("threads", "processes", "ray"):
        raise LayerwiseError(
            "--engine", allowed="threads, processes or ray", found=kind, fix="choose one of them"
        )
    return Engine(kind, workers)


def _units(
    folder: Path, text: str, parts: tuple[str, ...], share: Callable[[str, str], float]
) -> int:
    """How many layers, or parts, `9` or `75%` are."""
    if text.strip().isdigit():
        return int(text)
    from layerwise.core.open import open_network
    from layerwise.jobs.units import units_of

    return max(1, int(share(text, "--depth") * len(units_of(open_network(folder), parts))))


def run_plan(output: Output, request: Any) -> Any:
    """Make a plan and show what every group or layer gets."""
    from layerwise.jobs.plan import make_plan, reached
    from layerwise.report.terminal import progress_bar

    say_data(output, request.data.source)
    with progress_bar(output.as_json) as progress:
        planned = make_plan(request, progress)
    key = next(k for k in ("group", "part", "layer") if k in planned.rows[0])
    output.table("plan", planned.rows, key, "option", "bytes", "importance", "damage")
    output.more["bytes"] = planned.nbytes
    if planned.edge:
        output.more["edge"] = list(planned.edge)
        output.say(edge_of(planned.edge))
    output.say(reached(planned))
    return planned


def edge_of(rows: Any) -> str:
    """The plans that were weighed, in a few words."""
    taken = [" (taken)" if row["chosen"] else "" for row in rows]
    if "high" in rows[0]:
        words = [f"{r['plan']}: {r['expected']:.3g}, at most {r['high']:.3g}" for r in rows]
        told = "; ".join(map("".join, zip(words, taken, strict=True)))
        return f"KL of plans on the way, solved on a little text: {told}"
    if "plan" in rows[0]:
        words = [f"{row['plan']}: {row['expected']:.4g}" for row in rows]
        if rows[0]["speed"]:
            words = [f"{w} at {r['speed']:.2f}x" for w, r in zip(words, rows, strict=True)]
        told = "; ".join(map("".join, zip(words, taken, strict=True)))
        return f"KL of plans of this size, solved on a little text: {told}"
    count = next(name for name in rows[0] if name.endswith("left out"))
    words = [f"{r[count]}: {r['expected']:.4g}{' solved' * r['solved']}" for r in rows]
    told = ", ".join(map("".join, zip(words, taken, strict=True)))
    return f"KL by {count}, the rest in bits, expected or solved on a little text: {told}"


def run_apply(
    output: Output,
    model: str,
    plan: str,
    out: str,
    dry_run: bool,
    options: dict[str, Any],
) -> None:
    """Apply a plan, or show what would be, and write the report into the folder."""
    from layerwise.core.machine import write_whole
    from layerwise.core.plan import read_plan
    from layerwise.jobs.apply import preview
    from layerwise.jobs.card import write_card
    from layerwise.jobs.heal import apply_healed
    from layerwise.jobs.rewrite import told
    from layerwise.report.terminal import progress_bar

    read = read_plan(Path(plan))
    if dry_run:
        rows = preview(model, read, options["other_weights"])
        output.table("would be applied", rows, "layer", "from", "options", "bytes")
        return
    with progress_bar(output.as_json) as progress:
        applied = apply_healed(model, read, Path(out), progress=progress, **options)
    columns = ("layer", "from", "options", "bytes", "error", "seconds")
    output.table("applied", applied.rows, *(applied.rows[0] if read.heal else columns))
    for line in told(applied.rewrites):
        output.say(line)
    output.files.append(out)
    output.warnings += applied.warnings
    output.more["bytes"] = applied.nbytes
    if applied.rewrites:
        output.more["rewrites"] = list(applied.rewrites)
    write_card(Path(out), model, read)
    report = Path(out) / "report.json"
    write_whole(report, json.dumps(output.as_dict(), indent=1))


def run_verify(output: Output, model: str, folder: Path, settings: Any) -> None:
    """Verify a folder, show what came of it, and write its reports."""
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


def run_imatrix(
    output: Output, model: str, out: Path, data: str, samples: int, length: int, seed: int
) -> None:
    """Measure an importance matrix and write it."""
    from layerwise.core.data import Texts
    from layerwise.core.imatrix import write_imatrix
    from layerwise.core.open import open_network
    from layerwise.jobs.imatrix import make_imatrix
    from layerwise.jobs.session import check_out
    from layerwise.report.terminal import progress_bar

    check_out(out)
    say_data(output, data)
    with progress_bar(output.as_json) as progress:
        found = make_imatrix(open_network(model), Texts(data, seed, samples, length), progress)
    write_imatrix(out, found, data)
    output.files.append(str(out))
    output.rows = [{"tensor": n, "inputs": len(i.squares)} for n, i in sorted(found.items())]


def run_inspect(
    output: Output,
    against: str,
    texts: Any,
    wanted: Any,
    prompts: list[str],
    out: str,
    device: str,
    dtype: str,
) -> Any:
    """Measure every layer, show the table, and write the page if one is wanted."""
    from layerwise.core.open import open_network
    from layerwise.jobs.against import inspect_models
    from layerwise.jobs.atlas import write_atlas
    from layerwise.jobs.session import check_out
    from layerwise.report.terminal import progress_bar

    if out:
        check_out(Path(out))
    say_data(output, texts.source)
    network = open_network(output.model, device=device, dtype=dtype)

    def tell(line: str) -> None:
        print(line, file=sys.stderr)

    with progress_bar(output.as_json) as progress:
        reads = read_for_page(network, prompts, texts, out, progress, tell)
        options = {"device": device, "dtype": dtype, "progress": progress, "say": tell}
        found = inspect_models(network, against, texts, wanted, **options)
        found = replace(found, model=output.model)
    stacks = ", ".join(stack.container for stack in found.network.stacks)
    output.table(f"{output.model}: {stacks}", found.rows, "layer", "bytes", *found.columns)
    for line in found.lines():
        output.say(line)
    output.warnings += found.warnings
    output.more = dict(found.more)
    if out:
        write_atlas(found, Path(out), reads)
        output.files.append(out)
    return found


def read_for_page(
    network: Any,
    prompts: list[str],
    texts: Any,
    out: str,
    progress: Any,
    say: Callable[[str], None],
) -> Any:
    """The prompts of the page, layer by layer; before the pass, so that a bad one is told first."""
    from layerwise.core.errors import LayerwiseError
    from layerwise.jobs.reading import announced, read_prompts

    if prompts and not out:
        raise LayerwiseError(
            "--prompt",
            allowed="with --out PAGE, where it is shown",
            found=f"{prompts[0]!r} without",
            fix="give --out atlas.html",
        )
    if not out:
        return []
    say(announced(network, prompts))
    return read_prompts(network, prompts, texts, progress)


def list_methods(output: Output, family: str) -> None:
    """Show every method, of one family or of all."""
    from layerwise.families import methods

    rows = [
        {
            "method": m.name,
            "family": m.family,
            "what": m.summary,
            "aliases": list(m.aliases),
            "paper": m.paper,
            "options": {k: repr(p.default) for k, p in m.options.items()},
        }
        for m in methods(family or None)
    ]
    shown = [r | {"options": ", ".join(f"{k}={v}" for k, v in r["options"].items())} for r in rows]
    output.table("methods", shown, "method", "family", "what", "paper", "options", "aliases")
    output.rows = rows
