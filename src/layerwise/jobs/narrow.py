"""What a dense checkpoint can lose: layers, and units of every width; and what that saves."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from math import gcd
from typing import NamedTuple

from msgspec import structs

from layerwise.core.find_widths import find_widths
from layerwise.core.network import Network
from layerwise.core.plan import Edit, Plan, Step
from layerwise.core.stack import Layer
from layerwise.core.width import Width
from layerwise.jobs.request import Request, identity
from layerwise.jobs.session import Budget
from layerwise.jobs.units import layer_bytes, wiring_without

#: into how many steps a width is cut at most
LEVELS = 64
#: entries of two bytes that fill the sixteen by which grouped products of experts go
ALIGNED = 8


class Candidate(NamedTuple):
    """The layers that go, and the units that stay of every width, by its name."""

    gone: tuple[str, ...]
    units: Mapping[str, int]


def levels(width: Width) -> list[int]:
    """How many units a width may have, all of them first.

    Rows stay multiples of `ALIGNED` entries if they were: kernels of stock code want them so.
    """
    step, aligned = 1, gcd(ALIGNED, width.units * width.block)
    while 2 * step * LEVELS <= width.units or step * width.block % aligned:
        step *= 2
    return [width.units, *range((width.units - 1) // step * step, 0, -step)]


@dataclass(frozen=True)
class Dense:
    """What a dense checkpoint of a network can lose, and what that saves."""

    request: Request
    network: Network
    widths: Sequence[Width]

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Stored bytes of every layer."""
        return layer_bytes(self.network)

    def unit(self, width: Width, layer: Layer) -> int:
        """Bytes of one unit in a layer."""
        held = sum(layer.shapes[name].numel() for name in width.cuts)
        return held * self.network.stored.dtype.itemsize // width.units

    def nbytes(self, candidate: Candidate) -> int:
        """Bytes of all tensors of a candidate."""
        layers = self.network.layers()
        outside = self.network.checkpoint.nbytes - sum(self.sizes.values())
        return outside + sum(self.layer_bytes(layer, candidate) for layer in layers)

    def products(self, candidate: Candidate) -> int:
        """Multiplications per token in the matrices of the layers, in those of all experts."""
        found = 0
        for layer in self.network.layers():
            if layer.key in candidate.gone:
                continue
            for matrix in layer.matrices:
                size = matrix.size
                for width in self.widths:
                    if matrix.parameter in width.cuts:
                        size = size * candidate.units[width.name] // width.units
                found += size
        return found

    @property
    def whole(self) -> Candidate:
        """The network as it is."""
        return Candidate((), {width.name: width.units for width in self.widths})

    def fields(self, candidate: Candidate) -> dict[str, int]:
        """What the configuration says of the widths of a candidate."""
        fields: dict[str, int] = {}
        for width in self.widths:
            units = candidate.units[width.name]
            fields |= width.values(units) if units < width.units else {}
        return fields

    def candidates(
        self, gone: tuple[str, ...], fits: Callable[[Candidate], bool]
    ) -> list[Candidate]:
        """Without some layers, the largest that fit: the first width as wide as the others let."""
        if not self.widths:
            alone = Candidate(gone, {})
            return [alone] if fits(alone) else []
        found = []
        first, *others = self.widths
        for chosen in product(*(levels(width) for width in others)):
            held = dict(zip((w.name for w in others), chosen, strict=True))
            for units in levels(first):
                candidate = Candidate(gone, {first.name: units, **held})
                if fits(candidate):
                    found.append(candidate)
                    break
        return found

    def plan(self, candidate: Candidate) -> Plan:
        """The plan of a candidate."""
        request, edits = self.request, []
        for width in self.widths:
            units = candidate.units[width.name]
            edits += self._edits(width, units) if units < width.units else []
        return Plan(
            model=identity(self.network),
            target="hf",
            budget=request.budget.as_dict(),
            data=request.data,
            wiring=wiring_without(self.network, candidate.gone),
            widths=self.fields(candidate),
            edits=tuple(edits),
            fixed=request.keep,
        )

    def _edits(self, width: Width, units: int) -> list[Edit]:
        method = self.request.method or "sparsegpt"
        options = {"share": units / width.units, "pattern": f"column:{width.block}"}
        step = Step(method, self.request.options(method) | options)
        readers = [
            m for la in self.network.layers() for m in la.matrices if m.parameter == width.reader
        ]
        names = dict.fromkeys(f"{m.layer.split('/')[0]}/*/{m.part}.{m.role}" for m in readers)
        return [Edit(name, (step,)) for name in names]

    def words(self, candidate: Candidate) -> str:
        """What is left of a candidate, if it is less."""
        depth = len(self.network.layers())
        words = [f"{depth - len(candidate.gone)} of {depth} layers"] if candidate.gone else []
        for width in self.widths:
            units = candidate.units[width.name]
            if units < width.units:
                values = width.values(units)
                words.append(", ".join(f"{name} {values[name]}" for name in width.fields))
        return ", ".join(words) or "as it is"

    def layer_bytes(self, layer: Layer, candidate: Candidate) -> int:
        """Bytes of a layer of a candidate."""
        if layer.key in candidate.gone:
            return 0
        narrower = ((w.units - candidate.units[w.name]) * self.unit(w, layer) for w in self.widths)
        return self.sizes[layer.key] - sum(narrower)


def narrow_alone(network: Network, plan: Plan, nbytes: int) -> Plan | None:
    """A plan of all layers in which one width gets as small as another plan; the widest first.

    None if there is no such plan, or if it is that one.
    """
    step = plan.edits[0].chain[0]
    named = Request("", Budget(bytes=nbytes), "hf", step.method, data=plan.data, keep=plan.fixed)
    for width in find_widths(network):
        dense = Dense(named, network, [width])
        for candidate in dense.candidates((), lambda c, d=dense: d.nbytes(c) <= nbytes):
            found = dense.plan(candidate)
            if found.widths != plan.widths or plan.wiring:
                return structs.replace(found, heal=plan.heal)
            return None
    return None
