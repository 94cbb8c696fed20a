"""Probes, and what they found: everything is measured in one pass over the data."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cache
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from layerwise.core.lockstep import walk
from layerwise.core.machine import on_disk
from layerwise.core.network import Network
from layerwise.core.stack import Stack
from layerwise.core.stops import Batch, Lane, Rows, Stop, hidden
from layerwise.core.stream import Added, Attention, StreamWatch, changed
from layerwise.core.tokens import by_token


class Seen(NamedTuple):
    """What a probe is shown of one batch.

    For `layer` probes `inputs` and `output` are hidden states `[batch, seq, dim]`, `clean` the
    output of the never edited stream where there is one; for `input` probes `inputs` are the rows
    `[tokens, in]` that an input group receives, `clean` those of the clean stream where it has the
    same tokens there (a router may send others). `fed` holds
    what other probes emitted for this batch, and `replay` runs the layer once more on it. `added`
    is what every part added to the stream, `attention` the attention calls of the layer, for
    probes that `watch` them; `total` how many tokens all documents have, where that is known;
    `owners` the document in the batch of every row of an input group,
    where its rows are the layer's tokens. `whole` is what the layer as a whole adds, measured once
    for all probes.
    """

    inputs: Tensor
    output: Tensor | None
    mask: Tensor | None
    clean: Tensor | None
    fed: Mapping[str, Any]
    replay: Callable[[], Any] | None
    added: Mapping[str, Added] = MappingProxyType({})
    attention: Sequence[Attention] = ()
    owners: Tensor | None = None
    whole: Callable[[], Added] | None = None
    total: int | None = None

    def update(self) -> Added:
        """Norms and inner product of the input and of the layer's whole update, token by token."""
        if self.whole is not None:
            return self.whole()
        assert self.output is not None
        return changed(self.inputs, self.output)


class Probe(NamedTuple):
    """Pure functions that gather a statistic per unit.

    `call` probes run before the layer and may replay it; what they `emit` for a batch is fed to
    every other probe of that layer. With `clean` the never edited stream runs beside. `watch` asks
    for what is seen only while the layer runs: `added`, `attention`. With `figures` it ends in a
    number, or numbers by name, to be read as they are; else in what others work on.
    """

    unit: Literal["call", "layer", "input"]
    init: Callable[[str], Any]
    update: Callable[[Any, Seen], Any]
    finish: Callable[[Any], Any]
    emit: Callable[[Any], Any] | None = None
    clean: bool = False
    watch: tuple[Literal["added", "attention"], ...] = ()
    figures: bool = False


@dataclass(frozen=True)
class Stats:
    """What was measured: `values[probe][unit]`."""

    values: Mapping[str, Mapping[str, Any]]

    def __getitem__(self, probe: str) -> Mapping[str, Any]:
        return self.values[probe]

    def along(self, probe: str, stack: Stack) -> dict[str, Any]:
        """What a probe found of the layers of a stack, in their order."""
        found = self.values[probe]
        return {layer.key: found[layer.key] for layer in stack.layers if layer.key in found}

    def at(self, unit: str) -> dict[str, Any]:
        """Everything known about one unit."""
        return {name: units[unit] for name, units in self.values.items() if unit in units}


@dataclass(frozen=True)
class Scores:
    """A value per unit, where more means more important.

    `unit` is what the keys name. `origin` is the method that gave the values. `nats` holds when
    a value is the measured rise of the loss for the trial edit whose relative error is `trial`.
    """

    values: Mapping[str, float]
    unit: Literal["layer", "span", "part", "group", "matrix", "expert"]
    origin: str
    trial: Mapping[str, float] = field(default_factory=dict)

    @property
    def nats(self) -> bool:
        """Whether the values were measured on a trial edit."""
        return bool(self.trial)


@dataclass(frozen=True)
class Figures:
    """Named numbers per layer or matrix, for people to read: no importance is implied.

    `maps` are tables of layers by layers, or by tokens. `note` says what one sample was, how many
    there were, and what unrelated layers would show.
    """

    values: Mapping[str, Mapping[str, float]]
    note: str = ""
    maps: Mapping[str, Tensor] = field(default_factory=dict)


class Gathering:
    """The states of a set of probes while a walk goes on."""

    def __init__(self, probes: Mapping[str, Probe], batches: Sequence[Batch]) -> None:
        self.probes, self.batches = probes, batches
        self.states: dict[str, dict[str, Any]] = {name: {} for name in probes}
        self._fed: dict[int, dict[str, Any]] = {}
        self._wanted = {kind for probe in probes.values() for kind in probe.watch}
        self._watch: StreamWatch | None = None
        self._tokens = _tokens(batches)
        self._open = ExitStack()

    def look(self, stop: Stop) -> None:
        """Show a stop of the walk to every probe that it concerns."""
        if stop.kind == "enter":
            self._fed = {lane.batch: {} for lane in stop.lanes}
            for lane in _edited(stop):
                self._show("call", stop.layer.key, lane, self._of_layer(stop, lane))
            self._begin_watch(stop)
        elif stop.kind == "at":
            for rows in stop.rows:
                self._rows(rows, stop)
        elif stop.kind == "leave":
            self._open.close()
            for lane in _edited(stop):
                self._show("layer", stop.layer.key, lane, self._of_layer(stop, lane))
            self._put_by(stop.layer.key)

    def _begin_watch(self, stop: Stop) -> None:
        if self._wanted:
            inputs = {la.batch: hidden((la.args, la.kwargs)) for la in _edited(stop)}
            wanted = ("added" in self._wanted, "attention" in self._wanted)
            self._watch = StreamWatch(stop.layer, inputs, *wanted)
            self._open.enter_context(self._watch)

    def __enter__(self) -> "Gathering":
        return self

    def __exit__(self, *error: object) -> None:
        self._open.close()

    def _of_layer(self, stop: Stop, lane: Lane) -> Seen:
        clean = [other for other in stop.lanes if other.clean and other.batch == lane.batch]
        before = stop.kind == "enter"
        inputs = hidden((lane.args, lane.kwargs))
        output = None if before else hidden(lane.output)
        watch = None if before else self._watch
        return Seen(
            inputs=inputs,
            output=output,
            mask=self._mask(lane.batch, inputs),
            clean=hidden(clean[0].output) if clean and not before else None,
            fed=self._fed[lane.batch],
            replay=(lambda: stop.replay(lane)) if before else None,
            added=watch.additions(output) if watch and output is not None else {},
            attention=watch.attention[lane.batch] if watch else (),
            whole=output if output is None else cache(lambda: changed(inputs, output)),
            total=self._total(lane.batch, inputs if output is None else output),
        )

    def _total(self, batch: int, state: Tensor) -> int | None:
        ids = self.batches[batch].get("input_ids")
        same = ids is not None and ids.shape == by_token(state).shape[:2]
        return self._tokens if same else None

    def _mask(self, batch: int, state: Tensor) -> Tensor | None:
        """The mask of the batch, if it is one of the positions of this stack."""
        mask = self.batches[batch].get("attention_mask")
        return mask.to(state.device) if mask is not None and mask.shape == state.shape[:2] else None

    def _rows(self, rows: Rows, stop: Stop) -> None:
        for lane in _edited(stop):
            found = rows.edited[lane.batch]
            mask = self.batches[lane.batch].get("attention_mask")
            mask = None if mask is None else mask.to(found.device)
            owners = _owners(found, hidden((lane.args, lane.kwargs)))
            clean = rows.clean.get(lane.batch)
            clean = clean if clean is not None and clean.shape == found.shape else None
            if mask is not None and mask.numel() == found.shape[0]:
                kept = mask.reshape(-1).bool()
                found = found[kept]
                owners = owners if owners is None else owners[kept]
                clean = clean if clean is None else clean[kept]
            fed = self._fed.get(lane.batch, {})
            if len(found):
                seen = Seen(found, None, mask, clean, fed, None, owners=owners)
                self._show("input", rows.inputs, lane, seen)

    def _show(self, unit: str, key: str, lane: Lane, seen: Seen) -> None:
        for name, probe in self.probes.items():
            if probe.unit != unit:
                continue
            states = self.states[name]
            before = states[key] if key in states else probe.init(key)
            states[key] = probe.update(before, seen)
            if probe.emit is not None:
                self._fed[lane.batch][name] = probe.emit(states[key])

    def _put_by(self, layer: str) -> None:
        """Leave what is known of a layer in files, so that depth takes no memory."""
        for states in self.states.values():
            for key in states:
                if key == layer or key.startswith(f"{layer}/"):
                    states[key] = _filed(states[key])

    def take(self, key: str) -> dict[str, Any]:
        """What every probe found for one unit, which is then forgotten."""
        return {
            name: self.probes[name].finish(states.pop(key))
            for name, states in self.states.items()
            if key in states
        }

    def finish(self) -> Stats:
        """Close every state."""
        done: dict[str, dict[str, Any]] = {}
        for name, probe in self.probes.items():
            states = self.states[name]
            done[name] = {key: _filed(probe.finish(states.pop(key))) for key in list(states)}
        return Stats(done)


def _tokens(batches: Sequence[Batch]) -> int | None:
    """Tokens of all documents; none where a decoder has positions of its own."""
    if any("input_ids" not in batch or "decoder_input_ids" in batch for batch in batches):
        return None
    masks = [batch.get("attention_mask") for batch in batches]
    return sum(
        batch["input_ids"].numel() if mask is None else int(mask.sum())
        for batch, mask in zip(batches, masks, strict=True)
    )


def _filed(tree: Any) -> Any:
    """A nest whose big tensors lie in files."""
    return tree_map(lambda leaf: on_disk(leaf) if isinstance(leaf, Tensor) else leaf, tree)


def _owners(rows: Tensor, state: Tensor) -> Tensor | None:
    """The document of every row, where rows are the positions of the layer's input."""
    batch, seq = by_token(state).shape[:2]
    if len(rows) != batch * seq:
        return None
    return torch.arange(batch, device=rows.device).repeat_interleave(seq)


def _edited(stop: Stop) -> Iterator[Lane]:
    return (lane for lane in stop.lanes if not lane.clean)


def observe(
    network: Network,
    batches: Sequence[Batch],
    probes: Mapping[str, Probe],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Stats:
    """Run the union of all probes in one pass over the data.

    Example:
        >>> import torch, layerwise
        >>> from layerwise.measure.residual import residual_cosine
        >>> network = layerwise.open("demo")
        >>> batch = {"input_ids": torch.arange(16)[None]}
        >>> stats = observe(network, [batch], {"cosine": residual_cosine()})
        >>> sorted(stats["cosine"])[0]
        'decoder/0'
    """
    gathering = Gathering(probes, batches)
    inside = any(probe.unit == "input" for probe in probes.values())
    clean = any(probe.clean for probe in probes.values())
    total = len(network.layers())
    done = 0
    with gathering:
        for stop in walk(network, batches, matrices="watch" if inside else "", clean=clean):
            gathering.look(stop)
            if stop.kind == "leave":
                done += 1
                progress(done, total)
    return gathering.finish()
