"""Whether a draft pays: forecast from one pass and measured costs, and measured itself."""

import time
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from layerwise.core.data import Texts
from layerwise.core.method import find
from layerwise.core.network import Network
from layerwise.core.reader import Reader
from layerwise.core.sites import At
from layerwise.jobs.costs import Costs, Rounds, measured_costs
from layerwise.jobs.generate import ends_of
from layerwise.jobs.session import Progress, silent
from layerwise.jobs.speculate import Draft, Sampling, Tally, speculated
from layerwise.jobs.tail import Tail

#: tokens of a document that a forecast reads, and how many it lets the network write
PROMPT, WRITTEN = 32, 64
#: what a forecast has to promise before a draft is used
WORTH = 1.05
#: lengths of drafts, and below which probability a token is the last of one; 0 for none
LENGTHS, SURE = range(1, 9), (0.0, 0.3, 0.5, 0.7)
PLAIN = Draft((), 0, "plain decoding")


def exit_draft(
    network: Network, exit: int, length: int, sure: float = 0.0, again: bool = False
) -> Draft:
    """The draft that ends after `exit` layers."""
    steps = find("early_exit", "run").bind({"exit": exit})(network.stacks[-1])
    more = (f",sure={sure:g}" if sure else "") + (",again" if again else "")
    return Draft(steps, length, f"exit={exit},length={length}{more}", sure, again)


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


class Places(NamedTuple):
    """Whether the tokens of an exit would stay along a text, and the probability it gives them."""

    stays: Bool[Tensor, " places"]
    sure: Float[Tensor, " places"]


def agreement(
    network: Network,
    rows: Sequence[tuple[Sequence[int], Sequence[int]]],
    sampling: Sampling,
    progress: Progress = silent,
) -> dict[int, list[Places]]:
    """At every place of some continuations, whether the token of each exit would stay.

    All exits are read out of one forward of each text: the network's own end on the state after
    every layer. Without drawing, a token stays if it is the network's choice; with, it stays with
    probability `sum_x min(p(x), q(x))`, which is drawn.
    """
    depth = len(network.stacks[-1].wiring)
    generator = torch.Generator().manual_seed(sampling.seed)
    found: dict[int, list[Places]] = {exit: [] for exit in range(1, depth)}
    tail: Tail | None = None
    for number, (prompt, written) in enumerate(rows):
        batch = {"input_ids": torch.tensor([[*prompt, *written[:-1]]])}
        tail = tail or Tail(network, batch)
        kept = network.cache(batch, [At(exit - 1) for exit in found])
        begin = len(prompt) - 1
        final = kept.output["logits"][0, begin:]
        for exit in found:
            early = tail(kept[At(exit - 1)][0, begin:])
            stays = _stays(early, final, sampling, generator)
            found[exit].append(Places(stays, early.float().softmax(-1).amax(-1).cpu()))
        progress("reading every exit", number + 1, len(rows))
    return found


def _stays(early: Tensor, final: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    if not sampling.temperature:
        return (early.argmax(-1) == final.argmax(-1)).cpu()
    overlap = torch.minimum(sampling.weights(early), sampling.weights(final)).sum(-1).cpu()
    return torch.rand(overlap.shape, generator=generator) < overlap


def per_round(
    texts: Sequence[Places], length: int, sure: float = 0.0, keeps: bool = True
) -> Rounds:
    """What comes of drafts along some texts; each ends with `length` tokens, or one not `sure`.

    Without kept states the network runs behind the last proposed token too, and adds one.

    Example:
        >>> ones = torch.ones(6)
        >>> text = Places(torch.tensor([True, True, False, True, True, True]), ones)
        >>> per_round([text], 2), per_round([text], 2, keeps=False).written
        (Rounds(written=1.5, drafted=1.75, stays=0.7142857142857143, whole=0.75), 3.0)
    """
    rounds = kept = drafted = written = whole = 0
    for stays, certain in texts:
        at, flags, unsure = 0, stays.tolist(), (certain < sure).tolist()
        while at < len(flags):
            run = flags[at : at + length]
            last = next((i for i, stop in enumerate(unsure[at : at + length]) if stop), len(run))
            run = run[: last + 1]
            stay = next((i for i, same in enumerate(run) if not same), len(run))
            made = min(stay + 1, len(run) + (not keeps))
            rounds, kept, drafted = rounds + 1, kept + stay, drafted + len(run)
            whole += stay == len(run)
            at, written = at + made, written + made
    count = max(rounds, 1)
    return Rounds(written / count, drafted / count, kept / max(drafted, 1), whole / count)


class Setting(NamedTuple):
    """Of a draft by an exit."""

    exit: int
    length: int
    sure: float = 0.0
    again: bool = False


class Forecast(NamedTuple):
    """What a forecast knows: agreement of every exit, and what calls cost here."""

    places: Mapping[int, Sequence[Places]]
    costs: Costs

    def speeds(self, setting: Setting) -> list[float]:
        """Speed against plain decoding, by text."""
        exit, length, sure, again = setting
        keeps, plain = self.costs.keeps and not again, self.costs.of(1, self.costs.depth)
        rounds = [per_round([text], length, sure, keeps) for text in self.places[exit]]
        return [r.written * plain / self.costs.of_round(r, exit, again) for r in rounds]

    def stays(self, setting: Setting) -> float:
        """The share of proposed tokens that stay."""
        exit, length, sure, again = setting
        return per_round(self.places[exit], length, sure, self.costs.keeps and not again).stays

    def best(self) -> tuple[Setting, float]:
        """The best of all settings, and the median of its speeds."""
        both = (False, True) if self.costs.keeps else (False,)
        settings = (Setting(*found) for found in product(self.places, LENGTHS, SURE, both))
        speeds = {setting: float(np.median(self.speeds(setting))) for setting in settings}
        best = max(speeds, key=lambda setting: speeds[setting])
        return best, speeds[best]


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
    setting, speed = found.best()
    draft = exit_draft(network, *setting)
    _, low, high = median_interval(found.speeds(setting))
    said = f"{speed:.2f} [{low:.2f}, {high:.2f}]"
    if speed < WORTH:
        return None, (
            f"plain decoding is faster here: the best draft, {draft.what}, is predicted at "
            f"{said} of its speed"
        )
    return draft, f"drafts with {draft.what}, predicted {said} times as fast as plain decoding"


def sweep(
    network: Network,
    prompts: Sequence[Sequence[int]],
    found: Forecast,
    settings: Sequence[Setting],
    sampling: Sampling,
    progress: Progress = silent,
) -> list[dict[str, Any]]:
    """Settings against plain decoding in pairs, one after the other on each prompt.

    Returns:
        For each: the share of proposed tokens that stayed, tokens per second, the median of the
        pairs' ratios and of the predicted ones with intervals, and whether every text was the same.
    """
    rows = []
    for number, setting in enumerate(settings):
        draft = exit_draft(network, *setting)
        pairs, total = [], Tally()
        same, tokens, seconds = True, 0, 0.0
        for prompt in prompts:
            (plain, slow, _), (text, fast, tally) = _pair(network, prompt, sampling, draft)
            pairs.append((len(text) / fast) / (len(plain) / slow))
            same &= plain == text or bool(sampling.temperature)
            total.drafted, total.kept = total.drafted + tally.drafted, total.kept + tally.kept
            tokens, seconds = tokens + len(text), seconds + fast
        rows.append(
            {
                "draft": draft.what,
                **setting._asdict(),
                "stays": round(total.acceptance, 3),
                "stays_predicted": round(found.stays(setting), 3),
                "tokens/s": round(tokens / seconds, 1),
                "speed": [round(value, 2) for value in median_interval(pairs)],
                "speed_predicted": [round(v, 2) for v in median_interval(found.speeds(setting))],
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


def settings_for(depth: int) -> list[Setting]:
    """Exits at a sixth, a quarter, a third and half of the depth: two and four tokens, and up to
    eight while the draft is sure.

    Example:
        >>> [tuple(setting) for setting in settings_for(3)]
        [(1, 2, 0.0, False), (1, 4, 0.0, False), (1, 8, 0.5, False)]
    """
    exits = sorted({max(1, depth // part) for part in (6, 4, 3, 2)} - {depth})
    limits = ((2, 0.0), (4, 0.0), (8, 0.5))
    return [Setting(exit, length, sure) for exit in exits for length, sure in limits]
