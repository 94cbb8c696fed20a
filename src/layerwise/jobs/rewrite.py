"""Rewrites: what a plan folds into the weights before anything is solved, layer by layer."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from time import monotonic
from typing import Any, NamedTuple, get_type_hints

from torch import Tensor

from layerwise.core.chain import nearest, run_chain
from layerwise.core.errors import LayerwiseError
from layerwise.core.fold import Folds, from_tensors, joined, to_tensors
from layerwise.core.journal import Journal
from layerwise.core.lockstep import walk
from layerwise.core.method import Method, find
from layerwise.core.mixing import Stream
from layerwise.core.network import Network
from layerwise.core.open import refolded, widened
from layerwise.core.plan import Edit, Plan, Step, chains_of
from layerwise.core.seam import Place, Seam, find_seams
from layerwise.core.stack import Layer
from layerwise.core.stats import Gathering, observe
from layerwise.core.stops import Batch
from layerwise.core.task import token_rows
from layerwise.core.trial import Trial
from layerwise.core.weight import Dense
from layerwise.jobs.session import Progress, silent
from layerwise.jobs.stock import streamed
from layerwise.jobs.turning import turned, untied

#: of the largest logit: what a rewrite may change, computed in float32
ALLOWED = 1e-3


#: what a line of the journal says of matrices, where none is solved
NOTHING = {"errors": {}, "bytes": 0, "unseen": []}


class Rewritten(NamedTuple):
    """What the rewrites of a plan came to.

    Changes of tensors, a row per layer and step, and the network with these changes.
    """

    folds: Folds
    rows: list[dict[str, Any]]
    network: Network


def rewrite(
    network: Network,
    plan: Plan,
    batches: Sequence[Batch],
    journal: Journal,
    progress: Progress = silent,
) -> Rewritten:
    """Carry out the rewrites of a plan, one after the other, each on what the last one left.

    Args:
        network: as it is stored.
        plan: its rewrites, and its edits, which a rewrite may ask for.
        batches: what the network reads meanwhile.
        journal: where every finished layer is kept.
        progress: called with what is done, how far, and out of how much.

    Raises:
        LayerwiseError: together they change what the network computes.
    """
    folds: Folds = {}
    rows: list[dict[str, Any]] = []
    for number, step in enumerate(plan.rewrites):
        now = refolded(network, folds) if folds else network
        tell, name = (
            partial(progress, f"rewriting layers ({step.method})"),
            f"{step.method}{number}",
        )
        try:
            if turns_stream(step):
                found, own = _turn(now, step, name, batches, journal, tell)
            else:
                each = _EachLayer(now, step, name, plan.edits, batches, journal)
                found, own = each.walk(tell)
        except LayerwiseError:
            if not journal.lines:  # refused before anything was done: nothing to go on from
                journal.remove()
            raise
        folds, rows = joined(folds, found), rows + own
    if not folds:
        return Rewritten(folds, rows, network)
    done = refolded(network, folds)
    must_keep(network, done, batches[0])
    return Rewritten(folds, rows, done)


def told(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """What rewrites came to, in words."""
    for name in dict.fromkeys(row["rewrite"] for row in rows):
        own = [row for row in rows if row["rewrite"] == name]
        seams = dict.fromkeys(seam for row in own for seam in row["seams"])
        yield f"{name.rstrip('0123456789')}: {', '.join(seams) or 'nothing that is rounded reads'}"
        refused: dict[str, list[str]] = {}
        for parameter, why in {k: w for row in own for k, w in row["refused"].items()}.items():
            refused.setdefault(why, []).append(parameter)
        for why, parameters in refused.items():
            yield f"  no seam at {', '.join(parameters)}: {why}"


def turns_stream(step: Step) -> bool:
    """Whether a rewrite is one of the whole stream, and not of the channels in a layer."""
    return get_type_hints(find(step.method, "rewrite").function)["seam"] is Stream


def as_rewritten(network: Network, steps: Sequence[Step]) -> Network:
    """A network with the tensors that it has after some rewrites, to count their bytes."""
    alone = untied(network) if any(turns_stream(step) for step in steps) else {}
    return refolded(network, alone) if alone else network


def _turn(
    network: Network,
    step: Step,
    name: str,
    batches: Sequence[Batch],
    journal: Journal,
    progress: Callable[[int, int], None],
) -> tuple[Folds, list[dict[str, Any]]]:
    """Rotate the stream; one entry of the journal, for it is one matrix."""
    method, key = find(step.method, "rewrite"), f"{name}/stream"
    if key not in journal:
        began = monotonic()
        probes = {n: find(n, "measure").bind()() for n in method.needs}
        stats = observe(network, batches, probes, progress).values if probes else {}
        rotation = method.bind(step.options)
        folds = turned(
            network, batches[0], lambda size: rotation(Stream(size), stats), step.method, progress
        )
        records = {name: Dense(value.cpu()) for name, value in to_tensors(folds).items()}
        report = {"seams": ["stream"], "refused": {}, "seconds": monotonic() - began}
        journal.write(key, records, NOTHING | report)
    held = {name: record.dense() for name, record in journal.read(key).items()}
    row = {k: journal.lines[key]["report"][k] for k in ("seams", "refused", "seconds")}
    return from_tensors(held), [{"rewrite": name, "layer": "all", **row}]


class _EachLayer:
    """A rewrite of channels on its way through the layers."""

    def __init__(
        self,
        network: Network,
        step: Step,
        name: str,
        edits: Sequence[Edit],
        batches: Sequence[Batch],
        journal: Journal,
    ) -> None:
        self.network, self.name, self.chain_of = network, name, chains_of(edits)
        self.batches, self.journal = batches, journal
        self.method: Method = find(step.method, "rewrite")
        self.options = step.options
        self.folds: Folds = {}
        self.rows: list[dict[str, Any]] = []
        self._seams: list[Seam] = []
        self._refused: dict[str, str] = {}
        self._began = 0.0
        self._read_paths: set[str] = set()

    def walk(self, progress: Callable[[int, int], None]) -> tuple[Folds, list[dict[str, Any]]]:
        """Every layer once; those that the journal holds are taken from it."""
        layers = self.network.layers()
        missing = {layer.key for layer in layers if self._key(layer) not in self.journal}
        probes = {name: find(name, "measure").bind()() for name in self.method.needs}
        gathering = Gathering(probes, self.batches)
        batches = self.batches if probes else self.batches[:1]
        with gathering:
            for stop in walk(self.network, batches, matrices="watch") if missing else ():
                layer = stop.layer
                if layer.key not in missing:
                    continue
                gathering.look(stop)
                if stop.kind == "enter":
                    self._began = monotonic()
                    trial = Trial(layer, stop.lanes[0].args, stop.lanes[0].kwargs)
                    self._seams, refused = find_seams(trial, self._seams)
                    self._refused = refused or self._refused
                elif stop.kind == "leave":
                    self._choose(layer, gathering)
                    missing.remove(layer.key)
                    progress(len(layers) - len(missing), len(layers))
        for layer in layers:
            self._read(layer)
        return self.folds, self.rows

    def _key(self, layer: Layer) -> str:
        return f"{self.name}/{layer.key}"

    def _choose(self, layer: Layer, gathering: Gathering) -> None:
        """Let the method say how much at every seam, and write the layer to the journal."""
        groups = dict.fromkeys(m.inputs for m in layer.matrices)
        stats = {inputs: gathering.take(inputs) for inputs in groups}
        tensors = dict(layer.module.named_parameters(remove_duplicate=False))
        names = {m.parameter for m in layer.matrices}
        found: Folds = {}
        scaled = []
        for seam in self._seams:
            mine = [m for m in layer.matrices if m.parameter in seam.readers]
            place = Place(
                seam.size,
                seam.norm,
                {m.key: m.view(tensors[m.parameter].detach()) for m in mine},
                {m.key: seam.readers[m.parameter] for m in mine},
            )
            if any(w.shape[1] != len(place.channels[k]) for k, w in place.weights.items()):
                continue  # seen by the operation as another shape than that of the matrix
            chains = {m.key: self.chain_of(m) for m in mine}
            rounded = {key: partial(_rounded, chain) for key, chain in chains.items() if chain}
            bound = self.method.bind(self.options, rounded=rounded)
            scale = bound(place, {m.key: _of_width(stats[m.inputs], m.shape[1]) for m in mine})
            if (scale == 1).all():
                continue
            found = joined(found, seam.folds(scale.float(), tensors))
            scaled.append(seam.name)
        records = {key: Dense(value.cpu()) for key, value in to_tensors(found).items()}
        unused = {n: why for n, why in self._refused.items() if n in names or n in tensors}
        report = {"seams": scaled, "refused": unused, "seconds": monotonic() - self._began}
        self.journal.write(self._key(layer), records, NOTHING | report)

    def _read(self, layer: Layer) -> None:
        """Take up what the journal holds of a layer, under the names of the checkpoint."""
        key, path = self._key(layer), self.network.origins.get(layer.path, layer.path)
        held = {name: record.dense() for name, record in self.journal.read(key).items()}
        if path not in self._read_paths:  # of a layer that runs twice the first visit counts
            own = {f"{path}.{name}": changes for name, changes in from_tensors(held).items()}
            self.folds = joined(self.folds, own)
            self._read_paths.add(path)
        report = self.journal.lines[key]["report"]
        self.rows.append(
            {"rewrite": self.name, "layer": layer.key}
            | {name: report[name] for name in ("seams", "refused", "seconds")}
        )


def _of_width(stats: Mapping[str, Tensor], columns: int) -> Mapping[str, Tensor]:
    """Statistics of a matrix's inputs, if that is what they are."""
    return stats if all(value.shape[-1] == columns for value in stats.values()) else {}


def _rounded(chain: Sequence[Step], weight: Tensor) -> Tensor:
    """What the steps that follow make of a weight, without statistics."""
    return run_chain(weight, {}, nearest(chain)).dense().float()


def must_keep(
    network: Network,
    changed: Network,
    batch: Batch,
    what: str = "rewrites of the plan",
    fix: str = "leave them out: layers of this network hand each other more than their output",
) -> None:
    """Refuse folds that change what the network computes, in float32.

    Raises:
        LayerwiseError: they do.
    """
    plain, exact = widened(network), refolded(changed, {}, exact=True)
    answers = streamed(plain, [batch], read=token_rows), streamed(exact, [batch], read=token_rows)
    with answers[0] as before, answers[1] as after:
        wanted, found = before(batch).float(), after(batch).float()
    off = ((found - wanted).abs().max() / wanted.abs().max().clamp_min(1e-30)).item()
    if not off <= ALLOWED:
        raise LayerwiseError(
            what,
            allowed=f"folds that change no number by more than {ALLOWED:.0e} of the largest",
            found=f"{off:.1e}",
            fix=fix,
        )
