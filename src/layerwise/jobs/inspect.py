"""Inspect: every layer, measured in one pass over the data."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from layerwise.core.data import Texts
from layerwise.core.fan import fan_out
from layerwise.core.method import Method, find
from layerwise.core.network import Network
from layerwise.core.open import open_network
from layerwise.core.reader import windows
from layerwise.core.stack import Stack
from layerwise.core.stats import Figures, Stats, observe
from layerwise.core.stops import Batch
from layerwise.jobs.documents import (
    alone,
    check_batches,
    check_length,
    classes,
    labelled,
    responses,
    views,
)
from layerwise.jobs.inspected import Inspected
from layerwise.jobs.rerun import Rerun
from layerwise.jobs.session import Progress, load_reader, silent
from layerwise.jobs.tail import Tail, network_end
from layerwise.jobs.units import layer_bytes
from layerwise.jobs.wanted import VIEWS, Wanted, announced, chosen, kind_of

#: documents that are run again with layers replaced
PROMPTS = 8
#: what the table for people shows at most, beside the layer, its parts and its bytes
SHOWN = 6


def inspect_model(
    model: str | Path | Network,
    texts: Texts | Sequence[Batch] = Texts(),
    wanted: Wanted = Wanted(),
    *,
    reference: Network | None = None,
    device: str = "auto",
    dtype: str = "auto",
    progress: Progress = silent,
    say: Callable[[str], None] = lambda line: None,
) -> Inspected:
    """Measure every layer in one pass.

    Args:
        model: a folder, hub id, `demo`, or an opened network.
        texts: the calibrate part of it is read; or batches, for a network without a tokenizer.
        wanted: names of measures and descriptions, their options, labelled documents.
        reference: another checkpoint that rotations are measured from.
        device: where to compute.
        dtype: in which type to compute.
        progress: called with what is done, how far, and out of how much.
        say: told what costs more than the pass, before it starts.

    Returns:
        One row per layer with its parts, bytes and every figure.
    """
    opened = isinstance(model, Network)
    network = model if opened else open_network(model, device=device, dtype=dtype)
    if isinstance(texts, Texts):
        check_length(network, texts.length + wanted.respond)
    else:
        check_batches(network, texts)
    picked, warnings = chosen(wanted, network, reference is not None)
    run = _Run(network, texts, wanted, progress)
    for line in announced(picked, network, texts, wanted):
        say(line)
    stats, figures = run.everything(picked, reference)
    rows = _rows(network, picked, stats, figures)
    name = type(network.module).__name__ if opened else str(model)
    return Inspected(
        name,
        rows,
        figures,
        stats,
        network,
        texts,
        columns_of(rows, picked),
        tuple(warnings),
        _more(figures),
    )


class _Run:
    """The passes over the data, one per kind of document, and what the engine gives methods."""

    def __init__(
        self,
        network: Network,
        data: Texts | Sequence[Batch],
        wanted: Wanted,
        progress: Progress,
    ) -> None:
        self.network, self.data = network, data
        self.wanted, self.progress = wanted, progress
        self.given: dict[str, Any] = {"fetch": partial(fetch, network), "prompt": 0}

    def everything(
        self, picked: Sequence[Method], reference: Network | None
    ) -> tuple[Stats, dict[str, Figures]]:
        if reference is not None:
            self.given["reference"] = partial(fetch, reference)
        figures: dict[str, Figures] = {}
        plain = Stats({})
        for kind in ("text", "labels", "views"):
            mine = [m for m in picked if kind_of(m) == kind]
            if mine:
                stats = self.passed(kind, mine)
                plain = stats if kind == "text" else plain
                figures |= self.all_described([m for m in mine if m.family == "describe"], stats)
        return plain, figures

    def passed(self, kind: str, picked: Sequence[Method]) -> Stats:
        """One pass with the union of all probes that methods of one kind of documents need."""
        names = dict.fromkeys(n for m in picked for n in (m.needs or _itself(m)))
        probes = {n: find(n, "measure").bind(self.wanted.options(n))() for n in names}
        given = {key for m in picked for key in m.given}
        if not probes and not given & {"rerun", "tail"}:
            return Stats({})
        batches = self.batches(kind)
        if "rerun" in given:
            count = PROMPTS if kind == "text" else len(self.given["labels"])
            self.given["rerun"] = Rerun(self.network, alone(batches, count))
        if "tail" in given:
            self.given["tail"] = Tail(self.network, batches[0])
        if not probes:
            return Stats({})
        return observe(self.network, batches, probes, partial(self.progress, "measuring layers"))

    def batches(self, kind: str) -> Sequence[Batch]:
        """The documents of one kind; batches that were given are the text."""
        wanted, network = self.wanted, self.network
        if kind == "labels" and not isinstance(wanted.labels, str):
            self.given["labels"] = classes(wanted.labels, self.data)
            return self.data  # pyright: ignore[reportReturnType]
        if kind == "text" and not isinstance(self.data, Texts):
            return self.data
        texts = self.data if isinstance(self.data, Texts) else Texts()
        reader = load_reader(network)
        if kind == "labels":
            found = labelled(network, reader, str(wanted.labels), texts.length, wanted.noise)
            self.given["labels"] = found.labels
            return found.batches
        if kind == "views":
            self.given["views"] = VIEWS[1]
            return views(network, reader, texts, *VIEWS)
        if wanted.respond:
            self.given["prompt"] = texts.length
            return responses(network, reader, texts, wanted.respond)
        return windows(reader, texts, "calibrate")

    def all_described(self, picked: Sequence[Method], stats: Stats) -> dict[str, Figures]:
        """What is read off the pass alone is described side by side, the rest one by one."""
        single = {m.name: self.described(m, stats) for m in picked if m.given}
        free = [m for m in picked if not m.given]
        found = fan_out(lambda m: self.described(m, stats), free)
        both = single | dict(zip((m.name for m in free), found, strict=True))
        return {m.name: both[m.name] for m in picked}

    def described(self, method: Method, stats: Stats) -> Figures:
        """A description of all stacks; what needs the network's end is one of its last stack."""
        bound = method.bind(self.wanted.options(method.name), **self.given)
        stacks = [s for s in self.network.stacks if _measured(s, method, stats)]
        if {"tail", "rerun"} & set(method.given):
            stacks = [s for s in stacks if s.name == network_end(self.network)]
        self.progress(f"describing: {method.name}", 0, 1)
        with torch.no_grad():
            found = {s.name: bound(s, stats) for s in stacks}
        self.progress(f"describing: {method.name}", 1, 1)
        values = {k: v for f in found.values() for k, v in f.values.items()}
        maps = {
            name if len(found) == 1 else f"{stack} {name}": table
            for stack, f in found.items()
            for name, table in f.maps.items()
        }
        return Figures(values, next((f.note for f in found.values()), ""), maps)


def _itself(method: Method) -> tuple[str, ...]:
    return (method.name,) if method.family == "measure" else ()


def _measured(stack: Stack, method: Method, stats: Stats) -> bool:
    """Whether anything that a method needs was found of a stack's layers or matrices."""
    units = (unit for n in method.needs for unit in stats.values.get(n, ()))
    return not method.needs or any(unit.startswith(f"{stack.name}/") for unit in units)


def fetch(network: Network, key: str) -> dict[str, Tensor]:
    """The matrices `[out, in]` of a layer as stored, by their key; none that has no such layer."""
    layer = next((la for la in network.layers() if la.key == key), None)
    if layer is None:
        return {}
    tensors = network.fetch(layer)
    return {m.key: m.view(tensors[m.parameter]) for m in layer.matrices}


def _rows(
    network: Network, picked: Sequence[Method], stats: Stats, figures: Mapping[str, Figures]
) -> list[dict[str, Any]]:
    sizes = layer_bytes(network) if network.source is not None else _held(network)
    rows = []
    for layer in network.layers():
        row: dict[str, Any] = {
            "layer": layer.key,
            "parts": [part.name for part in layer.parts],
            "matrices": len(layer.matrices),
            "bytes": sizes[layer.key],
        }
        for method in picked:
            if method.family == "measure":
                value = stats.at(layer.key).get(method.name)
                found = value if isinstance(value, dict) else {"": value}
            else:
                found = figures[method.name].values.get(layer.key, {})
            for name, number in found.items():
                if isinstance(number, float) and math.isfinite(number):
                    row[f"{method.name}.{name}" if name else method.name] = number
        if "residual_cosine" in row:
            row["block_influence"] = 1 - row["residual_cosine"]
        rows.append(row)
    return rows


def _held(network: Network) -> dict[str, int]:
    """Bytes of every layer of a module in memory."""
    return {la.key: sum(p.nbytes for p in la.module.parameters()) for la in network.layers()}


def columns_of(rows: Sequence[Mapping[str, Any]], picked: Sequence[Method]) -> tuple[str, ...]:
    """What the table shows: the first figure of every method, then the second of each ..."""
    keys = dict.fromkeys(k for row in rows for k in row)
    ranked = [[k for k in keys if k == m.name or k.startswith(f"{m.name}.")] for m in picked]
    deepest = max(map(len, ranked), default=0)
    order = [group[i] for i in range(deepest) for group in ranked if i < len(group)]
    return tuple(order[:SHOWN])


def _more(figures: Mapping[str, Figures]) -> dict[str, Any]:
    """What no row holds: figures of stacks and matrices, maps, and what a sample was."""
    found: dict[str, Any] = {}
    for name, table in figures.items():
        found[name] = {
            "note": table.note,
            "stacks": {k: v for k, v in table.values.items() if "/" not in k},
            "matrices": {k: v for k, v in table.values.items() if k.count("/") > 1},
            "maps": {k: v.tolist() for k, v in table.maps.items()},
        }
    return found
