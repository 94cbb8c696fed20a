"""A network that decodes: its cache, and forwards in which some of its steps hand on."""

import inspect
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from layerwise.core.errors import LayerwiseError
from layerwise.core.instead import instead, swapped
from layerwise.core.network import Network
from layerwise.core.stack import Layer
from layerwise.core.stops import hidden
from layerwise.jobs.past import Past

#: how far several tokens at once may be from one by one: of float32, and of shorter types
NEAR = {4: 1e-3, 2: 5e-2}


class Session:
    """A network, what it keeps of its text, and how far the text is in it.

    `feed` runs tokens; `drafting` is a block in which the left out steps hand their input on, and
    `verify` runs them on what was drafted. Where all of them follow an exit, what they were handed
    while drafting is kept, and the steps before the exit do not run again, unless `again` says so.
    """

    def __init__(self, network: Network, left_out: Sequence[int], again: bool = False) -> None:
        self.module, self.device, self.dtype = network.module, network.device, network.dtype
        self.layers = _left_out(network, left_out)
        known = inspect.signature(network.module.forward).parameters
        self.short = {"logits_to_keep": 1} if "logits_to_keep" in known else {}
        self.returned: dict[str, tuple[Any, Tensor]] = {}
        self.left_out = tuple(left_out)
        steps = network.stacks[-1].layers
        self.early = steps[: len(steps) - len(self.left_out)]
        behind = self.left_out == tuple(range(len(self.early), len(steps)))
        #: whether states are kept: layers hand on nothing beside them, or cached by others
        self.keeps = bool(left_out) and behind and not again and all(la.alone for la in steps)
        self.states: list[Tensor] = []
        self.past = Past({}, ())
        #: whether tokens that are run at once go on from the cache, as they do one by one
        self.at_once = True

    def start(self, tokens: Sequence[int]) -> Tensor:
        """Read a prompt; logits `[classes]` after its last token.

        Raises:
            LayerwiseError: what the left out steps keep is needed while they are.
        """
        beside = [layer for layer in self.layers if not layer.alone]
        with instead(beside, self._remember):
            output = self._run(tokens, **self.short)
        self.past = Past(output, tokens)
        if self.layers:
            self._must_count()
            self.past.will_be_cut()
            self.at_once = self.past.cuts or self._goes_on(tokens[-2:])
        self.keeps &= len(self.past.slots) == len(self.early) + len(self.layers)
        return output["logits"][0, -1]

    def feed(self, tokens: Sequence[int]) -> Tensor:
        """Logits `[tokens, classes]` after each of some tokens."""
        if len(tokens) > 1 and not self.at_once:
            return torch.cat([self.feed([token]) for token in tokens])
        read = tokens if self.past.cache is not None else [*self.past.text, *tokens]
        logits = self._run(read, **self.past.arguments)["logits"][0, -len(tokens) :]
        self.past.text += tokens
        return logits

    def drafting(self) -> Any:
        """A block in which the left out steps hand on what they receive."""
        self.states = []
        if not self.layers:
            return nullcontext()
        self.past.mark()
        return instead(self.layers, self._handing_on)

    def verify(self, last: int, drafted: Sequence[int], length: int) -> Tensor:
        """Logits `[places, classes]` at the places of drafted tokens, of a text of some length.

        Without kept states also after the last one.
        """
        if not drafted:
            return self.feed([last])
        slots = self.past.slots[: len(self.states) and len(self.early)]
        full = [dict(vars(slot)) for slot in slots]
        self.past.back(length)
        self.past.mark()
        if not self.states:
            return self.feed([last, *drafted])
        state = torch.cat(self.states, 1)
        with instead(self.early, lambda layer: lambda *args, **kwargs: state):
            logits = self.feed([last, *drafted[:-1]])
        for slot, held in zip(slots, full, strict=True):
            vars(slot).update(held)
        return logits

    def settle(self, tokens: Sequence[int], length: int) -> None:
        """After `verify`, let the text end with these tokens behind its first `length`."""
        if self.past.cuts:
            self.past.back(length + len(tokens))
        elif len(self.past.text) > length + len(tokens):
            self.past.back(length)
            self.feed(tokens)

    def _run(self, tokens: Sequence[int], **more: Any) -> Any:
        ids = torch.tensor([tokens], device=self.device)
        return self.module(input_ids=ids, use_cache=True, **more)

    def _goes_on(self, tokens: Sequence[int]) -> bool:
        """Whether some tokens at once are answered as one by one, where a cache holds states."""
        length, found = len(self.past.text), []
        for self.at_once in (True, False):
            self.past.mark()
            try:
                found.append(self.feed([*tokens, *tokens]).float())
            except (AssertionError, RuntimeError, ValueError):
                return False
            finally:
                self.past.back(length)
        far = (found[0] - found[1]).abs().max()
        return bool(far <= NEAR[min(self.dtype.itemsize, 4)] * found[1].abs().max())

    def _must_count(self) -> None:
        """Stock code, which counts positions in the first slot of each kind, has to find them there
        while tokens are drafted."""
        kinds = [type(slot) for slot in self.past.slots]
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
        state = _received(*args, **kwargs)
        self.keeps &= state.ndim == 3  # `[batch, seq, dim]`; others may have positions elsewhere
        self.states += [state] if self.keeps else []
        return state


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
