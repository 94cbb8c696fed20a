"""A network that decodes: its cache, and forwards in which some of its steps hand on."""

import inspect
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import CacheLayerMixin, LinearAttentionCacheLayerMixin

from layerwise.core.errors import LayerwiseError
from layerwise.core.instead import instead, swapped
from layerwise.core.network import Network
from layerwise.core.stack import Layer
from layerwise.core.stops import hidden


class Session:
    """A network, its cache, and how far the text is in it.

    `feed` runs tokens; `drafting` is a block in which the left out steps hand their input on, and
    `verify` runs them on what was drafted. Where all of them follow an exit, what they were handed
    while drafting is kept, and the steps before the exit do not run again.
    """

    def __init__(self, network: Network, left_out: Sequence[int]) -> None:
        self.module, self.device = network.module, network.device
        self.layers = _left_out(network, left_out)
        known = inspect.signature(network.module.forward).parameters
        self.short = {"logits_to_keep": 1} if "logits_to_keep" in known else {}
        self.returned: dict[str, tuple[Any, Tensor]] = {}
        self.left_out = tuple(left_out)
        steps = network.stacks[-1].layers
        self.early = steps[: len(steps) - len(self.left_out)]
        behind = self.left_out == tuple(range(len(self.early), len(steps)))
        #: whether states are kept: layers hand on nothing beside them, or cached by others
        self.keeps = bool(self.left_out) and behind and all(layer.alone for layer in steps)
        self.states: list[Tensor] = []
        self.place, self.cache = "", Cache(layers=[])

    def start(self, tokens: Sequence[int]) -> Tensor:
        """Read a prompt; logits `[classes]` after its last token.

        Raises:
            LayerwiseError: the network keeps something that cannot be cut back.
        """
        beside = [layer for layer in self.layers if not layer.alone]
        with instead(beside, self._remember):
            output = self._run(tokens, **self.short)
        held = [(name, value) for name, value in output.items() if isinstance(value, Cache)]
        self.place, self.cache = held[0] if held else ("", self.cache)
        if self.layers:
            self._must_cut()
        self.keeps &= len(self.cache.layers) == len(self.early) + len(self.layers)
        return output["logits"][0, -1]

    def feed(self, tokens: Sequence[int]) -> Tensor:
        """Logits `[tokens, classes]` after each of some tokens."""
        return self._run(tokens, **{self.place: self.cache})["logits"][0]

    def drafting(self) -> Any:
        """A block in which the left out steps hand on what they receive."""
        self.states = []
        return instead(self.layers, self._handing_on) if self.layers else nullcontext()

    def verify(self, last: int, drafted: Sequence[int], length: int) -> Tensor:
        """Logits `[places, classes]` at the places of drafted tokens, of a text of some length.

        Without kept states also after the last one.
        """
        if not drafted:
            return self.feed([last])
        slots = self.cache.layers[: len(self.states) and len(self.early)]
        full = [dict(vars(slot)) for slot in slots]
        self.cut(length)
        if not self.states:
            return self.feed([last, *drafted])
        state = torch.cat(self.states, 1)
        with instead(self.early, lambda layer: lambda *args, **kwargs: state):
            logits = self.feed([last, *drafted[:-1]])
        for slot, held in zip(slots, full, strict=True):
            vars(slot).update(held)
        return logits

    def cut(self, length: int) -> None:
        """Cut every slot back to the first `length` positions."""
        for slot in self.cache.layers:
            if isinstance(slot, CacheLayerMixin):
                slot.crop(-max(slot.get_seq_length() - length, 0))  # type: ignore[attr-defined]

    def _run(self, tokens: Sequence[int], **more: Any) -> Any:
        ids = torch.tensor([tokens], device=self.device)
        return self.module(input_ids=ids, use_cache=True, **more)

    def _must_cut(self) -> None:
        """Every slot has to hold positions that can be cut off again, and stock code, which
        counts them in the first slot of each kind, has to find them there while tokens are
        drafted."""
        slots = self.cache.layers if type(self.cache) is DynamicCache else []
        states = any(isinstance(slot, LinearAttentionCacheLayerMixin) for slot in slots)
        if states or not slots or not all(slot.is_croppable for slot in slots):
            raise LayerwiseError(
                "--speculate",
                allowed="a network whose cache holds keys and values by position",
                found="states that cannot be taken back" if states else type(self.cache).__name__,
                fix="decode without a draft",
            )
        kinds = [type(slot) for slot in slots]
        for step in self.left_out:
            first = step < len(kinds) and kinds.index(kinds[step]) == step
            later = [i for i, kind in enumerate(kinds) if first and kind is kinds[step]]
            if not set(later) <= set(self.left_out):
                raise LayerwiseError(
                    "--speculate",
                    allowed="drafts in which the first step with a cache of its kind runs",
                    found=f"step {step} left out, the first with a {kinds[step].__name__}",
                    fix="leave out other steps, or choose an exit",
                )
        self.cache.activate_past_recording()

    def _remember(self, layer: Layer) -> Callable[..., Any]:
        forward = layer.module.forward

        def run(*args: Any, **kwargs: Any) -> Any:
            output = forward(*args, **kwargs)
            self.returned[layer.key] = output, hidden(output)
            return output

        return run

    def _handing_on(self, layer: Layer) -> Callable[..., Any]:
        if self.keeps and layer is self.layers[0]:
            return self._note
        if layer.alone:
            return _received
        return partial(_in_place_of, *self.returned[layer.key])

    def _note(self, *args: Any, **kwargs: Any) -> Tensor:
        self.states.append(_received(*args, **kwargs))
        return self.states[-1]


def _received(*args: Any, **kwargs: Any) -> Tensor:
    """The hidden state among arguments; where it comes first, without a look at the others."""
    first = args[0] if args else None
    if isinstance(first, Tensor) and first.ndim == 3 and first.is_floating_point():
        return first
    return hidden((args, kwargs))


def _in_place_of(output: Any, state: Tensor, *args: Any, **kwargs: Any) -> Any:
    return swapped(output, state, _received(*args, **kwargs))


def _left_out(network: Network, steps: Sequence[int]) -> list[Layer]:
    """The layers of some steps of the last stack.

    Raises:
        LayerwiseError: a layer of it runs at other steps too, or the network has several stacks.
    """
    stack = network.stacks[-1]
    alone = network.task == "causal" and len(stack.wiring) == len(stack.layers)
    if steps and not (alone and len(network.stacks) == 1):
        raise LayerwiseError(
            "--speculate",
            allowed="a network of one stack that writes word by word, each layer one module",
            found=f"{len(network.stacks)} stacks, {len(stack.layers)} modules for "
            f"{len(stack.wiring)} steps, task {network.task!r}",
            fix="decode without a draft",
        )
    return [stack.layers[step] for step in steps]
