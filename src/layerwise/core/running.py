"""Changes in force while a network runs; the model itself is never written to.

The layers that changes are at run through a function in the place of their own forward. What a
part adds is caught at the addition (`core/stream.py`), what a matrix receives at the operation
that consumes it (`core/inputs.py`), so there is no table of architectures.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor
from transformers import Cache as ModelCache

from layerwise.core.errors import LayerwiseError
from layerwise.core.inputs import MatrixInputs
from layerwise.core.instead import swapped
from layerwise.core.network import Network
from layerwise.core.sites import At, Edits, Intervention, Runs, changed, step_of
from layerwise.core.stack import Layer
from layerwise.core.stops import hidden
from layerwise.core.stream import StreamWatch


@dataclass
class _Todo:
    """What is to be done at one step: by the part of the site, the matrices by parameter."""

    runs: int = 1
    at: dict[str, list[Intervention]] = field(default_factory=dict)
    matrices: dict[str, list[Intervention]] = field(default_factory=dict)

    @property
    def inside(self) -> bool:
        """Whether something is to be done at what parts add."""
        return any(part not in ("in", "out") for part in self.at)


class Running:
    """The changes in force: where a forward stands, and which sites it has reached."""

    def __init__(self, network: Network, edits: Edits) -> None:
        self.network = network
        self.todo: dict[tuple[str, int], _Todo] = {}
        self.calls = {stack.name: 0 for stack in network.stacks}
        self.start, self.end = 0, 0
        self.unreached: dict[At, str] = {}
        for edit in edits:
            self._add(edit)
        mine = [self._layer(step).path for step in self.todo]
        streamed = network.source is not None
        self.layers = [la for la in network.layers() if streamed or la.path in mine]

    def _layer(self, step: tuple[str, int]) -> Layer:
        stack = next(s for s in self.network.stacks if s.name == step[0])
        return stack.layers[stack.wiring[step[1]].layer]

    def _add(self, edit: Intervention | Runs) -> None:
        at = edit.layer if isinstance(edit, Runs) else edit.at.layer
        step = step_of(self.network, at)
        todo, layer = self.todo.setdefault(step, _Todo()), self._layer(step)
        if isinstance(edit, Runs):
            _check_runs(layer, edit)
            todo.runs = edit.times
            return
        parameter = _parameter(layer, edit.at)
        held, name = (todo.at, edit.at.part) if parameter is None else (todo.matrices, parameter)
        held.setdefault(name, []).append(edit)
        self.unreached[edit.at] = "nothing of that name on the way"

    # -- while the network runs --------------------------------------------------------------

    def begin(self, module: Any, args: tuple, kwargs: dict) -> None:
        """Before a forward: how many positions lie behind it, in its cache."""
        cache = _cache_in(args, kwargs)
        self.start = 0 if cache is None else self._behind(cache)
        self.calls[self.network.stacks[-1].name] = 0

    def _behind(self, cache: ModelCache) -> int:
        try:
            return int(cache.get_seq_length())
        except ValueError:  # states that hold no positions; the last forward ended there
            return self.end if cache.has_previous_state() else 0

    def forward(self, layer: Layer) -> Callable[..., Any]:
        """What a layer runs instead of its own forward."""
        own = layer.module.forward

        def run(*args: Any, **kwargs: Any) -> Any:
            self.network.bring(layer)
            try:
                return self._visit(layer, own, args, kwargs)
            finally:
                self.network.drop(layer)

        return run

    def _visit(self, layer: Layer, own: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        todo = self.todo.get(self._step(layer), _Todo())
        state = hidden((args, kwargs))
        last = layer.stack == self.network.stacks[-1].name
        start = self.start if last else 0
        if last:
            self.end = start + state.shape[1]
        entered = self._apply(todo.at.get("in", ()), state, start)
        args, kwargs = swapped((args, kwargs), state, entered)
        if todo.runs == 0:
            output = _handed_on(layer, own, args, kwargs, entered)
        else:
            output = self._inside(layer, todo, partial(own, *args, **kwargs), entered, start)
        for _ in range(todo.runs - 1):
            _check_repeat(layer, args, kwargs)
            again = hidden(output)
            args, kwargs = swapped((args, kwargs), entered, again)
            entered = again
            output = self._inside(layer, todo, partial(own, *args, **kwargs), entered, start)
        left = hidden(output)
        return swapped(output, left, self._apply(todo.at.get("out", ()), left, start))

    def _step(self, layer: Layer) -> tuple[str, int]:
        stack = next(s for s in self.network.stacks if s.name == layer.stack)
        if len(stack.wiring) == len(stack.layers):
            return stack.name, layer.index
        step = self.calls[stack.name] % len(stack.wiring)
        self.calls[stack.name] = step + 1
        return stack.name, step

    def _inside(
        self,
        layer: Layer,
        todo: _Todo,
        call: Callable[[], Any],
        state: Tensor,
        start: int,
    ) -> Any:
        """One run of a layer, with the changes at what its parts add and its matrices receive."""
        with ExitStack() as modes:
            if todo.inside:
                seen: list[str] = []

                def give(part: str, added: Tensor) -> Tensor:
                    seen.append(part)
                    return self._apply(todo.at.get(part, ()), added, start)

                modes.enter_context(StreamWatch(layer, {0: state}, True, False, give))
            if todo.matrices:
                use = lambda wanted, x, heads: self._apply(wanted, x, start, heads)  # noqa: E731
                modes.enter_context(MatrixInputs(layer, todo.matrices, use, state.shape))
            output = call()
        if todo.inside:
            _check_seen(layer, todo, seen)
        return output

    def _apply(
        self, wanted: Iterable[Intervention], value: Tensor, start: int, heads: int = 0
    ) -> Tensor:
        own = False  # a value made here is written into: a sweep has many sites in one place
        for at, change in wanted:
            if at.heads is not None:
                _check_heads(at, value, heads)
            new = changed(at, value, change, start, heads, own)
            if new is None:
                if at in self.unreached:
                    self.unreached[at] = f"positions {start} to {start + value.shape[1] - 1}"
            else:
                self.unreached.pop(at, None)
                own = not at.whole and (own or new is not value) and not new.requires_grad
                value = new
        return value

    def check(self) -> None:
        """Every site must have been reached.

        Raises:
            LayerwiseError: one was not.
        """
        for at, found in self.unreached.items():
            raise LayerwiseError(
                f"site {at.label}",
                allowed="one that the run comes by",
                found=found,
                fix="choose another; `layerwise inspect --measures depth_use` names what is added",
            )


def _parameter(layer: Layer, at: At) -> str | None:
    """The parameter at whose input a site is, if it is at one.

    Raises:
        LayerwiseError: the layer has no such matrix.
    """
    if at.part in ("in", "out") and at.heads is None:
        return None
    if "." not in at.part and at.heads is None:
        return None
    known = {f"{m.part}.{m.role}": m for m in layer.matrices}
    mine = [key for key in known if at.part in (key, key.partition(".")[0])]
    if not mine or known[mine[-1]].expert is not None:
        plain = [key for key, matrix in known.items() if matrix.expert is None]
        raise LayerwiseError(
            f"site {at.label}",
            allowed=f"a part or a matrix of {layer.key} that sees every token: {', '.join(plain)}",
            found=at.part if not mine else "one matrix per expert",
            fix="choose one of these",
        )
    return known[mine[-1]].parameter


def _check_runs(layer: Layer, edit: Runs) -> None:
    if edit.times < 0 or (edit.times != 1 and not layer.keeps_shape):
        raise LayerwiseError(
            f"runs of {layer.key}",
            allowed="0 or more, for a layer that keeps the shape of its input",
            found=f"{edit.times}, the layer {'keeps' if layer.keeps_shape else 'changes'} it",
            fix="choose another layer",
        )


def _handed_on(layer: Layer, own: Callable, args: tuple, kwargs: dict, entered: Tensor) -> Any:
    """The input in the place of the output; a layer that fills a cache still runs."""
    if layer.alone and _cache_in(args, kwargs) is None:
        return entered
    kept = entered.clone()  # a layer may write into its input
    output = own(*args, **kwargs)
    return swapped(output, hidden(output), kept)


def _cache_in(args: tuple, kwargs: dict) -> ModelCache | None:
    return next((v for v in (*args, *kwargs.values()) if isinstance(v, ModelCache)), None)


def _check_repeat(layer: Layer, args: tuple, kwargs: dict) -> None:
    if _cache_in(args, kwargs) is not None:
        raise LayerwiseError(
            f"repeat of {layer.key}",
            allowed="a forward without a cache, which has one place a layer",
            found="a forward with a cache",
            fix="generate with `use_cache=False`, or open the model with a wiring",
        )


def _check_seen(layer: Layer, todo: _Todo, seen: Sequence[str]) -> None:
    """What was asked for must have been added, each part by itself."""
    apart = {p.name for p in layer.parts} <= set(seen)
    for part in todo.at:
        if part not in ("in", "out") and (part not in seen or not apart):
            raise LayerwiseError(
                f"site {layer.key} {part}",
                allowed="in, out, a matrix, or a part whose addition to the stream can be followed",
                found=f"additions of {', '.join(seen) or 'nothing'}",
                fix="choose one of these; or `in` and `out`, which are always there",
            )


def _check_heads(at: At, value: Tensor, heads: int) -> None:
    if heads and value.shape[-1] % heads == 0:
        return
    raise LayerwiseError(
        f"site {at.label}",
        allowed="an output projection that receives the heads of an attention side by side",
        found=f"{heads} heads counted, {value.shape[-1]} wide" if heads else "no attention before",
        fix="leave heads out, or choose the matrix, such as part='attention.o'",
    )
