"""Solving: every edited matrix becomes a record, layer by layer, each layer journalled."""

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate, chain, pairwise
from time import monotonic
from typing import Any, NamedTuple

import torch
from torch import Tensor

from layerwise.core.chain import goes_by_rows, run_chain
from layerwise.core.errors import refusing
from layerwise.core.fan import Engine, fan_out
from layerwise.core.journal import Journal
from layerwise.core.lockstep import walk
from layerwise.core.method import find
from layerwise.core.network import Network, fill
from layerwise.core.plan import Edit, Step, chains_of
from layerwise.core.stack import Layer, Matrix
from layerwise.core.stats import Gathering
from layerwise.core.stops import Batch, Stop
from layerwise.core.weight import Weight, some_rows
from layerwise.jobs.session import Progress, silent

#: seconds in which a layer that needs no data may be solved again, after a job was stopped
QUICK = 0.5


class Task(NamedTuple):
    """Matrices to solve, one above the other where there are several; each may stand alone."""

    weights: tuple[Tensor, ...]
    dtype: torch.dtype
    stats: Mapping[str, Any]
    chain: tuple[Step, ...]


def solve_matrices(task: Task) -> list[tuple[Weight, float]]:
    """The record of every matrix and its relative error."""
    weights = [weight.to(task.dtype).contiguous() for weight in task.weights]
    if len(weights) == 1:
        records = [run_chain(weights[0], task.stats, task.chain)]
    else:
        ends = list(accumulate(map(len, weights), initial=0))
        whole = run_chain(torch.cat(weights), task.stats, task.chain)
        records = [some_rows(whole, slice(*place)) for place in pairwise(ends)]
    moment = task.stats.get("second_moment")
    pairs = zip(weights, records, strict=True)
    return [(record, relative_error(weight, record, moment)) for weight, record in pairs]


def try_chains(edits: Sequence[Edit]) -> None:
    """Run every chain once on a small matrix, so that a wrong option is found before the work.

    Raises:
        LayerwiseError: a method refuses its options.
    """
    small = torch.linspace(-1, 1, 8 * 256).reshape(8, 256)
    tried: list[tuple[Step, ...]] = []
    for edit in edits:
        if edit.chain in tried:
            continue
        tried.append(edit.chain)
        with refusing(
            f"plan, {edit.select}",
            allowed="chains of methods that can be solved",
            fix="correct the options, `layerwise methods --family weight` lists them",
        ):
            run_chain(small, {}, edit.chain)


def needs_of(edits: Sequence[Edit]) -> list[str]:
    """The measures that the methods of some edits need, each once."""
    steps = (step for edit in edits for step in edit.chain)
    return list(dict.fromkeys(n for step in steps for n in find(step.method, "weight").needs))


class Solver:
    """Solves the matrices of one layer at a time and keeps the journal."""

    def __init__(
        self,
        network: Network,
        edits: Sequence[Edit],
        journal: Journal,
        batches: Sequence[Batch],
        engine: Engine,
        given: Mapping[str, Mapping[str, Any]] = {},
    ) -> None:
        self.given = given
        self.network, self.journal = network, journal
        #: what the plan does to a matrix
        self.chain = chains_of(edits)
        # what is solved lies in this process; sending it to another one costs more than it saves
        self.engine = engine if engine.kind == "ray" else Engine("threads", engine.workers)
        needs = () if given else needs_of(edits)
        self.probes = {name: find(name, "measure").bind()() for name in needs}
        self.gathering = Gathering(self.probes, batches)
        self.records: dict[str, Weight] = {}
        self.errors: dict[str, float] = {}
        self.unseen: list[str] = []
        self.began = 0.0
        self.reports = {key: line["report"] for key, line in journal.lines.items()}

    def finished(self, layer: Layer) -> Mapping[str, Weight]:
        """The records of a layer; one that no data was needed for, or came to, is solved now."""
        if layer.key in self.journal:
            return self.journal.read(layer.key)
        if not any(self.chain(matrix) for matrix in layer.matrices):
            return {}
        self._begin()
        tensors = self.network.fetch(layer)
        self._solve(layer.matrices, lambda m: m.view(tensors[m.parameter]), {})
        self.finish(layer)
        return self.records

    def look(self, stop: Stop) -> None:
        """Take part in a walk: replay finished layers, solve the others."""
        layer = stop.layer
        if stop.kind == "enter":
            self._begin()
            if layer.key in self.journal:
                self.records = dict(self.journal.read(layer.key))
                stop.substitute_all(self.records)
            else:
                self.gathering.look(stop)
        elif layer.key in self.journal:
            return
        elif stop.kind == "at":
            self.gathering.look(stop)
            stats = {rows.inputs: self.gathering.take(rows.inputs) for rows in stop.rows}
            members = [matrix for rows in stop.rows for matrix in rows.matrices]
            self._solve(members, stop.weight, stats, stop)
        else:
            self._solve(layer.matrices, stop.weight, {}, stop)  # what no token was sent to
            self.finish(layer)

    def _begin(self) -> None:
        self.records, self.errors, self.unseen, self.began = {}, {}, [], monotonic()

    def _solve(
        self,
        matrices: Sequence[Matrix],
        weight: Callable[[Matrix], Tensor],
        stats: Mapping[str, Mapping[str, Any]],
        stop: Stop | None = None,
    ) -> None:
        """Solve those that the plan edits and that are not solved yet, side by side."""
        kind = self.network.stored.dtype if self.network.source else self.network.dtype
        open_ = [m for m in matrices if self.chain(m) and m.key not in self.records]
        known = {m.key: self.given.get(m.key, stats.get(m.inputs, {})) for m in open_}
        groups = self._together(open_, known)
        tasks = [
            Task(tuple(map(weight, group)), kind, known[group[0].key], self.chain(group[0]))
            for group in groups
        ]
        if self.engine.kind == "ray":  # a slice would travel with all of its parameter
            tasks = [t._replace(weights=tuple(w.clone() for w in t.weights)) for t in tasks]
        self.unseen += [m.key for m in open_ if self.probes and not stats.get(m.inputs)]
        solved = chain.from_iterable(fan_out(solve_matrices, tasks, self.engine))
        for matrix, (record, error) in zip(chain.from_iterable(groups), solved, strict=True):
            self.records[matrix.key], self.errors[matrix.key] = record, error
            if stop is not None:
                stop.substitute(matrix, record.dense())

    def _together(
        self, matrices: Sequence[Matrix], known: Mapping[str, Mapping[str, Any]]
    ) -> list[list[Matrix]]:
        """Matrices that are solved as one: of the same inputs, whose moments are factored once."""
        groups: list[list[Matrix]] = []
        for matrix in matrices:
            first = groups[-1][0] if groups else matrix
            alike = known[first.key] is known[matrix.key] and self.chain(first) == self.chain(
                matrix
            )
            if first is not matrix and alike and goes_by_rows(self.chain(matrix)):
                groups[-1].append(matrix)
            else:
                groups.append([matrix])
        return groups

    def finish(self, layer: Layer) -> None:
        """Write the layer to the journal, and which matrices no data came to.

        One that needs no data and took no time is not written: it would be read as slowly.
        """
        seconds = monotonic() - self.began
        self.reports[layer.key] = {
            "errors": self.errors,
            "bytes": sum(r.nbytes for r in self.records.values()),
            "unseen": self.unseen,
            "seconds": seconds,
        }
        if self.probes or seconds > QUICK:
            self.journal.write(layer.key, self.records, self.reports[layer.key])


def relative_error(weight: Any, record: Weight, moment: Any) -> float:
    """`tr(E H E^T) / tr(W H W^T)`, with the identity where there is no second moment."""
    above = below = torch.zeros((), device=weight.device)
    step = max(1, TOGETHER // weight.shape[1])
    for made, rows in zip(record.dense().split(step), weight.split(step), strict=True):
        w = rows.float()
        e = made.float() - w
        above = above + _energy(e, moment)
        below = below + _energy(w, moment)
    return (above / below.clamp_min(1e-30)).item()


#: weights of a matrix that are looked at together, so that they stay in a processor's cache
TOGETHER = 1 << 18


def _energy(rows: Tensor, moment: Tensor | None) -> Tensor:
    seen = rows if moment is None else rows @ moment
    return torch.dot(seen.flatten(), rows.flatten())


def solve(
    network: Network,
    edits: Sequence[Edit],
    batches: Sequence[Batch],
    journal: Journal,
    progress: Progress = silent,
    engine: Engine = Engine(),
    given: Mapping[str, Mapping[str, Any]] = {},
) -> Solver:
    """Solve what needs data, in one walk; the rest is solved when a layer is asked for.

    Statistics that are `given`, by the key of a matrix, are not measured. What the journal
    already holds is replayed, not solved again.
    """
    solver = Solver(network, edits, journal, batches, engine, given)
    layers = network.layers()
    if solver.probes and not all(layer.key in solver.journal for layer in layers):
        clean = any(probe.clean for probe in solver.probes.values())
        done = 0
        for stop in walk(network, batches, matrices="pause", clean=clean):
            solver.look(stop)
            if stop.kind == "leave":
                done += 1
                progress("solving layers", done, len(layers))
    return solver


def put_outside(network: Network, made: Mapping[str, Weight]) -> None:
    """Let a network run on what is written of its embedding and head."""
    fill(network.module, {name: record.dense() for name, record in made.items()}, network.device)
    if made:
        network.model.tie_weights()
