"""All batches walk through the network together, one layer in memory.

Every batch runs the model's own forward as a coroutine that pauses whenever it is about to call a
layer or, one level down, an operation that consumes one of the layer's matrices. The engine then
looks, solves, substitutes, and lets them pass. Weights are substituted at the call and never
edited in place, so that a clean stream can run beside the edited one.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import nullcontext
from contextvars import copy_context
from functools import partial
from typing import Any, Literal

import torch
from greenlet import GreenletExit, getcurrent, greenlet
from torch import Tensor

from layerwise.core.errors import LayerwiseError
from layerwise.core.hollow import CONVOLUTIONS, conv_rows, operands
from layerwise.core.network import Network
from layerwise.core.stack import Layer
from layerwise.core.stops import Batch, Edits, Lane, Pause, Rows, Stop, rows_of
from layerwise.core.task import forward_arguments
from layerwise.core.watching import Watching


class _ThreadState:
    """Grad mode and autocast belong to the thread; each side of a switch keeps its own."""

    def __init__(self) -> None:
        self.grad = torch.is_grad_enabled()
        self.autocast = {d: torch.is_autocast_enabled(d) for d in ("cpu", "cuda")}

    def restore(self) -> None:
        torch._C._set_grad_enabled(self.grad)
        for device, enabled in self.autocast.items():
            torch.set_autocast_enabled(device, enabled)


class Walk(Watching):
    """The engine behind `walk`: lanes, the layer that is open, and its substitutions."""

    def __init__(self, network: Network, matrices: Literal["", "watch", "pause"]) -> None:
        super().__init__()
        self.network = network
        self.matrices = matrices
        self.layer: Layer | None = None
        self.parameters: dict[str, Tensor] = {}
        self.edits: Edits = {}
        self.lanes: list[Lane] = []
        self.engine = getcurrent()
        self._storages: dict[int, list[str]] = {}
        self._visited: set[tuple[int, str, int | None]] = set()
        self._current: Lane | None = None
        self._closing = False

    def open(self, layer: Layer) -> None:
        """Bring the layer's weights in."""
        self.layer = layer
        self.network.bring(layer)
        self.parameters = dict(layer.module.named_parameters(remove_duplicate=False))
        self._storages = {}
        for name, p in self.parameters.items():
            if p.ndim > 1:
                self._storages.setdefault(p.untyped_storage().data_ptr(), []).append(name)
        self.edits, self._visited = {}, set()

    def close(self) -> None:
        """Drop the layer's weights."""
        if self.layer is not None:
            self.network.drop(self.layer)
        self.layer, self.parameters, self.edits, self._storages = None, {}, {}, {}

    # -- in the lanes ---------------------------------------------------------------------

    def pause(self) -> None:
        """Give control back to the engine until it lets this lane go on."""
        if self._closing:
            raise GreenletExit
        mine = _ThreadState()
        with self:
            self.engine.switch()
        mine.restore()

    def before_layer(self, layer: Layer) -> Callable[..., None]:
        """The hook that makes a lane wait before a layer."""

        def hook(module: Any, args: tuple, kwargs: dict) -> None:
            lane = self._lane()
            if lane is not None:
                lane.coming = (layer, args, kwargs)
                mine = _ThreadState()
                if self._closing:
                    raise GreenletExit
                self.engine.switch()
                mine.restore()

        return hook

    def after_layer(self, module: Any, args: tuple, output: Any) -> None:
        """The hook that keeps what a layer returned."""
        lane = self._lane()
        if lane is not None:
            lane.output = output

    def _lane(self) -> Lane | None:
        lane = self._current
        return lane if lane is not None and lane.green is getcurrent() else None

    def _call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        found = operands(func, args, kwargs) if self._storages else None
        if found is None:
            return func(*args, **kwargs)
        x, weight, _ = found
        name = self._owner(weight)
        if name is None:
            return func(*args, **kwargs)
        lane = self._lane()
        if lane is not None and self.matrices:
            rows = partial(conv_rows, func, args, kwargs) if func in CONVOLUTIONS else None
            self._stop_at(lane, name, weight, Pause(name, None, x, kwargs.get("offs"), rows))
        edited = self.edits.get(name)
        if edited is None or (lane is not None and lane.clean):
            return func(*args, **kwargs)
        base = self.parameters[name].storage_offset()
        new = edited.as_strided(weight.size(), weight.stride(), weight.storage_offset() - base)
        args = tuple(new if a is weight else a for a in args)
        kwargs = {k: new if v is weight else v for k, v in kwargs.items()}
        return func(*args, **kwargs)

    def _owner(self, weight: Tensor) -> str | None:
        """The parameter of the open layer that a weight is, or is a part of."""
        for name in self._storages.get(weight.untyped_storage().data_ptr(), ()):
            p = self.parameters[name]
            if p.storage_offset() <= weight.storage_offset() < p.storage_offset() + p.numel():
                return name
        return None

    def _stop_at(self, lane: Lane, name: str, weight: Tensor, pause: "Pause") -> None:
        parameter, step = self.parameters[name], self._step(name)
        if step and weight.ndim == 2:
            offset = weight.storage_offset() - parameter.storage_offset()
            pause.expert = offset // step
        if self.needs_stop(lane, name, pause.expert):
            lane.pause = pause
            self.pause()

    def _step(self, name: str) -> int:
        """Numbers from one expert of a parameter to the next; 0 where it holds none."""
        assert self.layer is not None
        parameter = self.parameters[name]
        each = (m for m in self.layer.matrices if m.parameter == name and m.expert is not None)
        first = next(each, None)
        if parameter.ndim == 3 or first is None:
            return parameter.stride(0) if parameter.ndim == 3 else 0
        return parameter.stride(0) * first.rows(parameter)

    def needs_stop(self, lane: Lane, name: str, expert: int | None) -> bool:
        """Once per lane and input group: what shares the memory shares the stop."""
        assert self.layer is not None
        members = [
            m for m in self.layer.matrices if m.parameter == name and expert in (None, m.expert)
        ]
        key = (id(lane), members[0].inputs if members else name, expert)
        if not members or key in self._visited:
            return False
        self._visited.add(key)
        return True

    # -- in the engine ---------------------------------------------------------------------

    def advance(self, lane: Lane) -> None:
        """Let a lane run to its next pause or to its end."""
        mine = _ThreadState()
        self._current = lane
        assert lane.green is not None
        torch._C._set_grad_enabled(False)  # where a lane begins; later it puts back its own
        listens = self.matrices or self.edits  # else no operation concerns the engine
        try:
            with self if listens else nullcontext():
                lane.green.switch()
        except Exception as error:
            where = self.layer.key if self.layer else "before the first layer"
            error.add_note(f"layerwise: in batch {lane.batch}, {where}")
            raise
        finally:
            self._current = None
            mine.restore()
        lane.done = lane.green.dead

    def rows_at(self, lanes: list[Lane]) -> list[Rows]:
        """What the lanes, all paused at one operation, are about to feed its input groups."""
        assert self.layer is not None
        pause = lanes[0].pause
        assert pause is not None
        members = [
            m
            for m in self.layer.matrices
            if m.parameter == pause.parameter and pause.expert in (None, m.expert)
        ]
        found = []
        for member in members:
            group = tuple(m for m in self.layer.matrices if m.inputs == member.inputs)
            rows = Rows(member.inputs, group, {}, {})
            for lane in lanes:
                side = rows.clean if lane.clean else rows.edited
                assert lane.pause is not None
                side[lane.batch] = rows_of(lane.pause, member)
            found.append(rows)
        return found

    def kill(self) -> None:
        """End suspended forwards, each under its own state, so that nothing leaks."""
        self._closing = True
        for lane in self.lanes:
            if lane.green is not None and not lane.green.dead:
                mine = _ThreadState()
                with self:
                    lane.green.throw(GreenletExit)
                mine.restore()


def walk(
    network: Network,
    batches: Sequence[Batch],
    *,
    matrices: Literal["", "watch", "pause"] = "",
    clean: bool = False,
    finish: Callable[[int, bool, Any], Any] | None = None,
) -> Generator[Stop, None, None]:
    """Walk all batches through the network, yielding every place where one can look or edit.

    Args:
        network: the opened model; its weights come and go layer by layer if they are streamed.
        batches: keyword arguments of the model's forward, one mapping a batch.
        matrices: also stop inside layers: `pause` when all batches stand before an operation, so
            that it can be solved and substituted; `watch` for each batch by itself, to look.
        clean: run a second, never edited lane beside each batch.
        finish: called with (batch, clean, output) of every forward; without it the walk ends
            after the last layer and nothing beyond it is computed.

    Yields:
        `Stop`s: `enter`, any number of `at`, `leave`, for every layer visit; with `finish` also
        `done` for every lane, in the last one.
    """
    engine = Walk(network, matrices)
    hooks = []
    for layer in (layer for stack in network.stacks for layer in stack.layers):
        module = layer.module
        hooks.append(module.register_forward_pre_hook(engine.before_layer(layer), with_kwargs=True))
        hooks.append(module.register_forward_hook(engine.after_layer))
    for number, batch in enumerate(batches):
        for side in (True, False) if clean else (False,):
            engine.lanes.append(_lane(network, number, side, batch, finish))
    visits = sum(len(stack.wiring) for stack in network.stacks)
    stance = torch.compiler.set_stance("force_eager")
    try:
        with stance:
            for lane in engine.lanes:
                engine.advance(lane)
            while visits and any(not lane.done for lane in engine.lanes):
                yield from _visit(engine)
                visits -= 1
            if finish is not None and any(not lane.done for lane in engine.lanes):
                raise LayerwiseError(
                    "lockstep",
                    allowed="as many layer calls as in the trial forward",
                    found="more",
                    fix="report this architecture; its depth depends on its input",
                )
    finally:
        engine.kill()
        engine.close()
        for hook in hooks:
            hook.remove()


def _lane(network: Network, number: int, clean: bool, batch: Batch, finish: Any) -> Lane:
    lane = Lane(number, clean)

    def forward() -> None:
        inputs = {k: v.to(network.device) for k, v in batch.items()}
        output = network.module(**forward_arguments(network.module, inputs))
        lane.result = None if finish is None else finish(number, clean, output)

    lane.green = greenlet(forward)
    lane.green.gr_context = copy_context()
    return lane


def _visit(engine: Walk) -> Iterator[Stop]:
    """One layer visit: all lanes enter it, pass its operations, and stand before the next."""
    layer = next(lane.coming[0] for lane in engine.lanes if lane.coming is not None)
    lanes = [lane for lane in engine.lanes if lane.coming and lane.coming[0] is layer]
    for lane in lanes:
        assert lane.coming is not None
        (_, lane.args, lane.kwargs), lane.coming, lane.output = lane.coming, None, None
    engine.open(layer)
    yield Stop("enter", layer, lanes, [], engine)
    inside = list(lanes)
    if engine.matrices == "pause":
        for lane in inside:
            engine.advance(lane)
        while paused := [lane for lane in inside if lane.pause is not None]:
            key = min(_order(layer, lane) for lane in paused)
            here = [lane for lane in paused if _order(layer, lane) == key]
            yield Stop("at", layer, here, engine.rows_at(here), engine)
            for lane in here:
                lane.pause = None
                engine.advance(lane)
    else:
        for lane in inside:
            engine.advance(lane)
            while lane.pause is not None:
                yield Stop("at", layer, [lane], engine.rows_at([lane]), engine)
                lane.pause = None
                engine.advance(lane)
            if lane.done:
                yield Stop("done", layer, [lane], [], engine)
    yield Stop("leave", layer, lanes, [], engine)
    engine.close()


def _order(layer: Layer, lane: Lane) -> tuple[int, int]:
    assert lane.pause is not None
    names = [m.parameter for m in layer.matrices]
    expert, parameter = lane.pause.key
    return (expert, names.index(parameter))
