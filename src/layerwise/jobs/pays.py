"""Whether a draft pays: forecast from one pass and measured costs, and measured itself."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from layerwise.core.data import Texts
from layerwise.core.method import find
from layerwise.core.network import Network
from layerwise.core.reader import Reader
from layerwise.core.sites import At
from layerwise.jobs.generate import ends_of
from layerwise.jobs.session import Progress, silent
from layerwise.jobs.speculate import Draft, Sampling, Session, Tally, speculated
from layerwise.jobs.tail import Tail

#: tokens of a document that a forecast reads, and how many it lets the network write
PROMPT, WRITTEN = 32, 64
#: what a forecast has to promise before a draft is used
WORTH = 1.05
#: sizes of a verification whose time is measured; others are interpolated
SIZES = (1, 2, 3, 5, 9, 17)
PLAIN = Draft((), 0, "plain decoding")


class Costs(NamedTuple):
    """Seconds on this machine: of a call with its end and head, of a layer, and of a
    verification by its number of tokens."""

    call: float
    layer: float
    verify: tuple[float, ...]

    def of_draft(self, layers: int) -> float:
        """One proposed token."""
        return self.call + layers * self.layer

    def of_verification(self, tokens: int) -> float:
        """One forward of the whole network on so many tokens, and cutting the cache."""
        return float(np.interp(tokens, SIZES, self.verify))


def exit_draft(network: Network, exit: int, length: int) -> Draft:
    """The draft that ends after `exit` layers."""
    steps = find("early_exit", "run").bind({"exit": exit})(network.stacks[-1])
    return Draft(steps, length, f"exit={exit},length={length}")


def documents_for(reader: Reader, data: str, count: int) -> list[list[int]]:
    """The first tokens of some documents of the select split."""
    texts = Texts(data).documents("select")
    rows = (reader.tokens(d.text, d.chat)[:PROMPT] for d in texts)
    return [row for row in rows if len(row) == PROMPT][:count]


def decode(
    network: Network, prompt: Sequence[int], sampling: Sampling, draft: Draft
) -> tuple[list[int], float, Tally]:
    """What the network writes under a draft, in how many seconds, and what stayed of it."""
    tally, began = Tally(), time.perf_counter()
    rounds = speculated(network, prompt, sampling, draft, ends_of(network), tally)
    written = [token for tokens in rounds for token in tokens]
    return written, time.perf_counter() - began, tally


def measured_costs(network: Network, prompt: Sequence[int], repeats: int = 15) -> Costs:
    """Time calls of different depth and length in turns; medians."""
    depth = len(network.stacks[-1].wiring)
    session = Session(network, range(1, depth))
    times: dict[int, list[float]] = {size: [] for size in (0, *SIZES)}
    with torch.no_grad():
        session.start(prompt)
        for _ in range(repeats + 1):
            for size, found in times.items():
                began = time.perf_counter()
                if size:
                    session.feed(list(prompt[:1]) * size)
                else:
                    with session.drafting():
                        session.feed(prompt[:1])
                session.cut(len(prompt))
                found.append(time.perf_counter() - began)
    medians = {size: statistics.median(found[1:]) for size, found in times.items()}
    layer = max(medians[1] - medians[0], 0.0) / max(depth - 1, 1)
    verify = np.maximum.accumulate([medians[size] for size in SIZES])
    return Costs(max(medians[0] - layer, 0.0), layer, tuple(verify.tolist()))


def agreement(
    network: Network,
    rows: Sequence[tuple[Sequence[int], Sequence[int]]],
    sampling: Sampling,
    progress: Progress = silent,
) -> dict[int, list[Bool[Tensor, " places"]]]:
    """At every place of some continuations, whether the token of each exit would stay.

    All exits are read out of one forward of each text: the network's own end on the state after
    every layer. Without drawing, a token stays if it is the network's choice; with, it stays with
    probability `sum_x min(p(x), q(x))`, which is drawn.
    """
    depth = len(network.stacks[-1].wiring)
    generator = torch.Generator().manual_seed(sampling.seed)
    found: dict[int, list[Tensor]] = {exit: [] for exit in range(1, depth)}
    tail: Tail | None = None
    for number, (prompt, written) in enumerate(rows):
        batch = {"input_ids": torch.tensor([[*prompt, *written[:-1]]])}
        tail = tail or Tail(network, batch)
        kept = network.cache(batch, [At(exit - 1) for exit in found])
        begin = len(prompt) - 1
        final = kept.output["logits"][0, begin:]
        for exit in found:
            early = tail(kept[At(exit - 1)][0, begin:])
            found[exit].append(_stays(early, final, sampling, generator))
        progress("reading every exit", number + 1, len(rows))
    return found


def _stays(early: Tensor, final: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    if not sampling.temperature:
        return (early.argmax(-1) == final.argmax(-1)).cpu()
    overlap = torch.minimum(sampling.weights(early), sampling.weights(final)).sum(-1).cpu()
    return torch.rand(overlap.shape, generator=generator) < overlap


def per_round(places: Sequence[Bool[Tensor, " places"]], length: int) -> tuple[float, float]:
    """Tokens a round, and the share of proposed tokens that stay, of drafts along some texts.

    Example:
        >>> per_round([torch.tensor([True, True, False, True, True, True])], 2)
        (3.0, 1.0)
        >>> per_round([torch.tensor([False, False, False])], 2)
        (1.0, 0.0)
    """
    rounds = kept = written = 0
    for text in places:
        at, flags = 0, text.tolist()
        while at < len(flags):
            run = flags[at : at + length]
            stay = next((i for i, same in enumerate(run) if not same), len(run))
            rounds, kept, at = rounds + 1, kept + stay, at + stay + 1
            written += stay + 1
    return written / max(rounds, 1), kept / max(rounds * length, 1)


class Forecast(NamedTuple):
    """What a forecast knows: agreement of every exit, and what calls cost here."""

    places: Mapping[int, Sequence[Tensor]]
    costs: Costs

    def of(self, exit: int, length: int) -> dict[str, float]:
        """Speed against plain decoding, and the share of proposed tokens that stay."""
        tokens, share = per_round(self.places[exit], length)
        verification = self.costs.of_verification(length + 1)
        seconds = length * self.costs.of_draft(exit) + verification
        return {"predicted": tokens * self.costs.of_verification(1) / seconds, "stays": share}

    def best(self, lengths: Sequence[int] = range(1, 9)) -> tuple[int, int, float]:
        """Exit, length and speed of the best of all settings."""
        speeds = {(e, n): self.of(e, n)["predicted"] for e in self.places for n in lengths}
        exit, length = max(speeds, key=lambda setting: speeds[setting])
        return exit, length, speeds[exit, length]


def forecast(
    network: Network,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling = Sampling(),
    progress: Progress = silent,
) -> Forecast:
    """Let the network write on, read every exit out of one pass over that, and time its calls."""
    wanted = sampling._replace(max_tokens=WRITTEN)
    rows = []
    for number, prompt in enumerate(prompts):
        rows.append((prompt, decode(network, prompt, wanted, PLAIN)[0]))
        progress("writing without a draft", number + 1, len(prompts))
    long_enough = [(prompt, written) for prompt, written in rows if len(written) > 1]
    places = agreement(network, long_enough or rows, sampling, progress)
    return Forecast(places, measured_costs(network, prompts[0]))


def choose_draft(found: Forecast, network: Network) -> tuple[Draft | None, str]:
    """The best draft, or none, and why."""
    exit, length, speed = found.best()
    if speed < WORTH:
        return None, (
            f"plain decoding is faster here: the best draft, exit={exit},length={length}, is "
            f"predicted at {speed:.2f} of its speed"
        )
    draft = exit_draft(network, exit, length)
    return draft, f"drafts with {draft.what}, predicted {speed:.2f} times as fast as plain decoding"


def sweep(
    network: Network,
    prompts: Sequence[Sequence[int]],
    found: Forecast,
    settings: Sequence[tuple[int, int]],
    sampling: Sampling,
    progress: Progress = silent,
) -> list[dict[str, Any]]:
    """Settings against plain decoding in pairs, one after the other on each prompt.

    Returns:
        For each: the share of proposed tokens that stayed, tokens per second, the median of the
        pairs' ratios with its interval and the predicted one, and whether every text was the same.
    """
    rows = []
    for number, (exit, length) in enumerate(settings):
        draft = exit_draft(network, exit, length)
        pairs, total = [], Tally()
        same, tokens, seconds = True, 0, 0.0
        for prompt in prompts:
            (plain, slow, _), (text, fast, tally) = _pair(network, prompt, sampling, draft)
            pairs.append((len(text) / fast) / (len(plain) / slow))
            same &= plain == text or bool(sampling.temperature)
            total.drafted, total.kept = total.drafted + tally.drafted, total.kept + tally.kept
            tokens, seconds = tokens + len(text), seconds + fast
        told = found.of(exit, length)
        rows.append(
            {
                "exit": exit,
                "length": length,
                "stays": round(total.acceptance, 3),
                "stays_predicted": round(told["stays"], 3),
                "tokens/s": round(tokens / seconds, 1),
                "speed": [round(value, 2) for value in median_interval(pairs)],
                "speed_predicted": round(told["predicted"], 2),
                "same": None if sampling.temperature else same,
            }
        )
        progress("measuring settings", number + 1, len(settings))
    return rows


def _pair(network: Network, prompt: Sequence[int], sampling: Sampling, draft: Draft) -> Any:
    run: Callable[[Draft], Any] = lambda how: decode(network, prompt, sampling, how)  # noqa: E731
    return run(PLAIN), run(draft)


def median_interval(values: Sequence[float], draws: int = 2000) -> list[float]:
    """The median with the 2.5% and 97.5% quantiles over resampled values.

    Example:
        >>> median_interval([1.0, 1.0, 1.0])
        [1.0, 1.0, 1.0]
    """
    rng, whole = np.random.default_rng(0), np.asarray(values)
    drawn = np.median(whole[rng.integers(0, len(whole), (draws, len(whole)))], axis=1)
    return [float(np.median(whole)), *map(float, np.quantile(drawn, [0.025, 0.975]))]


def settings_for(depth: int) -> list[tuple[int, int]]:
    """Exits at a sixth, a quarter, a third and half of the depth, with two, four and six tokens.

    Example:
        >>> settings_for(4)
        [(1, 2), (1, 4), (1, 6), (2, 2), (2, 4), (2, 6)]
    """
    exits = sorted({max(1, depth // part) for part in (6, 4, 3, 2)} - {depth})
    return [(exit, length) for exit in exits for length in (2, 4, 6)]
