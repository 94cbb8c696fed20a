"""Running a layer without one of its parts, which then takes no time.

The modules of the part give way to stand-ins. What a stand-in has to return is found by trying, on
a hollow layer: nothing but zeros, or one of the tensors that it was given (where a module adds to
the stream itself). Right is what gives the layer's output with the part's addition ablated.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from transformers import Cache, EncoderDecoderCache
from transformers.cache_utils import CacheLayerMixin, LinearAttentionCacheLayerMixin

from layerwise.core.calls import Call, record_calls, snapshot, tensors_in
from layerwise.core.errors import LayerwiseError
from layerwise.core.hollow import ShortCircuit
from layerwise.core.instead import instead
from layerwise.core.stack import Layer, Matrix, Part, Visit
from layerwise.core.stops import hidden
from layerwise.core.stream import StreamWatch
from layerwise.core.task import example_inputs, forward_arguments


@dataclass(frozen=True)
class Zeros:
    """A tensor of zeros in what a stand-in returns: as many rows as its input, so wide."""

    width: int


@dataclass
class StandIn:
    """Takes the place of a module of a part that is left out.

    Returns `template` with zeros in its places; or, with `hands_on`, that tensor of its input.
    Cache slots that the part filled get keys of width 1, for the network reads positions there.
    """

    template: Any
    hands_on: int | None = None
    slots: tuple[int, ...] = ()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the module is taken to return."""
        given = [t for t in tensors_in((args, kwargs)) if t.is_floating_point()]
        x = given[0]
        cache = cache_in(args, kwargs)
        if self.slots and cache is not None:
            narrow = x.new_zeros(x.shape[0], 1, x.shape[1], 1)
            for slot in self.slots:
                cache.update(narrow, narrow, slot)

        def made(leaf: Any) -> Any:
            if not isinstance(leaf, Zeros):
                return leaf
            if self.hands_on is not None:
                return given[self.hands_on]
            return x.new_zeros(*x.shape[:-1], leaf.width)

        return tree_map(made, self.template)


def cache_in(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Cache | None:
    """The cache among the arguments of a layer."""
    return next((v for v in (*args, *kwargs.values()) if isinstance(v, Cache)), None)


def leave_out(model: nn.Module, layers: Sequence[Layer], visits: Sequence[Visit]) -> None:
    """Put stand-ins in the place of what the visits of a hollow stack leave out.

    Raises:
        LayerwiseError: a part is not there, or the network cannot run without it.
    """
    todo = {
        layer.key: [part for part in layer.parts if part.name not in _kept(layer, visit)]
        for layer, visit in zip(layers, visits, strict=True)
        if visit.parts is not None
    }
    chosen = [layer for layer in layers if todo.get(layer.key)]
    if not chosen:
        return
    found: dict[str, dict[str, StandIn]] = {}

    def trial(layer: Layer) -> Callable[..., Any]:
        own = layer.module.forward

        def run(*args: Any, **kwargs: Any) -> Any:
            found[layer.key] = {}
            with _uneven(layer.module):
                for part in todo[layer.key]:
                    found[layer.key] |= _stand_ins(layer, part, args, kwargs)
            return own(*args, **kwargs)

        return run

    given = forward_arguments(model, example_inputs(model))
    given |= {"use_cache": True} if "use_cache" in given else {}
    with torch.no_grad(), ShortCircuit(), ExitStack() as undo:
        with instead(chosen, trial):
            model(**given)
        for layer in chosen:
            undo.enter_context(_uneven(layer.module))
        with instead(chosen, lambda layer: partial(_ablated, layer, todo[layer.key])):
            wanted = model(**given)
        for layer in chosen:
            for path, stand_in in found[layer.key].items():
                vars(layer.module.get_submodule(path))["forward"] = stand_in
        if not _same(model(**given), wanted):
            names = ", ".join(layer.key for layer in chosen)
            raise _refused(names, "what a part returns beside its addition is used elsewhere")


@contextmanager
def _uneven(module: nn.Module) -> Iterator[None]:
    """Uneven norms and biases: with even ones, a norm behind a norm does nothing."""
    generator = torch.Generator().manual_seed(0)
    held = [(m._parameters, dict(m._parameters)) for m in module.modules()]
    try:
        for place, own in held:
            for name, p in own.items():
                if p is not None and p.ndim == 1:
                    drawn = 0.5 + torch.rand(p.shape, generator=generator)
                    place[name] = nn.Parameter(drawn.to(p), requires_grad=False)
        yield
    finally:
        for place, own in held:
            place.update(own)


def absent(layer: Layer, visit: Visit | None) -> list[Matrix]:
    """The matrices of the parts that a visit leaves out."""
    if visit is None or visit.parts is None:
        return []
    gone = _gone(layer, visit)
    return [matrix for matrix in layer.matrices if matrix.part in gone]


def unstored(layer: Layer, visit: Visit | None) -> list[Matrix]:
    """Of these, what nothing need be stored of: experts share a tensor, which stays whole."""
    return [matrix for matrix in absent(layer, visit) if matrix.expert is None]


def silenced(layer: Layer, visit: Visit, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a layer with zeros where the parts that a visit leaves out write.

    These are the matrices of a part that write as wide as the stream, and their biases, so that
    stock code computes the part and adds nothing. Whether it adds nothing is seen when the folder
    is loaded again.
    """
    zeros = dict(tensors)
    for part in _gone(layer, visit):
        mine = [m for m in layer.matrices if m.part == part]
        width = mine[0].shape[1]  # what comes first receives the stream
        for name in {m.parameter for m in mine if m.shape[0] == width}:
            stem = name.removesuffix(".weight")
            for own in (name, f"{stem}.bias", f"{stem}_bias"):
                if own in tensors:
                    zeros[own] = torch.zeros_like(tensors[own])
    return zeros


def _gone(layer: Layer, visit: Visit) -> list[str]:
    """The names of the parts that a visit leaves out."""
    kept = _kept(layer, visit)
    return [part.name for part in layer.parts if part.name not in kept]


def _kept(layer: Layer, visit: Visit) -> tuple[str, ...]:
    known = [part.name for part in layer.parts]
    for name in visit.parts or ():
        if name not in known:
            raise LayerwiseError(
                f"wiring, layer {layer.key}",
                allowed=f"parts of it: {', '.join(known)}",
                found=name,
                fix="name what is to run",
            )
    return visit.parts or ()


def _stand_ins(layer: Layer, part: Part, args: Any, kwargs: Any) -> dict[str, StandIn]:
    """A stand-in for every module of a part, tried on one call of its layer."""
    wanted = _ablated(layer, [part], *args, **kwargs)
    calls = _calls(layer, part, args, kwargs)
    before = _lengths(layer, part, args, kwargs, {})
    numbers = [None, *range(_floats(calls[-1]) if len(calls) == 1 else 0)]
    for number in numbers:
        made = {c.path: StandIn(_template(c), number) for c in calls}
        try:
            got = _run_without(layer, made, *snapshot((args, kwargs)))
        except (RuntimeError, TypeError, ValueError, IndexError, AttributeError, KeyError):
            continue
        if _same(got, wanted):
            after = _lengths(layer, part, args, kwargs, made)
            missing = [slot for slot, count in before.items() if after.get(slot, 0) < count]
            made[calls[0].path].slots = tuple(missing)
            return made
    raise _refused(
        f"{layer.key} without {part.name}",
        "no stand-in for it gives what the layer gives without its part",
    )


def _refused(where: str, found: str) -> LayerwiseError:
    return LayerwiseError(
        f"wiring, layer {where}",
        allowed="parts that can be taken out of this architecture",
        found=found,
        fix="keep the part, or ablate it with layerwise.intervene, which saves no time",
    )


def _ablated(layer: Layer, gone: Sequence[Part], *args: Any, **kwargs: Any) -> Any:
    """What the layer returns when what some parts add to the stream is zero."""
    args, kwargs = snapshot((args, kwargs))
    names = [part.name for part in gone]
    seen: list[str] = []

    def give(name: str, added: Tensor) -> Tensor:
        seen.append(name)
        return added * 0 if name in names else added

    with StreamWatch(layer, {0: hidden((args, kwargs))}, True, False, give):
        output = _own(layer)(*args, **kwargs)
    for name in names:
        if name not in seen:
            raise _refused(f"{layer.key} without {name}", "an addition that cannot be followed")
    return output


def _calls(layer: Layer, part: Part, args: Any, kwargs: Any) -> list[Call]:
    args, kwargs = snapshot((args, kwargs))
    children = {path: layer.module.get_submodule(path) for path in part.modules}
    calls = record_calls(children, lambda: _own(layer)(*args, **kwargs))
    if not calls or any(not _floats(call) for call in calls):
        raise _refused(
            f"{layer.key} without {part.name}", "its modules are not called with the stream"
        )
    return calls


def _own(layer: Layer) -> Callable[..., Any]:
    """The layer's own forward, whatever stands in its place."""
    return partial(type(layer.module).forward, layer.module)


def _floats(call: Call) -> int:
    return sum(t.is_floating_point() for t in tensors_in((call.args, call.kwargs)))


def _template(call: Call) -> Any:
    """The output of a module, with places for what has the rows of its input; no other tensor."""
    x = next(t for t in tensors_in((call.args, call.kwargs)) if t.is_floating_point())

    def kept(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return Zeros(leaf.shape[-1]) if leaf.shape[:-1] == x.shape[:-1] else None

    return tree_map(kept, call.output)


def _run_without(layer: Layer, made: Mapping[str, StandIn], args: Any, kwargs: Any) -> Any:
    """What the layer returns with stand-ins in place."""
    places = [(vars(layer.module.get_submodule(path)), new) for path, new in made.items()]
    with ExitStack() as undo:
        for place, new in places:
            place["forward"] = new
            undo.callback(place.pop, "forward")
        return _own(layer)(*args, **kwargs)


def _same(one: Any, other: Any) -> bool:
    """Whether the hidden states, or logits, of two outputs are the same."""
    a, b = hidden(one), hidden(other)
    return a.shape == b.shape and torch.allclose(a, b, 1e-4, 1e-6)


def _lengths(
    layer: Layer, part: Part, args: Any, kwargs: Any, made: Mapping[str, StandIn]
) -> dict[int, int]:
    """How many positions every slot of a copy of the cache holds after the layer ran."""
    args, kwargs = snapshot((args, kwargs))
    cache = cache_in(args, kwargs)
    if cache is None or not part.mixes:
        return {}
    _run_without(layer, made, args, kwargs)
    if isinstance(cache, EncoderDecoderCache):
        raise _refused(f"{layer.key} without {part.name}", "a cache with two kinds of slots")
    if any(isinstance(slot, LinearAttentionCacheLayerMixin) for slot in cache.layers):
        raise _refused(
            f"{layer.key} without {part.name}", "a cache of states that hold no positions"
        )
    return {
        i: slot.get_seq_length()
        for i, slot in enumerate(cache.layers)
        if isinstance(slot, CacheLayerMixin)
    }
