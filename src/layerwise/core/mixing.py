"""Where the residual stream itself can be mixed: rotated, and everything on it turned along.

A layer allows it if it computes `f(x Q) = f(x) Q` once the gains of the norms that read its stream
are folded into the matrices behind them, those matrices take `Q` on their columns, and the matrices
that write into the stream take it on their rows. Who writes is found by trying: with all that reads
silenced, what is added to the output of a writer must come out of the layer as it is, whatever the
factor. Then the layer is run on a rotated stream, and what comes out has to be rotated.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from layerwise.core.fold import Fold, Folds, joined
from layerwise.core.seam import KEPT, Seam, factors
from layerwise.core.stops import hidden
from layerwise.core.trial import Run, Trial


class Stream(NamedTuple):
    """The residual stream as a method sees it: how many channels it has."""

    size: int


class Ports(NamedTuple):
    """What a layer reads its stream through, and what writes into it; names inside the layer."""

    norms: tuple[Seam, ...]
    writers: Mapping[str, int]

    def folds(self, mix: Float[Tensor, "size size"], tensors: Mapping[str, Tensor]) -> Folds:
        """Gains folded into the matrices behind them, and everything on the stream rotated."""
        gains = [seam.folds(gain_of(seam, tensors), tensors) for seam in self.norms]
        reads = {n: (Fold(seam.axes[n], mix),) for seam in self.norms for n in seam.readers}
        return joined(*gains, reads, {n: (Fold(ax, mix),) for n, ax in self.writers.items()})


def gain_of(seam: Seam, tensors: Mapping[str, Tensor]) -> Tensor:
    """What a norm multiplies by."""
    first = seam.givers[0]
    return tensors[first.parameter].float() + first.shift


def find_ports(trial: Trial, seams: Sequence[Seam], size: int) -> Ports | str:
    """What a layer reads and writes its stream through, or why that cannot be told."""
    norms = tuple(s for s in seams if s.norm and s.size == size and _whole(s))
    if not norms:
        return "no norm with a gain stands between the stream and the matrices that read it"
    if any(len(s.givers) > 1 and _shifted(s, trial) for s in norms):
        return "a norm adds a bias to the stream that is read"
    if any(not gain_of(s, trial.tensors).all() for s in norms):
        return "a norm has a gain of 0, which cannot be folded"
    writers = _writers(trial, {n for seam in norms for n in seam.readers}, size)
    if not writers:
        return "no matrix writes into the stream as it is; a norm or a gate stands behind it"
    return Ports(norms, writers)


def turns(trial: Trial, ports: Ports, mix: Float[Tensor, "size size"]) -> str | None:
    """Why a layer does not rotate along with its stream; nothing where it does."""
    run = trial.run(ports.folds(mix, trial.tensors), mix=mix)
    if _rotated(trial, run, mix):
        return None
    still = _keeping_the_mean(len(mix))
    run = trial.run(ports.folds(still, trial.tensors), mix=still)
    if _rotated(trial, run, still):
        return "its norms subtract the mean, which a rotation does not keep"
    return "something that is neither a norm nor a matrix behind one sees the stream"


def _keeping_the_mean(size: int) -> Float[Tensor, "size size"]:
    """A random rotation that leaves the mean of every vector as it is."""
    generator = torch.Generator().manual_seed(0)
    first = torch.eye(size)
    first[:, 0] = 1
    frame = torch.linalg.qr(first)[0]
    inner = torch.eye(size)
    inner[1:, 1:] = torch.linalg.qr(torch.randn(size - 1, size - 1, generator=generator))[0]
    return frame @ inner @ frame.T


def _rotated(trial: Trial, run: Run, mix: Tensor) -> bool:
    """Whether a run on a rotated stream is the rotated run, to what the layer adds."""
    before, after = trial.before.output[0].double(), run.output[0].double()
    added = (before - hidden(trial.call).double()).norm()
    return (after - before @ mix.to(before)).norm().item() <= KEPT * added.item()


def _whole(seam: Seam) -> bool:
    own = torch.arange(seam.size)
    return all(torch.equal(ch, own) for ch in seam.readers.values())


def _shifted(seam: Seam, trial: Trial) -> bool:
    return any(bool(trial.tensors[g.parameter].any()) for g in seam.givers[1:])


def _writers(trial: Trial, readers: set[str], size: int) -> dict[str, int]:
    """The matrices whose output comes out of the layer as it is, their biases, and the axes."""
    silent: Folds = {
        n: (Fold(trial.axis(n, inputs=True), torch.zeros(size)),) for n in sorted(readers)
    }
    quiet = trial.run(silent)
    found: dict[str, int] = {}
    for name in trial.matrices:
        axis = trial.axis(name, inputs=False)
        if name in readers or trial.tensors[name].shape[axis] != size:
            continue
        added = factors(size).log2().to(quiet.output[0].device)
        change = (trial.run(silent, add={name: added}).output[0] - quiet.output[0]).double()
        along = change @ added.double() / added.double().square().sum()
        rest = change - along[..., None] * added.double()
        if change.norm() > 0 and rest.norm() <= KEPT * change.norm():
            module = name.rpartition(".")[0]
            beside = [n for n in trial.tensors if n.rpartition(".")[0] == module]
            beside = [n for n in beside if n not in trial.matrices]
            vectors = [n for n in beside if trial.tensors[n].shape[-1:] == (size,)]
            found |= {name: axis, **dict.fromkeys(vectors, -1)}
    return found
