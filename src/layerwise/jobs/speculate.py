"""Decoding by drafts: some steps propose tokens, the whole network verifies them in one forward.

Drafting and verification are the network's own forward on one cache. While tokens are drafted the
steps that are left out hand their input on and leave their cache slots alone; then the slots that
ran are cut back, all steps run on the drafted tokens at once, and every slot is cut to what stayed.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import CacheLayerMixin, LinearAttentionCacheLayerMixin

from layerwise.core.errors import LayerwiseError, refusing
from layerwise.core.instead import instead, swapped
from layerwise.core.network import Network
from layerwise.core.stack import Layer
from layerwise.core.stops import hidden
from layerwise.run import draw_from, same_choices, speculative_sample


class Sampling(NamedTuple):
    """How many tokens are written, and how each is chosen from the network's answer."""

    max_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def checked(self) -> "Sampling":
        """Itself.

        Raises:
            LayerwiseError: a value is out of range.
        """
        for name, good, allowed in (
            ("max_tokens", self.max_tokens >= 1, "1 or more"),
            ("temperature", 0 <= self.temperature < float("inf"), "0 or more"),
            ("top_k", self.top_k >= 0, "0 or more"),
            ("top_p", 0 < self.top_p <= 1, "more than 0, at most 1"),
        ):
            if not good:
                raise LayerwiseError(
                    f"--{name.replace('_', '-')}",
                    allowed=allowed,
                    found=getattr(self, name),
                    fix="choose within",
                )
        return self

    def weights(self, logits: Tensor) -> Tensor:
        """Probabilities `[rows, classes]` after temperature, `top_k` and `top_p`, by stock code."""
        from transformers import TopKLogitsWarper, TopPLogitsWarper

        scores = logits.float() / self.temperature
        none = torch.empty(0, dtype=torch.long)
        if self.top_k:
            scores = TopKLogitsWarper(self.top_k)(none, scores)  # type: ignore[arg-type]
        if self.top_p < 1:
            scores = TopPLogitsWarper(self.top_p)(none, scores)  # type: ignore[arg-type]
        return scores.softmax(-1)


class Draft(NamedTuple):
    """Which steps hand on their input while tokens are proposed, and how many are proposed."""

    left_out: tuple[int, ...]
    length: int = 4
    what: str = ""


@dataclass
class Tally:
    """Rounds, tokens that were proposed, those that stayed, and all that were written."""

    rounds: int = 0
    drafted: int = 0
    kept: int = 0
    written: int = 0

    @property
    def acceptance(self) -> float:
        """Share of the proposed tokens that stayed."""
        return self.kept / max(self.drafted, 1)


class Session:
    """A network, its cache, and how far the text is in it.

    `feed` runs tokens; `drafting` is a block in which the left out steps hand their input on.
    """

    def __init__(self, network: Network, left_out: Sequence[int]) -> None:
        self.module, self.device = network.module, network.device
        self.layers = _left_out(network, left_out)
        known = inspect.signature(network.module.forward).parameters
        self.short = {"logits_to_keep": 1} if "logits_to_keep" in known else {}
        self.returned: dict[str, tuple[Any, Tensor]] = {}
        self.left_out = tuple(left_out)
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
        return output["logits"][0, -1]

    def feed(self, tokens: Sequence[int]) -> Tensor:
        """Logits `[tokens, classes]` after each of some tokens."""
        return self._run(tokens, **{self.place: self.cache})["logits"][0]

    def drafting(self) -> Any:
        """A block in which the left out steps hand on what they receive."""
        return instead(self.layers, self._handing_on) if self.layers else nullcontext()

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
        if layer.alone:
            return _received
        return partial(_in_place_of, *self.returned[layer.key])


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


def speculated(
    network: Network,
    prompt: Sequence[int],
    sampling: Sampling,
    draft: Draft,
    ends: set[int],
    tally: Tally,
) -> Iterator[list[int]]:
    """The tokens that the network writes, as many at a time as stay of a draft, and one more.

    With a draft that leaves nothing out, this is plain decoding, one token at a time.

    Raises:
        LayerwiseError: the network cannot be run that way.
    """
    generator = torch.Generator().manual_seed(sampling.seed)
    with (
        torch.no_grad(),
        refusing(
            "--speculate",
            allowed="a network whose steps can hand on their input while it decodes",
            fix="choose an exit, or decode without a draft",
        ),
    ):
        session = Session(network, draft.left_out)
        written = [_chosen(session.start(prompt), sampling, generator)[0]]
        yield written
        length, left = len(prompt), sampling.max_tokens - 1
        while left > 0 and written[-1] not in ends:
            count = min(draft.length, left - 1) if draft.left_out else 0
            found = _round(session, written[-1], length, count, sampling, generator, tally)
            written = until(found, ends)
            length, left = length + len(found), left - len(written)
            tally.written += len(written)
            yield written


def until(tokens: list[int], ends: set[int]) -> list[int]:
    """The tokens up to the first that ends a text."""
    last = next((i for i, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[: last + 1]


def _round(
    session: Session,
    last: int,
    length: int,
    count: int,
    sampling: Sampling,
    generator: torch.Generator,
    tally: Tally,
) -> list[int]:
    """Draft `count` tokens after `last`, verify them, and cut the cache to what stays of them."""
    drafted: list[int] = []
    weights: list[Tensor] = []
    with session.drafting():
        while len(drafted) < count:
            logits = session.feed([drafted[-1] if drafted else last])[-1]
            token, q = _chosen(logits, sampling, generator)
            drafted.append(token)
            weights += [q] if q is not None else []
    if drafted:
        session.cut(length)
    logits = session.feed([last, *drafted])
    if sampling.temperature:
        p = sampling.weights(logits).cpu()
        q = torch.stack(weights) if weights else p[:0]
        found = speculative_sample(torch.tensor(drafted, dtype=torch.long), q, p, generator)
    else:
        chosen = logits.argmax(-1).cpu()
        found = same_choices(torch.tensor(drafted, dtype=torch.long), chosen)
    if drafted:
        session.cut(length + len(found))
    tally.rounds += 1
    tally.drafted += len(drafted)
    tally.kept += len(found) - 1
    return found


def _chosen(
    logits: Tensor, sampling: Sampling, generator: torch.Generator
) -> tuple[int, Tensor | None]:
    """A token after logits `[classes]`, and the probabilities that it was drawn from."""
    if not sampling.temperature:
        return int(logits.argmax()), None
    weights = sampling.weights(logits[None])[0].cpu()
    return draw_from(weights, generator), weights
