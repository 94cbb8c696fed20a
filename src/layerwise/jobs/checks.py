"""Checks that a written folder must pass."""

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from layerwise.core.checkpoint import read_header, read_tensor
from layerwise.core.network import Network
from layerwise.core.plan import Plan
from layerwise.core.stack import Stack
from layerwise.core.wiring import parse_wiring
from layerwise.jobs.apply import CHECK, CHECKED
from layerwise.jobs.measure import agrees_cached, generates
from layerwise.jobs.stock import StandIns, answers_of


def reload_checks(folder: Path, edited: nn.Module) -> list[dict[str, Any]]:
    """The reloaded model against the logits that were computed while it was written."""
    path = folder / CHECK
    if not path.exists():
        return []
    held = {name: read_tensor(info) for name, info in read_header(path).items()}
    with torch.no_grad():
        wanted = held.pop(CHECKED)
        got = answers_of(edited)(held).cpu().float()
    off = (got - wanted).abs().max().item() / max(wanted.abs().max().item(), 1e-30)
    packed = "quantization_config" in json.loads((folder / "config.json").read_text())
    limit = 1e-3 if packed else 1e-4
    return [
        {
            "name": "stock transformers gives the logits of the model that was written",
            "ok": off <= limit,
            "found": f"largest difference {off:.1e} of the largest logit, allowed {limit:.0e}",
        }
    ]


def decode_checks(edited: nn.Module, batches: Sequence[Any]) -> list[dict[str, Any]]:
    """Cached against uncached greedy decoding, where the model generates."""
    if not generates(edited):
        return []
    same, total = agrees_cached(edited, batches[0]["input_ids"][:, :32])
    return [
        {
            "name": "cached equals uncached greedy decoding",
            "ok": same == total,
            "found": f"{same} of {total} tokens",
        }
    ]


def rebuild_check(
    original: nn.Module, network: Network, plan: Plan, edited: nn.Module, batch: Any
) -> list[dict[str, Any]]:
    """The stock rebuild against the original edited in memory; plans of weights have no twin.

    Layers that go hand their input on; where layers repeat, their list is put in the new order.
    """
    if plan.edits:
        return []
    orders = {
        stack.name: parse_wiring(plan.wiring[stack.name], len(stack.layers), stack.name)
        for stack in network.stacks
        if stack.name in plan.wiring
    }
    kept = {name: [visit.layer for visit in order] for name, order in orders.items()}
    stacks = [stack for stack in network.stacks if stack.name in kept]
    with torch.no_grad():
        if all(order == sorted(set(order)) for order in kept.values()):
            gone = [la for s in stacks for la in s.layers if la.index not in kept[s.name]]
            twins = [replace(la, module=original.get_submodule(la.path)) for la in gone]
            with StandIns(twins, dict.fromkeys(range(len(twins)))):
                wanted = answers_of(original)(batch)
        else:
            wanted = answers_of(_reordered(original, stacks, kept))(batch)
        got = answers_of(edited)(batch)
    off = ((got - wanted).abs().max() / wanted.abs().max()).item()
    found = f"largest difference {off:.1e} of the largest logit, allowed 1e-04"
    return [
        {
            "name": "the stock rebuild computes what the edited stack computes",
            "ok": off <= 1e-4,
            "found": found if off <= 1e-4 else f"{found}; the folder needs custom code",
        }
    ]


def _reordered(
    original: nn.Module, stacks: Sequence[Stack], kept: Mapping[str, list[int]]
) -> nn.Module:
    """A twin of the model, with the same parameters and its layers in another order."""
    memo: dict[int, Any] = {id(p): p for p in original.parameters()}
    twin = copy.deepcopy(original, memo)
    for stack in stacks:
        parent, _, leaf = stack.container.rpartition(".")
        layers = twin.get_submodule(stack.container)
        chosen = nn.ModuleList([layers[i] for i in kept[stack.name]])  # type: ignore[index]
        setattr(twin.get_submodule(parent), leaf, chosen)
    return twin
