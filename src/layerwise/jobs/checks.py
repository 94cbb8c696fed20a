"""Checks that a written folder must pass."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from layerwise.core.checkpoint import read_header, read_tensor
from layerwise.core.network import choose_device, find_folder, open_network
from layerwise.core.plan import Plan
from layerwise.jobs.apply import CHECK, CHECKED
from layerwise.jobs.measure import agrees_cached, generates
from layerwise.jobs.stock import answers_of, load_stock


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
    model: str | Path, plan: Plan, edited: nn.Module, batch: Any, dtype: str, device: str
) -> dict[str, Any]:
    """The stock rebuild against the original with its list of layers reordered in memory."""
    original = load_stock(find_folder(model), dtype, choose_device(device))
    network = open_network(original)
    for stack in network.stacks:
        if stack.name in plan.wiring:
            order = [v if isinstance(v, int) else v["layer"] for v in plan.wiring[stack.name]]
            parent, _, leaf = stack.container.rpartition(".")
            layers = original.get_submodule(stack.container)
            kept = nn.ModuleList([layers[i] for i in order])  # type: ignore[index]
            setattr(original.get_submodule(parent), leaf, kept)
    with torch.no_grad():
        wanted, got = answers_of(original)(batch), answers_of(edited)(batch)
    off = ((got - wanted).abs().max() / wanted.abs().max()).item()
    found = f"largest difference {off:.1e} of the largest logit, allowed 1e-04"
    return {
        "name": "the stock rebuild computes what the edited stack computes",
        "ok": off <= 1e-4,
        "found": found if off <= 1e-4 else f"{found}; the folder needs custom code",
    }
