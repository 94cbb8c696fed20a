"""What plans are measured by: solved, with one layer in memory, and compared with the original."""

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from msgspec import structs
from torch import Tensor

from layerwise.core.find_experts import find_experts, without_experts
from layerwise.core.fold import Fold, Folds
from layerwise.core.journal import Journal
from layerwise.core.network import Network
from layerwise.core.open import open_network, refolded, unrolled
from layerwise.core.plan import Plan
from layerwise.core.quality import Quality, measure_quality
from layerwise.core.reader import samples_of, windows
from layerwise.core.stack import Layer
from layerwise.core.weight import Weight
from layerwise.export import TARGETS
from layerwise.jobs.request import Request, identity
from layerwise.jobs.session import Progress, load_reader, silent, texts_of
from layerwise.jobs.solve import needs_of, put_outside, solve
from layerwise.jobs.stock import streamed

#: windows that plans are solved on where many are compared, and documents that they are measured on
WINDOWS, DOCUMENTS = 16, 16
#: what the kept answers of the original may take
KEPT_BYTES = 500_000_000


class Contest(NamedTuple):
    """What the candidates are measured on, and how many bytes they may take.

    Where `known` is given, what the original answers is kept in it, if it is not too much.
    """

    model: str | Path
    plan: Plan
    nbytes: int
    batches: Sequence[Any]
    dtype: str = "float32"
    device: str = "auto"
    folds: Mapping[str, tuple[Fold, ...]] = {}
    known: dict[int, Tensor] | None = None

    def opened(
        self, wiring: Mapping[str, Sequence[Any]] | None = None, folds: Folds = {}
    ) -> Network:
        """The original, or what a wiring and folds make of it, to compute with."""
        found = open_network(self.model, wiring=wiring, device=self.device, dtype=self.dtype)
        found = TARGETS[self.plan.target].folded(unrolled(found))
        return refolded(found, folds) if folds else found

    def qualities(
        self, edited: Network, records: Callable[[Layer], Mapping[str, Weight]] = lambda layer: {}
    ) -> tuple[Quality, Quality]:
        """The original and a candidate, with one layer of each in memory."""
        with self._original() as original, streamed(edited, self.batches, records) as answers:
            before, after = measure_quality(self.batches, original, answers)
            return before, after

    @contextmanager
    def _original(self) -> Iterator[Callable[[Any], Tensor]]:
        """What the original answers to a batch."""
        known = self.known
        if known and len(known) == len(self.batches):
            yield lambda batch: known[id(batch)]
            return
        with streamed(self.opened(), self.batches) as answers:

            def kept(batch: Any) -> Tensor:
                found = answers(batch)
                if known is not None and found.nbytes * len(self.batches) <= KEPT_BYTES:
                    known[id(batch)] = found
                return found

            yield kept

    def solved(self, plan: Plan, progress: Progress = silent) -> Quality:
        """The original with the order and the edits of another plan, solved on that plan's data."""
        network = open_network(self.model, wiring=plan.wiring, device=self.device)
        experts = find_experts(network) if plan.units else ()
        network = without_experts(network, plan.units, experts)
        network = TARGETS[plan.target].folded(network)
        needs = needs_of(plan.edits)
        folds = self.folds if plan.rewrites else {}
        network = refolded(network, folds) if folds else network
        edited, outside = (
            without_experts(self.opened(plan.wiring, folds), plan.units, experts),
            TARGETS[plan.target].outside(network, plan.export),
        )
        put_outside(network, outside)
        put_outside(edited, outside)
        reader = load_reader(network) if needs else None
        batches = windows(reader, texts_of(plan.data), "calibrate") if reader else []
        with tempfile.TemporaryDirectory() as folder, Journal(Path(folder), {}) as journal:
            solver = solve(network, plan.edits, batches, journal, progress)
            return self.qualities(edited, solver.finished)[1]

    def roughly(self, plan: Plan) -> Quality:
        """A plan, solved on a little text."""
        few = structs.replace(plan.data, samples=min(plan.data.samples, WINDOWS))
        return self.solved(structs.replace(plan, data=few))


def contest_on(request: Request, network: Network) -> Contest:
    """The select split, on which the plans that a request weighs are measured."""
    texts = texts_of(request.data)._replace(length=256)
    batches = samples_of(load_reader(network), texts, "select", DOCUMENTS)
    plan = Plan(model=identity(network), data=request.data)
    return Contest(request.model, plan, 0, batches, device=request.device, known={})
