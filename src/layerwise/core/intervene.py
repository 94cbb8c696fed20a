"""Running a network with changes at some of its sites; the model itself is never written to.

While changes are in force, the layers that they are at run through a function in the place of
their own forward, which is put back on the way out, also after an error. What a part adds is
caught at the addition (`core/stream.py`), what a matrix receives at the operation that consumes
it, so there is no table of architectures.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map
from transformers import Cache as ModelCache

from layerwise.core.errors import LayerwiseError
from layerwise.core.hollow import operands
from layerwise.core.lockstep import hidden
from layerwise.core.network import Network
from layerwise.core.sites import At, Cache, Edits, Intervention, Runs, changed, sites, step_of
from layerwise.core.stack import Layer
from layerwise.core.stream import StreamWatch
from layerwise.core.task import forward_arguments

SOFTMAX = (F.softmax, torch.softmax, Tensor.softmax)


@contextmanager
def instead(layers: Iterable[Layer], forward: Callable[[Layer], Callable[..., Any]]) -> Any:
    """Let layers run something else than their own forward, until the block ends."""
    places: list[dict[str, Any]] = []
    kept: list[Any] = []
    try:
        for layer in layers:
            place: dict[str, Any] = vars(layer.module)
            new = forward(layer)
            kept.append(place.get("forward"))
            places.append(place)
            place["forward"] = new
        yield
    finally:
        for place, own in zip(reversed(places), reversed(kept), strict=True):
            place.pop("forward")
            place.update({} if own is None else {"forward": own})


def swapped(tree: Any, old: Tensor, new: Tensor) -> Any:
    """A nest with another tensor in the place of one of its own."""
    return tree if new is old else tree_map(lambda leaf: new if leaf is old else leaf, tree)


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


class _Matrices(TorchFunctionMode):
    """Hands what the matrices of a layer are about to receive to their interventions.

    Heads are counted where attention is computed, for the matrix that comes next: a call of scaled
    dot-product attention, or a softmax over scores `[batch, head, seq, keys]`.
    """

    def __init__(
        self,
        layer: Layer,
        todo: Mapping[str, Sequence[Intervention]],
        apply: Callable[[Iterable[Intervention], Tensor, int], Tensor],
        shape: torch.Size,
    ) -> None:
        super().__init__()
        parameters = dict(layer.module.named_parameters(remove_duplicate=False))
        self.todo = {
            parameters[m.parameter].untyped_storage().data_ptr(): todo.get(m.parameter, ())
            for m in layer.matrices
        }
        self.apply, self.shape, self.heads = apply, shape, 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention or func in SOFTMAX:
            scores = args[0] if args else next(iter(kwargs.values()))
            self.heads = scores.shape[1] if scores.ndim == 4 else self.heads
        found = operands(func, args, kwargs)
        if found is not None:
            x, weight, _ = found
            wanted = self.todo.get(weight.untyped_storage().data_ptr())
            if wanted is not None:
                new = self._changed(wanted, x)
                self.heads = 0
                args = tuple(new if a is x else a for a in args)
                kwargs = {k: new if v is x else v for k, v in kwargs.items()}
        return func(*args, **kwargs)

    def _changed(self, wanted: Sequence[Intervention], x: Tensor) -> Tensor:
        tokens = self.shape[0] * self.shape[1] == x.shape[:-1].numel()
        rows = x.reshape(*self.shape[:2], -1) if tokens and x.ndim == 2 else x
        new = self.apply(wanted, rows, self.heads)
        return x if new is rows else new.reshape(x.shape)


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
            output = self._handed_on(layer, own, args, kwargs, entered)
        else:
            output = self._inside(layer, todo, own, args, kwargs, entered, start)
            for _ in range(todo.runs - 1):
                _check_repeat(layer, args, kwargs)
                again, entered = hidden(output), hidden((args, kwargs))
                args, kwargs = swapped((args, kwargs), entered, again)
                output = self._inside(layer, todo, own, args, kwargs, again, start)
        left = hidden(output)
        return swapped(output, left, self._apply(todo.at.get("out", ()), left, start))

    def _step(self, layer: Layer) -> tuple[str, int]:
        stack = next(s for s in self.network.stacks if s.name == layer.stack)
        if len(stack.wiring) == len(stack.layers):
            return stack.name, layer.index
        step = self.calls[stack.name] % len(stack.wiring)
        self.calls[stack.name] = step + 1
        return stack.name, step

    @staticmethod
    def _handed_on(layer: Layer, own: Callable, args: tuple, kwargs: dict, entered: Tensor) -> Any:
        """The input in the place of the output; a layer that fills a cache still runs."""
        if layer.alone and _cache_in(args, kwargs) is None:
            return entered
        kept = entered.clone()  # a layer may write into its input
        output = own(*args, **kwargs)
        return swapped(output, hidden(output), kept)

    def _inside(
        self,
        layer: Layer,
        todo: _Todo,
        own: Callable[..., Any],
        args: tuple,
        kwargs: dict,
        state: Tensor,
        start: int,
    ) -> Any:
        with ExitStack() as modes:
            if todo.inside:
                seen: list[str] = []

                def give(part: str, added: Tensor) -> Tensor:
                    seen.append(part)
                    return self._apply(todo.at.get(part, ()), added, start)

                modes.enter_context(StreamWatch(layer, {0: state}, True, False, give))
            if todo.matrices:
                use = lambda wanted, x, heads: self._apply(wanted, x, start, heads)  # noqa: E731
                modes.enter_context(_Matrices(layer, todo.matrices, use, state.shape))
            output = own(*args, **kwargs)
        if todo.inside:
            _check_seen(layer, todo, seen)
        return output

    def _apply(
        self, wanted: Iterable[Intervention], value: Tensor, start: int, heads: int = 0
    ) -> Tensor:
        for at, change in wanted:
            if at.heads is not None:
                _check_heads(at, value, heads)
            new = changed(at, value, change, start, heads)
            if new is None:
                if at in self.unreached:
                    self.unreached[at] = f"positions {start} to {start + value.shape[1] - 1}"
            else:
                self.unreached.pop(at, None)
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


def _check_heads(at: At, value: Tensor, heads: int) -> None:
    if heads and value.shape[-1] % heads == 0:
        return
    raise LayerwiseError(
        f"site {at.label}",
        allowed="an output projection that receives the heads of an attention side by side",
        found=f"{heads} heads counted, {value.shape[-1]} wide" if heads else "no attention before",
        fix="leave heads out, or choose the matrix, such as part='attention.o'",
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


@contextmanager
def edited(network: Network, edits: Edits) -> Iterator[Running]:
    """Whatever runs the model in this block runs with the changes, `generate` as well.

    Raises:
        LayerwiseError: a site is not there, was never reached, or a value does not fit.
    """
    running = Running(network, edits)
    hook = network.module.register_forward_pre_hook(running.begin, with_kwargs=True)
    try:
        with instead(running.layers, running.forward):
            yield running
    finally:
        hook.remove()
    running.check()


def run(
    network: Network, batch: Mapping[str, Tensor], edits: Edits = (), grad: bool = False
) -> Any:
    """The network's output for a batch, with changes; with `grad` it can be differentiated."""
    inputs = {key: value.to(network.device) for key, value in batch.items()}
    with torch.set_grad_enabled(grad), edited(network, edits):
        return network.module(**forward_arguments(network.module, inputs))


def keeping(at: At, kept: dict[At, list[Tensor]], grad: bool = False) -> Intervention:
    """Keep what passes at a site, changing nothing; with `grad` as a node of the graph."""

    def keep(value: Tensor) -> Tensor:
        if not grad:
            kept.setdefault(at, []).append(value.detach().clone())
            return value
        node = value.clone() if value.requires_grad else value.detach().clone().requires_grad_()
        kept.setdefault(at, []).append(node)
        return node

    return Intervention(at, keep)


def cache(
    network: Network,
    batch: Mapping[str, Tensor],
    where: Sequence[At] = (),
    edits: Edits = (),
    grad: bool = False,
) -> Cache:
    """Run a batch and keep what is at some sites: the stream after every layer if none is given.

    Args:
        network: the opened model.
        batch: keywords of its forward.
        where: the sites.
        edits: changes of the same run; what is kept is what is there after them.
        grad: keep nodes of the graph, so that the output can be differentiated by them.
    """
    kept: dict[At, list[Tensor]] = {}
    keep = [keeping(at, kept, grad) for at in where or sites(network)]
    output = run(network, batch, [*edits, *keep], grad)
    return Cache(
        {at: torch.cat(found, 1) if len(found) > 1 else found[0] for at, found in kept.items()},
        output,
    )
