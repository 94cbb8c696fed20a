"""Decoding by drafts: some steps propose tokens, the whole network verifies them in one forward.

Drafting and verification are the network's own forward on one cache. While tokens are drafted the
steps that are left out hand their input on and leave their cache slots alone. Then these run on the
drafted tokens at once, from the states that they were handed, or all steps do where the steps that
drafted stand in between; and every slot is cut to what stayed.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import eq
from typing import NamedTuple

import torch
from torch import Tensor

from layerwise.core.errors import LayerwiseError, refusing
from layerwise.core.network import Network
from layerwise.jobs.decoding import Session
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
    """Which steps hand on their input while tokens are proposed, and how many are proposed.

    At most `length` are, and none after one of a probability below `sure`. With `again` the layers
    before an exit run in the verification too, as they do where other layers are left out.
    """

    left_out: tuple[int, ...]
    length: int = 4
    what: str = ""
    sure: float = 0.0
    again: bool = False


@dataclass
class Tally:
    """Rounds, tokens that were proposed, those that stayed, and all that were written.

    `at_once` is false where the network cannot verify several at once, so that no draft pays.
    """

    rounds: int = 0
    drafted: int = 0
    kept: int = 0
    written: int = 0
    at_once: bool = True

    @property
    def acceptance(self) -> float:
        """Share of the proposed tokens that stayed."""
        return self.kept / max(self.drafted, 1)


@torch.inference_mode()
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
    with refusing(
        "--speculate",
        allowed="a network whose steps can hand on their input while it decodes",
        fix="choose an exit, or decode without a draft",
    ):
        session = Session(network, draft.left_out, draft.again)
        written = [_chosen(session.start(prompt), sampling, generator)[0]]
        tally.at_once &= session.at_once
        yield written
        length, left = len(prompt), sampling.max_tokens - 1
        while left > 0 and written[-1] not in ends:
            count = min(draft.length, left - (not session.keeps)) if draft.left_out else 0
            limits = count, draft.sure
            found = _round(session, written[-1], length, limits, sampling, generator, tally)
            written = until(found[:left], ends)
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
    limits: tuple[int, float],
    sampling: Sampling,
    generator: torch.Generator,
    tally: Tally,
) -> list[int]:
    """Draft tokens after `last`, verify them, and cut the cache to what stays of them."""
    drafted, weights = _drafted(session, last, limits, sampling, generator)
    logits = session.verify(last, drafted, length)
    proposed = torch.tensor(drafted, dtype=torch.long)
    if sampling.temperature:
        p = sampling.weights(logits).cpu()
        q = torch.stack(weights) if weights else p[:0]
        found = speculative_sample(proposed, q, p, generator)
    else:
        found = same_choices(proposed, logits.argmax(-1).cpu())
    if drafted:
        session.settle([last, *found[:-1]], length)
    tally.rounds += 1
    tally.drafted += len(drafted)
    tally.kept += sum(map(eq, drafted, found))
    return found


def _drafted(
    session: Session,
    last: int,
    limits: tuple[int, float],
    sampling: Sampling,
    generator: torch.Generator,
) -> tuple[list[int], list[Tensor]]:
    """Proposed tokens, and what each was drawn from; one that is not sure is the last of them."""
    drafted: list[int] = []
    weights: list[Tensor] = []
    count, sure = limits
    with session.drafting():
        while len(drafted) < count:
            logits = session.feed([drafted[-1] if drafted else last])[-1]
            token, q = _chosen(logits, sampling, generator)
            drafted.append(token)
            weights += [q] if q is not None else []
            if sure and logits.softmax(-1)[token] < sure:
                break
    return drafted, weights


def _chosen(
    logits: Tensor, sampling: Sampling, generator: torch.Generator
) -> tuple[int, Tensor | None]:
    """A token after logits `[classes]`, and the probabilities that it was drawn from."""
    if not sampling.temperature:
        return int(logits.argmax()), None
    weights = sampling.weights(logits[None])[0].cpu()
    return draw_from(weights, generator), weights
