"""The command `run`: a network writes, in whatever order its layers are to run."""

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from layerwise.console import Output, command, quiet
from layerwise.options import Data, Device, Json, Model, Seed


@command
def run(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="The text to continue.")] = "",
    plan: Annotated[str, typer.Option(help="Run it in the order of a plan.")] = "",
    wiring: Annotated[str, typer.Option(help="Order: 0-5,6,6,7; 6*2, 6/mlp, 6+7.")] = "",
    batch: Annotated[str, typer.Option(help="A file of prompts, one a line.")] = "",
    max_tokens: Annotated[int, typer.Option(help="Tokens to write at most.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 takes the most likely token.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Draw from so many tokens; 0 for all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Draw from so much probability.")] = 1.0,
    seed: Seed = 0,
    speculate: Annotated[
        str, typer.Option(help="Draft: exit=6,length=4,sure=0.5,again, skip=3+5,length=4, or auto.")
    ] = "",
    save: Annotated[str, typer.Option(help="Write the order as a plan.")] = "",
    sweep: Annotated[bool, typer.Option(help="Time exits and lengths of drafts.")] = False,
    documents: Annotated[int, typer.Option(min=1, help="Documents of a sweep, and of auto.")] = 8,
    data: Data = "stdlib",
    check: Annotated[bool, typer.Option(help="Check the cache under a new order.")] = True,
    packed: Annotated[bool, typer.Option(help="Packed kernels, where they are faster.")] = True,
    device: Device = "auto",
    dtype: Annotated[
        str, typer.Option(help="Compute type; auto: stored, float32 for drafts.")
    ] = "auto",
    as_json: Json = False,
) -> None:
    """Let a network write, with its layers in any order, and with drafts that it verifies."""
    quiet()
    from layerwise.jobs.speculate import Sampling
    from layerwise.run import few_rows

    if plan and wiring:
        raise _clash("--wiring", "without --plan, which has one", wiring)
    sampling = Sampling(max_tokens, temperature, top_k, top_p, seed).checked()
    settings = {"wiring": wiring or plan, "speculate": speculate, **sampling._asdict()}
    output = Output("run", model, as_json, settings)
    order = ordered_by(output, plan) if plan else wiring
    drafts = sweep or bool(speculate)
    kind = ("float32" if drafts else "stored") if dtype == "auto" else dtype
    network = opened(output, order, device, kind, check, save)
    if packed and not order:
        say_packed(output, network)
    if drafts and network.dtype.itemsize < 4:
        output.warnings.append(
            f"in {dtype} several tokens at once may round otherwise than one by one, so that the "
            "text may differ from plain decoding's; it does not in float32"
        )
    with few_rows(network.module) if drafts else nullcontext():
        if sweep:
            rows = swept(output, network, sampling, data, documents, speculate)
            output.end(f"{len(rows)} settings against plain decoding, one by one, on this machine")
            return
        draft = draft_of(output, network, speculate, sampling, data, documents)
        write(output, network, prompts_of(prompt, batch), sampling, draft)


def ordered_by(output: Output, plan: str) -> Any:
    """The order of a plan, which has to be the model's."""
    from layerwise.core.checkpoint import Checkpoint
    from layerwise.core.folder import find_folder
    from layerwise.core.plan import check_model, read_plan

    read, held = read_plan(Path(plan)), Checkpoint(find_folder(output.model))
    check_model(read, held.structure, held.weights)
    if read.edits or read.heal:
        output.warnings.append("the plan's edits of weights were not made; `layerwise apply` does")
    return read.wiring


def _clash(where: str, allowed: str, found: object) -> Exception:
    from layerwise.core.errors import LayerwiseError

    return LayerwiseError(where, allowed=allowed, found=found, fix="give one of the two")


def opened(output: Output, order: Any, device: str, dtype: str, check: bool, save: str = "") -> Any:
    """The network with all its weights, its layers in the given order, which may be saved."""
    from layerwise.core.open import open_network
    from layerwise.core.plan import Plan
    from layerwise.core.visits import only_drops, read_wiring
    from layerwise.jobs.checks import out_of_place
    from layerwise.jobs.request import identity
    from layerwise.jobs.session import check_out

    wiring = order
    if isinstance(order, str) and order:
        name, equals, text = order.rpartition("=")
        entries = read_wiring(text)
        name = name if equals else open_network(output.model).stack.name
        wiring = {name: entries}
    network = open_network(output.model, wiring=wiring or None, device=device, dtype=dtype)
    if save:
        alone = all(map(only_drops, (wiring or {}).values()))
        target = "hf" if alone else "compact"
        made = Plan(identity(network), target=target, wiring=wiring or {})
        made.save(check_out(Path(save), "--save"))
        output.files.append(save)
    output.warnings += out_of_place(network)
    resident = network.load()
    if check and network.visits:
        check_cache(output, network, resident)
    return resident


def say_packed(output: Output, network: Any) -> None:
    """Let a folder of packed integers compute on them, as far as that is faster here."""
    from layerwise.jobs.stock import compute_packed

    found = compute_packed(network.module, Path(output.model), network)
    if found.of:
        output.say(str(found))


def check_cache(output: Output, network: Any, resident: Any) -> None:
    """Decoding with a cache must give what it gives without, where it does in the original."""
    import torch

    from layerwise.core.errors import LayerwiseError, refusing
    from layerwise.core.open import open_network
    from layerwise.jobs.measure import agrees_cached, generates

    if not generates(resident.module):
        return
    ids = torch.arange(2, 10)[None]
    with refusing(
        "run, decoding in the new order",
        allowed="an order that this architecture can decode in",
        fix="choose another order, or --no-check to see what comes of it",
    ):
        same, total = agrees_cached(resident.module, ids, 8)
    if same == total:
        return
    plain = open_network(output.model, wiring=None, dtype=str(network.dtype).partition(".")[2])
    before, _ = agrees_cached(plain.load().module, ids, 8)
    found = f"the first {same} of {total} tokens the same"
    if before < total:
        output.warnings.append(f"cached and uncached decoding: {found}, as in the original")
        return
    raise LayerwiseError(
        "run, decoding in the new order",
        allowed="the same tokens with and without a cache",
        found=found,
        fix="choose another order, or --no-check to see what comes of it",
    )


def draft_of(
    output: Output, network: Any, text: str, sampling: Any, data: str, documents: int
) -> Any:
    """The draft that was asked for: a setting, the best, or none."""
    from layerwise.core.method import find
    from layerwise.jobs.pays import choose_draft, exit_draft
    from layerwise.jobs.speculate import Draft

    if not text:
        return None
    if text == "auto":
        draft, why = choose_draft(
            forecast_for(output, network, sampling, data, documents)[1], network
        )
        output.say(why)
        output.more["draft"] = why
        return draft
    kind, numbers, length, sure, again = _read_draft(text)
    if kind == "exit":
        return exit_draft(network, numbers[0], length, sure, again)
    steps = find("skip_steps", "run").bind({"skip": tuple(numbers)})(network.stacks[-1])
    return Draft(steps, length, text, sure)


def _read_draft(text: str) -> tuple[str, list[int], int, float, bool]:
    """What `exit=6,length=4,sure=0.5,again` and `skip=3+5` say: kind, numbers, limits, `again`."""
    import re

    from layerwise.core.errors import LayerwiseError

    found = re.fullmatch(
        r"(exit=\d{1,6}|skip=\d{1,6}(?:\+\d{1,6})*)(?:,length=([1-9]\d{0,3}))?(?:,sure=(0?\.\d{1,6}))?(,again)?",
        text.replace(" ", ""),
    )
    if found is None:
        raise LayerwiseError(
            "--speculate",
            allowed="auto, exit=6,length=4,sure=0.5,again or skip=3+5,length=4",
            found=text,
            fix="write it in one of these forms",
        )
    kind, _, numbers = found[1].partition("=")
    return (
        kind,
        [int(number) for number in numbers.split("+")],
        int(found[2] or 4),
        float(found[3] or 0),
        bool(found[4]),
    )


def forecast_for(
    output: Output, network: Any, sampling: Any, data: str, documents: int
) -> tuple[list[list[int]], Any]:
    """Prompts out of the data, and what a forecast finds on them."""
    from layerwise.jobs.pays import documents_for, forecast
    from layerwise.jobs.session import load_reader
    from layerwise.report.terminal import progress_bar
    from layerwise.steps import say_data

    say_data(output, data)
    prompts = documents_for(load_reader(network), data, documents)
    with progress_bar(output.as_json) as progress:
        return prompts, forecast(network, prompts, sampling, progress)


def swept(
    output: Output, network: Any, sampling: Any, data: str, documents: int, alone: str
) -> Any:
    """Measure settings of drafts, or one alone, against plain decoding, and what was predicted."""
    from layerwise.jobs.pays import Setting, choose_draft, settings_for, sweep
    from layerwise.report.terminal import progress_bar

    prompts, found = forecast_for(output, network, sampling, data, documents)
    settings = sorted({*settings_for(len(network.stacks[-1].wiring)), found.best()[0]})
    if alone not in ("", "auto"):
        kind, numbers, length, sure, again = _read_draft(alone)
        if kind != "exit":
            raise _clash("--sweep", "with exits", alone)
        settings = [Setting(numbers[0], length, sure, again)]
    with progress_bar(output.as_json) as progress:
        rows = sweep(network, prompts, found, settings, sampling, progress)
    columns = ("stays", "stays_predicted", "tokens/s", "speed", "speed_predicted", "same")
    output.table("drafts against plain decoding", rows, "draft", *columns)
    why = choose_draft(found, network)[1]
    output.say(f"auto: {why}")
    output.more |= {"costs": found.costs._asdict(), "auto": why}
    return rows


def prompts_of(prompt: str, batch: str) -> list[str]:
    """The prompts: one, or the lines of a file."""
    from layerwise.core.errors import LayerwiseError, refusing

    if bool(prompt) == bool(batch):
        raise LayerwiseError(
            "prompt",
            allowed="a prompt or --batch FILE",
            found="both" if prompt else "neither",
            fix='write for instance layerwise run demo "def main("',
        )
    if prompt:
        return [prompt]
    with refusing(f"--batch {batch}", allowed="a text file", fix="check the path"):
        lines = Path(batch).read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line.strip()]


def write(output: Output, network: Any, prompts: list[str], sampling: Any, draft: Any) -> None:
    """Let the network write, word by word where there is one prompt."""
    alone = len(prompts) == 1 and not output.as_json
    tell = (lambda text: typer.echo(text, nl=False)) if alone else None
    found = network.generate(prompts, **sampling._asdict(), speculate=draft, tell=tell)
    output.rows = [
        {"prompt": prompt, "text": text, "tokens": len(tokens)}
        for prompt, text, tokens in zip(prompts, found.texts, found.tokens, strict=True)
    ]
    if alone:
        output.say("")
    else:
        output.table("written", output.rows, "prompt", "text", "tokens")
    count = sum(map(len, found.tokens))
    words = f"{count} tokens in {found.seconds:.2f} s, {found.speed:.0f} tokens/s"
    output.more |= {"tokens_per_second": found.speed}
    if found.tally is not None:
        output.more["acceptance"] = found.tally.acceptance
        words += f"; {found.tally.kept} of {found.tally.drafted} proposed tokens stayed"
        if not found.tally.at_once:
            output.warnings.append(
                "this network's code does not carry its state over several tokens at once, so that "
                "they are verified one by one, and no draft is faster than plain decoding"
            )
    output.end(words)
