"""Seams: where channels can be made smaller on one side and larger on the other, for nothing.

Found by trying. Every vector of a layer that stands beside no matrix (the gain of a norm, its bias)
and the rows of every matrix may give channels; they are scaled, channel by channel, by factors that
are all different. Matrices whose inputs then are multiplied by these factors and by nothing else
read the channels: which one each of their columns reads, the factor tells. Their columns are
divided. If that brings the layer's output back the place is a seam; else something else
sees the channels, and it is none. So shared heads, gates, parallel branches and routed experts need
no table, and what is no seam in some network is never taken for one.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from layerwise.core.fold import Fold, Folds, joined
from layerwise.core.trial import Run, Trial

#: what may be left of a change that was taken back
KEPT = 1e-3
#: the factors go from one over this to this
RANGE = 2.0
#: into how many pieces the rows of a matrix are cut at most
PIECES = 10


class Giver(NamedTuple):
    """A tensor that gives channels: along which axis, from where on, and what is added to it."""

    parameter: str
    axis: int = -1
    start: int = 0
    shift: float = 0.0


class Seam(NamedTuple):
    """A place in a layer where channels can be scaled.

    `readers` says of every parameter that reads them which channel each column reads; `axes` along
    which axis its columns lie. Names are those inside the layer.
    """

    size: int
    givers: tuple[Giver, ...]
    readers: Mapping[str, Int[Tensor, " in"]]
    axes: Mapping[str, int]

    @property
    def name(self) -> str:
        """Of the first of what gives the channels, and which of them if not all."""
        first = self.givers[0]
        return f"{first.parameter}[{first.start}:]" if first.start else first.parameter

    @property
    def norm(self) -> bool:
        """Whether vectors alone give the channels."""
        return self.givers[0].parameter not in self.axes

    def folds(self, scale: Float[Tensor, " size"], sizes: Mapping[str, Tensor]) -> Folds:
        """What makes the channels `1 / scale` as large, and the columns that read them `scale`."""
        gives = given(self.givers, 1 / scale, sizes)
        reads = {n: (Fold(self.axes[n], scale[ch]),) for n, ch in self.readers.items()}
        return joined(gives, reads)


class Place(NamedTuple):
    """A seam as a method sees it: what reads the channels, by the keys of matrices.

    `weights` are the matrices `[out, in]`, `channels` say which channel each column reads; `norm`
    tells whether the channels come out of a norm, and not out of another matrix.
    """

    size: int
    norm: bool
    weights: Mapping[str, Float[Tensor, "out in"]]
    channels: Mapping[str, Int[Tensor, " in"]]

    def largest(self, values: Mapping[str, Float[Tensor, " in"]]) -> Float[Tensor, " size"]:
        """The largest value of every channel, out of values of the columns that read it."""
        found = torch.zeros(self.size)
        for key, value in values.items():
            found = found.scatter_reduce(0, self.channels[key], value.float().cpu(), "amax")
        return found


def given(givers: Sequence[Giver], scale: Tensor, sizes: Mapping[str, Tensor]) -> Folds:
    """The folds that multiply what is given by a scale."""
    found: dict[str, tuple[Fold, ...]] = {}
    for parameter, axis, start, shift in givers:
        value = torch.ones(sizes[parameter].shape[axis], device=scale.device)
        value[start : start + len(scale)] = scale
        found[parameter] = (Fold(axis, value, shift),)
    return found


def find_seams(trial: Trial, known: Sequence[Seam] = ()) -> tuple[list[Seam], dict[str, str]]:
    """The seams of a layer, and of every other candidate why it is none.

    What was `known` of another layer is tried first, all at once, and kept if it holds here too.
    """
    if known and holds(trial, known):
        return list(known), {}
    found: list[Seam] = []
    refused: dict[str, str] = {}
    for candidates in _candidates(trial):
        taken: list[Seam] = []
        for size, givers in candidates:
            if any(_overlap(size, givers[0], seam) for seam in taken):
                continue
            seam = _tried(trial, size, givers)
            if isinstance(seam, Seam):
                taken.append(seam)
            elif not givers[0].start:
                refused.setdefault(givers[0].parameter, seam)
        found += taken
        for seam in taken:
            refused.pop(seam.givers[0].parameter, None)
    return found, refused


def holds(trial: Trial, seams: Sequence[Seam]) -> bool:
    """Whether seams of another layer, all at once, keep what this one computes."""
    names = {n for s in seams for n in (*s.readers, *(g.parameter for g in s.givers))}
    if not names <= trial.tensors.keys() or not all(_fits(trial, seam) for seam in seams):
        return False
    scales = [factors(seam.size, number) for number, seam in enumerate(seams)]
    pairs = list(zip(seams, scales, strict=True))
    alone = joined(*(given(seam.givers, 1 / scale, trial.tensors) for seam, scale in pairs))
    both = joined(*(seam.folds(scale, trial.tensors) for seam, scale in pairs))
    change = trial.run(alone).away(trial.before)
    return trial.run(both).away(trial.before) <= KEPT * change


def _fits(trial: Trial, seam: Seam) -> bool:
    rows = all(trial.tensors[g.parameter].shape[g.axis] >= g.start + seam.size for g in seam.givers)
    return rows and all(
        trial.tensors[name].shape[seam.axes[name]] == len(channels)
        for name, channels in seam.readers.items()
    )


#: how many channels, and what gives them
Candidate = tuple[int, tuple[Giver, ...]]


def _candidates(trial: Trial) -> Iterator[list[Candidate]]:
    """Everything that may give channels, module by module; of one list only one can be right."""
    for path, module in trial.module.named_modules():
        prefix = f"{path}." if path else ""
        own = {prefix + name: p for name, p in module._parameters.items() if p is not None}
        own = {name: p for name, p in own.items() if name in trial.tensors}
        matrices = [name for name in own if name in trial.matrices]
        vectors = [name for name, p in own.items() if p.ndim == 1 and len(p) > 1]
        if not matrices and vectors and len({len(own[name]) for name in vectors}) == 1:
            shifts = product((0.0, 1.0), repeat=len(vectors))
            chosen = [zip(vectors, some, strict=True) for some in shifts]
            size = len(own[vectors[0]])
            yield [(size, tuple(Giver(n, shift=s) for n, s in pairs)) for pairs in chosen]
        for name in matrices:
            axis = trial.axis(name, inputs=False)
            rows = own[name].shape[axis]
            beside = [v for v in vectors if len(matrices) == 1 and len(own[v]) == rows]
            yield list(_pieces(name, axis, rows, beside))


def _pieces(name: str, axis: int, rows: int, beside: Sequence[str]) -> Iterator[Candidate]:
    """All rows of a matrix, its halves and thirds, and the last of more pieces.

    What was fused lies so: gate and up, queries, keys and values, fewer values than queries.
    """
    for count in range(1, PIECES + 1):
        size = rows // count
        for start in (
            range(0 if count < 4 else rows - size, rows, size) if rows % count == 0 else ()
        ):
            yield size, (Giver(name, axis, start), *(Giver(v, start=start) for v in beside))


def _overlap(size: int, giver: Giver, seam: Seam) -> bool:
    held = seam.givers[0]
    return giver.start < held.start + seam.size and held.start < giver.start + size


def _tried(trial: Trial, size: int, givers: tuple[Giver, ...]) -> Seam | str:
    """The seam that some candidates make, or why they make none."""
    scale = factors(size)
    readers: dict[str, Tensor] = {}
    axes = {n: trial.axis(n, inputs=True) for n in trial.matrices}
    change = 0.0
    while True:
        seam = Seam(size, givers, readers, axes)
        run = trial.run(seam.folds(1 / scale, trial.tensors))
        left = run.away(trial.before)
        change = change or left
        if not change:
            return "nothing that was tried depends on it"
        if readers and left <= KEPT * change:
            return seam
        own = {giver.parameter for giver in givers}
        new = _readers(trial.before, run, scale, {*readers, *own})
        if not new and readers:
            return f"{', '.join(readers)} read it, and something else too"
        if not new:
            return "no matrix reads its channels one by one"
        readers = readers | new


def _readers(before: Run, run: Run, scale: Tensor, known: set[str]) -> dict[str, Tensor]:
    """The parameters whose inputs were multiplied by the factors, and which by which."""
    found = {}
    for name in before.inputs.keys() & run.inputs.keys() - known:
        channels = channels_of(before.inputs[name], run.inputs[name], scale)
        if channels is not None:
            found[name] = channels
    return {name: found[name] for name in before.inputs if name in found}


def channels_of(
    before: Tensor, after: Tensor, scale: Float[Tensor, " size"]
) -> Int[Tensor, " in"] | None:
    """Which factor every column was multiplied by; None if that is not what happened.

    Columns that are 0 throughout read the channel of their own number, where all others do.

    Example:
        >>> x, scale = torch.tensor([[1.0, 2.0, 3.0, 4.0]]), torch.tensor([0.5, 2.0])
        >>> channels_of(x, x * scale[[0, 0, 1, 1]], scale)
        tensor([0, 0, 1, 1])
    """
    if before.shape != after.shape or not before.numel():
        return None
    x, y = before.double(), after.double()
    change, energy = (y - x).norm(), x.square().sum(0)
    live = energy > 1e-12 * energy.max()
    ratio = (x * y).sum(0) / torch.where(live, energy, torch.ones_like(energy))
    if change <= 1e-5 * x.norm() or (y - x * ratio)[:, live].norm() > KEPT * change:
        return None
    wanted, ratio, live = scale.double(), ratio.cpu(), live.cpu()
    own = torch.arange(len(ratio))
    if len(own) == len(wanted) and ((ratio / wanted - 1)[live].abs() < KEPT).all():
        return own
    values, order = wanted.sort()
    at = torch.searchsorted((values[1:] + values[:-1]) / 2, ratio)
    nearest, step = order[at], (values[-1] / values[0]).log() / max(len(values) - 1, 1)
    off = (ratio / wanted[nearest] - 1).abs()
    return nearest if live.all() and (off < min(step / 4, KEPT)).all() else None


def factors(size: int, seed: int = 0) -> Float[Tensor, " size"]:
    """Factors that are all different, evenly spread in their logarithm, in a mixed order."""
    generator = torch.Generator().manual_seed(seed)
    steps = torch.linspace(-1, 1, size) if size > 1 else torch.ones(1)
    return (RANGE**steps)[torch.randperm(size, generator=generator)]
