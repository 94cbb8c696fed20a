"""Feed-forward parts become experts, layer by layer, each on what the layers before it give."""

import os
import shutil
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from msgspec import convert, structs
from torch import Tensor

from layerwise.core.adapters import save_adapters
from layerwise.core.errors import LayerwiseError, refusing
from layerwise.core.lockstep import walk
from layerwise.core.network import Network, fill
from layerwise.core.open import open_network
from layerwise.core.plan import Experts, Plan, check_model, settings
from layerwise.core.reader import samples_of, windows
from layerwise.core.routing import Routed, neurons_of, route
from layerwise.core.stops import Batch, Stop
from layerwise.export._writer import Finished, dense_tensors, write_folder
from layerwise.export.compact import write_orders
from layerwise.jobs.apply import beside, note_answer, own_batch
from layerwise.jobs.checks import must_be_sound, too_large
from layerwise.jobs.session import (
    Progress,
    check_new,
    load_reader,
    parse_share,
    silent,
    texts_of,
)
from layerwise.train.experts import Fitted, fit_experts

#: documents of the select part on which errors are told and routers are profiled
HELD = 8


def how_to_cut(active: str, pairs: Sequence[str]) -> Experts:
    """The settings of `--active` and `--set experts.option=value`.

    Raises:
        LayerwiseError: there is no such option, or no such value of it.

    Example:
        >>> how_to_cut("50%", ["experts.count=4"]).count
        4
    """
    given = settings(pairs)
    known = [name for name in Experts.__struct_fields__ if name != "active"]
    with refusing(
        "--set",
        allowed=", ".join(f"experts.{name}" for name in known),
        fix="write for instance experts.count=8",
    ):
        if set(given) - {"experts"}:
            raise ValueError(f"{min(set(given) - {'experts'})}.*")
        share = parse_share(active, "--active")
        return convert({"active": share, **given.get("experts", {})}, Experts)


def convert_folder(
    model: str | Path,
    out: Path,
    plan: Plan,
    *,
    device: str = "auto",
    progress: Progress = silent,
) -> tuple[int, list[dict[str, Any]]]:
    """Turn the feed-forward parts of a network into experts, and write it as a `compact` folder.

    Args:
        model: the original.
        out: the folder to write.
        plan: says of how many experts, how much is active, and on which data.
        device: where to compute.
        progress: called with what is done, how far, and out of how much.

    Returns:
        The bytes of all tensors, and a row per layer: how many experts a token runs, and the
        relative error of the output, on tokens trained on and on others.

    Raises:
        LayerwiseError: the plan does more than that, a layer has no such part, the share is less
            than one expert a layer; or `out` exists.
    """
    check_new(out)
    assert plan.experts is not None
    more = plan.wiring or plan.edits or plan.rewrites or plan.heal
    if more or plan.target != "compact":
        raise LayerwiseError(
            "plan, experts",
            allowed="target compact, without wiring, edits, rewrites and heal",
            found=f"target {plan.target}, {more or 'nothing else'}",
            fix="convert the original, or a folder of target hf",
        )
    network = open_network(model, device=device, dtype="float32")
    check_model(plan, network.checkpoint.structure, network.checkpoint.weights)
    reader = load_reader(network)
    batches = windows(reader, texts_of(plan.data), "calibrate")
    held = samples_of(reader, texts_of(plan.data), "select", HELD)
    tick = partial(progress, "converting layers")
    fitted = fit_all(network, batches, held, plan.experts, plan.data.seed, tick)
    costs = costs_of(network, fitted)
    counts = chosen(fitted, costs, plan.experts)
    part = beside(out, "part")
    if part.exists():
        shutil.rmtree(part)
    nbytes = write_routed(model, part, fitted, counts)
    plan.save(part / "plan.yaml")
    batch = own_batch(network, plan)
    note_answer(open_network(part, dtype="float32"), batch, part)
    _ = too_large(network) or must_be_sound(part, network, batch)
    os.replace(part, out)
    rows = [
        {
            "layer": key,
            "experts": plan.experts.count,
            "active": count,
            "parameters": parts_of(costs[key]),
            "active_parameters": costs[key][count - 1],
            "error": fitted[key].errors[count - 1][0],
            "error_held_out": fitted[key].errors[count - 1][1],
        }
        for key, count in counts.items()
    ]
    return nbytes, rows


def costs_of(network: Network, fitted: Mapping[str, Fitted]) -> dict[str, list[int]]:
    """How many parameters 1, 2, ... experts and the router are, of every layer."""
    found = {}
    for layer in network.layers():
        if layer.key in fitted:
            made = fitted[layer.key]
            held = made.routed.router, made.routed.bias
            router = sum(tensor.numel() for tensor in held if made.routed.router.any())
            whole = sum(tensor.numel() for tensor in made.tensors.values())
            count = len(made.covered)
            found[layer.key] = [whole * k // count + router for k in range(1, count + 1)]
    return found


def parts_of(costs: Sequence[int]) -> int:
    """The parameters of all experts, out of what 1, 2, ... of them and the router are."""
    return len(costs) * (costs[1] - costs[0])


def chosen(
    fitted: Mapping[str, Fitted], costs: Mapping[str, Sequence[int]], how: Experts
) -> dict[str, int]:
    """How many experts every layer runs, by the policy, under the plan's share."""
    limit = how.active * sum(map(parts_of, costs.values()))
    return policy({key: made.covered for key, made in fitted.items()}, costs, limit)


def policy(
    covered: Mapping[str, Tensor], costs: Mapping[str, Sequence[int]], limit: float
) -> dict[str, int]:
    """How many experts each layer runs: the fewest that cover a weight `tau`, the same for all.

    `tau` is the largest with which no more than so many parameters run.

    Args:
        covered: mean weight of the `k` first experts of a token, for every `k`.
        costs: how many parameters `k` experts and the router are, for every `k`.
        limit: of all layers together.

    Raises:
        LayerwiseError: one expert a layer is more.

    Example:
        >>> covered = {"a": torch.tensor([0.9, 1.0]), "b": torch.tensor([0.5, 1.0])}
        >>> policy(covered, dict.fromkeys(covered, (50, 100)), 150)
        {'a': 1, 'b': 2}
    """

    def counts(tau: float) -> dict[str, int]:
        return {key: 1 + int((c[:-1] < tau).sum()) for key, c in covered.items()}

    def cost(tau: float) -> int:
        return sum(costs[key][count - 1] for key, count in counts(tau).items())

    levels = sorted({0.0, *(value for c in covered.values() for value in c.tolist())})
    place = bisect_right(levels, limit, key=cost)
    if not place:
        raise LayerwiseError(
            "--active",
            allowed=f"at least {cost(0.0)} parameters, one expert a layer",
            found=int(limit),
            fix="raise it, or cut into more experts with --set experts.count",
        )
    return counts(levels[place - 1])


def fit_all(
    network: Network,
    batches: Sequence[Batch],
    held: Sequence[Batch],
    how: Experts,
    seed: int = 0,
    tick: Any = lambda done, total: None,
) -> dict[str, Fitted]:
    """Convert layer after layer of a streamed network, each on the output of the converted ones."""
    found: dict[str, Fitted] = {}
    total, count = len(network.layers()), max(1, int(how.active * how.count))
    for stop in walk(network, [*batches, *held]):
        layer = stop.layer
        if stop.kind == "enter" and layer.key not in found:
            rows = inputs_of(stop, neurons_of(layer).module)
            seen = torch.cat([rows[n] for n in sorted(rows) if n < len(batches)])
            others = torch.cat([rows[n] for n in sorted(rows) if n >= len(batches)])
            kind = network.stored.dtype
            made = fit_experts(layer, seen, others, how, count, kind, seed)
            fill(layer.module, made.tensors, network.device)
            route(layer, made.routed)
            found[layer.key] = made
            tick(len(found), total)
    return found


def inputs_of(stop: Stop, path: str) -> dict[int, Tensor]:
    """The rows `[tokens, dim]` that a module of a layer is given, for every batch that waits."""
    rows: dict[int, Tensor] = {}
    module = stop.layer.module.get_submodule(path)
    for lane in stop.lanes:

        def note(module: Any, args: tuple[Tensor, ...], number: int = lane.batch) -> None:
            rows[number] = args[0].reshape(-1, args[0].shape[-1])

        hook = module.register_forward_pre_hook(note)
        try:
            stop.replay(lane)
        finally:
            hook.remove()
    return rows


def write_routed(
    model: str | Path, part: Path, fitted: Mapping[str, Fitted], counts: Mapping[str, int]
) -> int:
    """Write the layers with their new matrices, and their routers beside them."""
    stored = open_network(model)

    def layers() -> Any:
        for layer in stored.layers():
            tensors = stored.fetch(layer)
            made = fitted[layer.key].tensors if layer.key in fitted else {}
            yield Finished(layer, tensors | {n: t.to(tensors[n]) for n, t in made.items()}, {})

    nbytes = write_folder(stored, part, layers(), dense_tensors)
    orders = {
        stack.name: [{"layer": la.index, "adapter": str(la.index)} for la in stack.layers]
        for stack in stored.stacks
    }
    write_orders(part, orders)
    kind, own = stored.stored.dtype, {layer.key: {} for layer in stored.layers()}
    for key, made in fitted.items():
        router, bias = made.routed.router.to(kind), made.routed.bias.to(kind)
        own[key] = {made.module: Routed(router, bias, counts[key])}
    return nbytes + save_adapters(part, own)


def without_routers(opened: Callable[[], Network], plan: Plan) -> Network:
    """The same share of a network's neurons for all tokens, trained as the plan's experts were.

    What is naive beside experts that are routed.
    """
    assert plan.experts is not None
    how, network = structs.replace(plan.experts, routed=False), opened()
    reader = load_reader(network)
    batches = windows(reader, texts_of(plan.data), "calibrate")
    held = samples_of(reader, texts_of(plan.data), "select", HELD)
    fitted = fit_all(network, batches, held, how, plan.data.seed)
    counts = chosen(fitted, costs_of(network, fitted), how)
    loaded = opened().load()
    for layer in loaded.layers():
        made = fitted[layer.key]
        fill(layer.module, made.tensors, network.device)
        route(layer, replace(made.routed, active=counts[layer.key]))
    return loaded
