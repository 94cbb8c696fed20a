"""What a dense checkpoint can lose: layers, and units of every width; and what that saves."""

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from math import gcd
from typing import Any, NamedTuple

from msgspec import structs

from layerwise.core.find_widths import find_widths, readers
from layerwise.core.network import Network
from layerwise.core.plan import Edit, Plan, Step, chains_of
from layerwise.core.stack import Layer
from layerwise.core.stats import Scores
from layerwise.core.width import Width
from layerwise.jobs.request import Request, identity
from layerwise.jobs.session import Budget
from layerwise.jobs.units import layer_bytes, places_in, unmistakable, wiring_without

#: into how many steps a width is cut at most, and how many mixes of widths are weighed
LEVELS, MIXES = 64, 4096
#: entries of two bytes that fill the sixteen by which grouped products of experts go
ALIGNED = 8
#: nothing is known of any expert: the first ones stay
UNKNOWN = Scores({}, "expert", "")


class Candidate(NamedTuple):
    """The layers that go, and the units that stay of every width, by its name."""

    gone: tuple[str, ...]
    units: Mapping[str, int]


def levels(width: Width, most: int = LEVELS) -> list[int]:
    """How many units a width may have, in at most so many steps; all of them first.

    Rows stay multiples of `ALIGNED` entries if they were: kernels of stock code want them so.
    """
    step, aligned = width.spans, gcd(ALIGNED, width.units * width.block) if width.read else 1
    while 2 * step * most <= width.units or step * width.block % aligned:
        step *= 2
    return [width.units, *range((width.units - 1) // step * step, width.least - 1, -step)]


@dataclass(frozen=True)
class Dense:
    """What a dense checkpoint of a network can lose, and what that saves.

    Of experts those go that have the least `saliency`, by keys such as `decoder/3[5]`.
    """

    request: Request
    network: Network
    widths: Sequence[Width]
    saliency: Scores = UNKNOWN

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Stored bytes of every layer."""
        return layer_bytes(self.network)

    @cached_property
    def numbers(self) -> dict[str, dict[str, int]]:
        """How many numbers the tensors of every layer hold, by their names in it."""
        return {
            layer.key: {name: t.numel() for name, t in layer.module.state_dict().items()}
            for layer in self.network.layers()
        }

    def nbytes(self, candidate: Candidate) -> int:
        """Bytes of all tensors of a candidate."""
        layers = self.network.layers()
        outside = self.network.checkpoint.nbytes - sum(self.sizes.values())
        return outside + sum(self.layer_bytes(layer, candidate) for layer in layers)

    def products(self, candidate: Candidate) -> int:
        """Multiplications per token in the matrices of the layers, in those of all experts.

        A token runs as many experts among fewer.
        """
        stay = (la for la in self.network.layers() if la.key not in candidate.gone)
        return sum(self._once("products", self._products, la, candidate) for la in stay)

    def _products(self, layer: Layer, candidate: Candidate) -> int:
        found = 0
        for matrix in layer.matrices:
            size = matrix.size
            for width in self.widths:
                if width.read and width.holding(layer.key, matrix.parameter):
                    size = size * candidate.units[width.name] // width.units
            found += size
        return found

    @cached_property
    def _alike(self) -> dict[str, str]:
        """For every layer the first with the same tensors and the same places of all widths."""
        first: dict[Any, str] = {}
        places = [place for width in self.widths for place in width.places]
        found = {}
        for key, size in self.sizes.items():
            inside = [i for i, place in enumerate(places) if key in place.layers]
            kind = size, (*self.numbers[key].items(),), (*inside,)
            found[key] = first.setdefault(kind, key)
        return found

    @cached_property
    def _known(self) -> dict[Any, int]:
        return {}

    def _once(
        self, what: str, compute: Callable[..., int], layer: Layer, candidate: Candidate
    ) -> int:
        """What is computed of a layer, the same for all that are alike."""
        units = (candidate.units[width.name] for width in self.widths)
        key = what, self._alike[layer.key], *units
        if key not in self._known:
            self._known[key] = compute(layer, candidate)
        return self._known[key]

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
        wide, most = levels(first), min(LEVELS, int(MIXES ** (1 / max(1, len(others)))))
        for chosen in product(*(levels(width, most) for width in others)):
            held = dict(zip((w.name for w in others), chosen, strict=True))
            mixes = [Candidate(gone, {first.name: units, **held}) for units in wide]
            place = 0 if fits(mixes[0]) else bisect_left(mixes, True, key=fits)
            found += [c for c in mixes[place : place + 1] if fits(c)]
        return found

    def plan(self, candidate: Candidate) -> Plan:
        """The plan of a candidate."""
        request, wiring = self.request, wiring_without(self.network, candidate.gone)
        read = {name for width in self.widths if width.read for name in width.values(1)}
        return Plan(
            model=identity(self.network),
            target="hf",
            budget=request.budget.as_dict(),
            data=request.data,
            wiring=wiring,
            widths={n: value for n, value in self.fields(candidate).items() if n in read},
            units=self._experts(candidate),
            edits=self._edits(candidate, places_in(self.network, wiring)),
            fixed=request.keep,
        )

    def _experts(self, candidate: Candidate) -> dict[str, dict[str, list[int]]]:
        """The experts that stay, where some go: as many of every span, the least salient last."""
        found: dict[str, dict[str, list[int]]] = {}
        for width in self.widths:
            count = candidate.units[width.name]
            if width.read or count == width.units:
                continue
            found[width.name] = {
                key: self._most_salient(key, width, count)
                for place in width.places
                for key in place.layers
                if key not in candidate.gone
            }
        return found

    def _most_salient(self, key: str, width: Width, count: int) -> list[int]:
        span, value = width.units // width.spans, self.saliency.values
        kept: list[int] = []
        for start in range(0, width.units, span):
            own = range(start, start + span)
            order = sorted(own, key=lambda e: -value.get(f"{key}[{e}]", 0.0))
            kept += sorted(order[: count // width.spans])
        return kept

    def _edits(self, candidate: Candidate, places: Mapping[str, str]) -> tuple[Edit, ...]:
        """What leaves the units: one edit for matrices of a name, if all of these get the same."""
        method = self.request.method or "sparsegpt"
        steps: dict[str, Step] = {}
        kinds: dict[str, Step] = {}
        for width in (w for w in self.widths if w.read and candidate.units[w.name] < w.units):
            share = candidate.units[width.name] / width.units
            for place, m in readers(self.network, width):
                own = {"share": share, "pattern": f"column:{place.block}"}
                steps[m.key] = Step(method, self.request.options(method) | own)
                kinds[f"{m.layer.split('/')[0]}/*/{m.part}.{m.role}"] = steps[m.key]
        edits = [Edit(name, (step,)) for name, step in kinds.items()]
        chain_of = chains_of(edits)
        matrices = [m for layer in self.network.layers() for m in layer.matrices]
        if all(chain_of(m) == ((steps[m.key],) if m.key in steps else ()) for m in matrices):
            return (*edits,)
        single = [
            Edit(places[m.layer] + m.key.removeprefix(m.layer), (steps[m.key],))
            for m in matrices
            if m.key in steps and m.layer in places
        ]
        return unmistakable(single, self.network, places)

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
        gone = layer.key in candidate.gone
        return 0 if gone else self._once("bytes", self._layer_bytes, layer, candidate)

    def _layer_bytes(self, layer: Layer, candidate: Candidate) -> int:
        before = self.numbers[layer.key]
        after = dict(before)
        for width in self.widths:
            for name in (name for place in width.inside(layer.key) for name in place.cuts):
                after[name] = after[name] * candidate.units[width.name] // width.units
        gone = sum(before.values()) - sum(after.values())
        return self.sizes[layer.key] - gone * self.network.stored.dtype.itemsize


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
