"""Checks that a written folder must pass."""

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map
from transformers import Cache, PretrainedConfig

from layerwise.core.calls import tensors_in
from layerwise.core.checkpoint import read_header, read_tensor
from layerwise.core.errors import LayerwiseError, first_few, first_line
from layerwise.core.lockstep import walk
from layerwise.core.machine import amount, available_memory
from layerwise.core.network import Network
from layerwise.core.plan import Plan
from layerwise.core.stack import Layer, Stack, Visit
from layerwise.core.task import example_inputs, token_rows
from layerwise.core.visits import FOLDED, is_plain, parse_wiring
from layerwise.core.wiring import edited_config
from layerwise.jobs.measure import agrees_cached, generates
from layerwise.jobs.stock import answers_of, load_stock, standing_in

#: an input and the answer computed while the folder was written, for whoever reloads it
CHECK = "layerwise.check"
CHECKED = "layerwise.answer"


def too_large(network: Network) -> list[str]:
    """Why a written folder is not run as a check: two models in float32 do not fit in memory."""
    wide = 4 * sum(p.numel() for p in network.model.parameters())
    room = available_memory()
    if not room or 2 * wide <= room:
        return []
    return [f"not reloaded as a check: that takes {amount(2 * wide)} and {amount(room)} are free"]


def asked(folder: Path) -> tuple[dict[str, Any], torch.Tensor]:
    """The input that a folder was asked while it was written, and the answer it gave."""
    held = {name: read_tensor(info) for name, info in read_header(folder / CHECK).items()}
    wanted = held.pop(CHECKED)
    return held, wanted


def must_be_sound(folder: Path, network: Network, batch: Any) -> list[str]:
    """Reload a written folder by stock transformers and refuse it if it computes anything else.

    Its answer to `batch` must be the one that was computed while it was written, and decoding
    with a cache must give the tokens of decoding without, where it does in the original.

    Returns:
        Checks that fail in the original too.

    Raises:
        LayerwiseError: a check failed.
    """
    edited = load_stock(folder, "float32", network.device)
    failed = [c for c in reload_checks(folder, edited) if not c["ok"]]
    decoding = [c for c in decode_checks(edited, [batch]) if not c["ok"]]
    if decoding:
        original = load_stock(network.checkpoint.folder, "float32", network.device)
        if all(c["ok"] for c in decode_checks(original, [batch])):
            failed += decoding
    for check in failed:
        raise LayerwiseError(
            f"{folder}",
            allowed=check["name"],
            found=check["found"],
            fix="this result is not sound and was not given its name; leave the layers of that "
            "kind as they are, or look at it with `layerwise verify`",
        )
    return [f"{c['name']}: {c['found']}, as in the original" for c in decoding]


def reload_checks(folder: Path, edited: nn.Module) -> list[dict[str, Any]]:
    """The reloaded model against the logits that were computed while it was written."""
    if not (folder / CHECK).exists():
        return []
    held, wanted = asked(folder)
    with torch.no_grad():
        got = answers_of(edited, token_rows)(held).cpu().float()
    off = (got - wanted).abs().max().item() / max(wanted.abs().max().item(), 1e-30)
    packed = "quantization_config" in json.loads((folder / "config.json").read_text())
    limit = 1e-3 if packed else 1e-4
    engine = "layerwise" if (folder / FOLDED).exists() else "stock transformers"
    return [
        {
            "name": f"{engine} gives the logits of the model that was written",
            "ok": off <= limit,
            "found": f"largest difference {off:.1e} of the largest logit, allowed {limit:.0e}",
        }
    ]


def decode_checks(edited: nn.Module, batches: Sequence[Any]) -> list[dict[str, Any]]:
    """Cached against uncached greedy decoding, where the model generates."""
    if not generates(edited):
        return []
    try:
        same, total = agrees_cached(edited, batches[0]["input_ids"][:, :32])
    except Exception as error:  # whatever stock decoding raises is what the user would meet
        found = f"stock `generate` fails: {type(error).__name__}: {first_line(error)}"
        return [{"name": "cached equals uncached greedy decoding", "ok": False, "found": found}]
    return [
        {
            "name": "cached equals uncached greedy decoding",
            "ok": same == total,
            "found": f"{same} of {total} tokens",
        }
    ]


def out_of_place(network: Network) -> list[str]:
    """A warning where layers do not compute in a new order what they compute in their own.

    Stock code may take numbers from a layer's place or from the depth. Every visit is given what
    comes to it, and so is its layer in the network's own order; both are streamed.
    """
    own = network.before
    if own is None:
        return []
    layers = {layer.path: layer for layer in own.layers()}
    wanted: Any = None
    off: list[str] = []
    for stop in walk(network, [example_inputs(network.module)]):
        visit = network.visits.get(stop.layer.path)
        if visit is None or visit.mix or visit.adapter or visit.parts is not None:
            continue  # what is meant to compute something else
        if stop.kind == "enter":
            layer = layers[network.origins[stop.layer.path]]
            own.bring(layer)
            wanted = _answered(layer, stop.lanes[0].args, stop.lanes[0].kwargs)
            own.drop(layer)
        elif any(map(_differ, tensors_in(stop.lanes[0].output), wanted)):
            off.append(f"{stop.layer.stack}/{visit.layer} in place {stop.layer.index}")
    if not off:
        return []
    return [
        f"{first_few(off)}: stock code takes something from a layer's place or from the depth, so "
        "that it does not compute there what it computes in the original"
    ]


def _answered(layer: Layer, args: Any, kwargs: Any) -> list[torch.Tensor]:
    """What a layer gives for a call, without a cache; nothing if it needs one."""

    def apart(leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor):
            return leaf.clone()
        return None if isinstance(leaf, Cache) else leaf

    args, kwargs = tree_map(apart, (args, kwargs))
    try:
        with torch.no_grad():
            return tensors_in(layer.module(*args, **kwargs))
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError, KeyError):
        return []


def _differ(one: torch.Tensor, two: torch.Tensor) -> bool:
    off = (one.float() - two.float()).abs().max() if one.shape == two.shape else torch.inf
    return bool(off > 1e-3 * two.float().abs().max())


def rebuild_check(
    original: nn.Module, network: Network, plan: Plan, edited: nn.Module, batch: Any
) -> list[dict[str, Any]]:
    """The stock rebuild against the original edited in memory; plans of weights have no twin.

    Neither have plans that merge or train them. In memory the layers that go hand their input on,
    or the list of layers is put in the new order; it is right to give what either gives, as some
    layers pass on more than a hidden state.
    """
    if plan.edits or plan.heal or plan.units:
        return []
    stacks = [stack for stack in network.stacks if stack.name in plan.wiring]
    orders = {s.name: parse_wiring(plan.wiring[s.name], len(s.layers), s.name) for s in stacks}
    visits = [visit for order in orders.values() for visit in order]
    if not all(is_plain(v) and v.mix is None and v.adapter is None for v in visits):
        return []  # the answer computed while the folder was written is what there is to compare
    kept = {name: [visit.layer for visit in order] for name, order in orders.items()}
    with torch.no_grad():
        got = answers_of(edited)(batch)
        off = min(
            ((got - wanted).abs().max() / wanted.abs().max().clamp_min(1e-30)).item()
            for wanted in _edited_in_memory(original, stacks, kept, batch)
        )
    found = f"largest difference {off:.1e} of the largest logit, allowed 1e-04"
    return [
        {
            "name": "the stock rebuild computes what the edited stack computes",
            "ok": off <= 1e-4,
            "found": found if off <= 1e-4 else f"{found}; the folder needs custom code",
        }
    ]


def _edited_in_memory(
    original: nn.Module, stacks: Sequence[Stack], kept: Mapping[str, list[int]], batch: Any
) -> Iterator[torch.Tensor]:
    """Answers of the original without the layers that go, by every way to leave them out."""
    if all(order == sorted(set(order)) for order in kept.values()):
        gone = [la for s in stacks for la in s.layers if la.index not in kept[s.name]]
        twins = [replace(la, module=original.get_submodule(la.path)) for la in gone]
        with standing_in(twins, dict.fromkeys(la.key for la in twins)):
            yield answers_of(original)(batch)
    try:
        yield answers_of(_reordered(original, stacks, kept))(batch)
    except (
        LayerwiseError,
        RuntimeError,
        TypeError,
        ValueError,
        IndexError,
        KeyError,
        AttributeError,
    ):
        return  # an order that the unedited configuration does not allow


def _reordered(
    original: nn.Module, stacks: Sequence[Stack], kept: Mapping[str, list[int]]
) -> nn.Module:
    """A twin of the model, with the same parameters and its layers in another order."""
    memo: dict[int, Any] = {id(p): p for p in original.parameters()}
    twin = copy.deepcopy(original, memo)
    config: Any = twin.config
    for stack in stacks:
        parent, _, leaf = stack.container.rpartition(".")
        layers = twin.get_submodule(stack.container)
        chosen = nn.ModuleList([layers[i] for i in kept[stack.name]])  # type: ignore[index]
        setattr(twin.get_submodule(parent), leaf, chosen)
        order = tuple(Visit(i) for i in kept[stack.name])
        _take_over(config, edited_config(type(twin), twin.config, stack, order))  # type: ignore
    return twin


def _take_over(config: Any, other: Any) -> None:
    """Let a configuration, and those nested in it, say what another one says."""
    for name, value in vars(other).items():
        own = vars(config).get(name)
        if isinstance(own, PretrainedConfig) and isinstance(value, PretrainedConfig):
            _take_over(own, value)
        elif not name.startswith("_"):  # how to compute attention is no part of the order
            vars(config)[name] = value
