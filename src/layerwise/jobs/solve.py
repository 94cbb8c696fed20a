"""Solving: every edited matrix becomes a record, layer by layer, each layer journalled."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from time import monotonic
from typing import Any

from layerwise.core.journal import Journal
from layerwise.core.lockstep import Batch, Rows, Stop, walk
from layerwise.core.method import find
from layerwise.core.network import Network
from layerwise.core.plan import Edit, Step, chain_for
from layerwise.core.stack import Layer, Matrix
from layerwise.core.stats import Gathering
from layerwise.core.weight import Dense, Weight
from layerwise.jobs.session import Progress, silent


def run_chain(weight: Any, stats: Mapping[str, Any], chain: Sequence[Step]) -> Weight:
    """Apply the methods of a chain one after another; each sees the dense form of the last."""
    record: Weight = Dense(weight)
    for step in chain:
        record = find(step.method, "weight").bind(step.options)(record.dense(), stats)
    return record


def needs_of(edits: Sequence[Edit]) -> list[str]:
    """The measures that the methods of some edits need, each once."""
    steps = (step for edit in edits for step in edit.chain)
    return list(dict.fromkeys(n for step in steps for n in find(step.method, "weight").needs))


class Solver:
    """Solves the matrices of one layer at a time and keeps the journal."""

    def __init__(
        self, network: Network, edits: Sequence[Edit], journal: Journal, batches: Sequence[Batch]
    ) -> None:
        self.network, self.edits, self.journal = network, edits, journal
        self.probes = {name: find(name, "measure").bind()() for name in needs_of(edits)}
        self.gathering = Gathering(self.probes, batches)
        self.records: dict[str, Weight] = {}
        self.errors: dict[str, float] = {}
        self.solved: list[str] = []
        self.began = 0.0

    def chain(self, matrix: Matrix) -> tuple[Step, ...]:
        """What the plan does to a matrix."""
        return chain_for(self.edits, matrix)

    def look(self, stop: Stop) -> None:
        """Take part in a walk: replay finished layers, solve the others."""
        layer = stop.layer
        if stop.kind == "enter":
            self.records, self.errors, self.began = {}, {}, monotonic()
            if layer.key in self.journal:
                self.records = self.journal.read(layer.key)
                for matrix in layer.matrices:
                    if matrix.key in self.records:
                        stop.substitute(matrix, self.records[matrix.key].dense())
            else:
                self.gathering.look(stop)
        elif layer.key in self.journal:
            return
        elif stop.kind == "at":
            self.gathering.look(stop)
            for rows in stop.rows:
                self._solve_group(stop, rows)
        else:
            self._never_reached(stop)
            self.finish(layer)

    def _solve_group(self, stop: Stop, rows: Rows) -> None:
        stats = self.gathering.take(rows.inputs)
        for matrix in rows.matrices:
            if self.chain(matrix) and matrix.key not in self.records:
                self._solve(stop, matrix, stats)

    def _solve(self, stop: Stop, matrix: Matrix, stats: dict[str, Any]) -> None:
        weight = stop.weight(matrix).to(self._stored(matrix)).contiguous()
        record = run_chain(weight, stats, self.chain(matrix))
        self.records[matrix.key] = record
        self.errors[matrix.key] = relative_error(weight, record, stats.get("second_moment"))
        stop.substitute(matrix, record.dense())

    def _stored(self, matrix: Matrix) -> Any:
        return self.network.stored.dtype if self.network.source else self.network.dtype

    def _never_reached(self, stop: Stop) -> None:
        """Experts that no token was sent to are solved without statistics."""
        for matrix in stop.layer.matrices:
            if self.chain(matrix) and matrix.key not in self.records:
                self._solve(stop, matrix, {})

    def finish(self, layer: Layer) -> None:
        """Write the layer to the journal."""
        seconds = monotonic() - self.began
        report = {"errors": self.errors, "bytes": sum(r.nbytes for r in self.records.values())}
        self.journal.write(layer.key, self.records, report | {"seconds": seconds})
        self.solved.append(layer.key)


def relative_error(weight: Any, record: Weight, moment: Any) -> float:
    """`tr(E H E^T) / tr(W H W^T)`, with the identity where there is no second moment."""
    w = weight.float()
    e = record.dense().float() - w
    above = ((e if moment is None else e @ moment) * e).sum().item()
    below = ((w if moment is None else w @ moment) * w).sum().item()
    return above / max(below, 1e-300)


def solve(
    network: Network,
    edits: Sequence[Edit],
    batches: Sequence[Batch],
    folder: Path,
    job: Mapping[str, Any],
    progress: Progress = silent,
) -> Journal:
    """Solve every edited matrix; what the journal already holds is replayed, not solved again."""
    journal = Journal(folder, job)
    layers = network.layers()
    if not edits or all(layer.key in journal for layer in layers):
        return journal
    solver = Solver(network, edits, journal, batches)
    if solver.probes:
        done = 0
        clean = any(probe.clean for probe in solver.probes.values())
        for stop in walk(network, batches, matrices="pause", clean=clean):
            solver.look(stop)
            if stop.kind == "leave":
                done += 1
                progress("solving layers", done, len(layers))
        return journal
    for done, layer in enumerate(layers, 1):
        if layer.key not in journal:
            _solve_alone(solver, layer)
        progress("solving layers", done, len(layers))
    return journal


def _solve_alone(solver: Solver, layer: Layer) -> None:
    """A layer whose methods need no data."""
    solver.records, solver.errors, solver.began = {}, {}, monotonic()
    tensors = solver.network.fetch(layer)
    for matrix in layer.matrices:
        chain = solver.chain(matrix)
        if chain:
            weight = matrix.view(tensors[matrix.parameter]).contiguous()
            record = run_chain(weight, {}, chain)
            solver.records[matrix.key] = record
            solver.errors[matrix.key] = relative_error(weight, record, None)
    solver.finish(layer)
