"""Drafts and plain decoding against stock `generate`: speeds of interleaved runs, one prompt each.

python -m benchmarks.speculation             both models
python -m benchmarks.speculation demo        one of them
python -m benchmarks.speculation FOLDER      any model, such as one of examples/layerskip
"""

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from itertools import chain

from benchmarks.models import Model, models
from benchmarks.timing import table
from layerwise.core.network import Network
from layerwise.core.open import open_network
from layerwise.jobs.costs import SIZES, Costs, measured_costs
from layerwise.jobs.generate import generate
from layerwise.jobs.pays import (
    PLAIN,
    choose_draft,
    decode,
    documents_for,
    exit_draft,
    forecast,
    median_interval,
)
from layerwise.jobs.session import load_reader
from layerwise.jobs.speculate import Sampling
from layerwise.run import few_rows

PAIRS, WRITTEN, SEEN, REPEATS = 30, 48, 8, 31
#: tokens of the longer text behind which calls are timed, at most
LONG = 960
#: how often every prompt is written on in each way, in turn; its median counts
TURNS = 3


def main(words: Sequence[str] = ()) -> None:
    """Print a table per model."""
    found = [m for m in models() if not words or m.name in words]
    known = [m.name for m in found]
    folders = [Model(word, word, "stdlib") for word in words if word not in known]
    for model in (*found, *folders):
        network = open_network(model.folder, dtype="float32").load()
        prompts = documents_for(load_reader(network), model.data, PAIRS)
        room = getattr(network.model.config, "max_position_embeddings", LONG + SIZES[-1])
        texts = (prompts[0], list(chain(*prompts))[: min(LONG, room - SIZES[-1])])
        before = [measured_costs(network, text, REPEATS) for text in texts]
        with few_rows(network.module) as quick:
            now = [measured_costs(network, text, REPEATS) for text in texts]
            for text, stock, faster in zip(texts, before, now, strict=True):
                costs(f"{model.name} model, behind {len(text)} tokens", stock, faster)
            print(f"\n{quick} linear modules compute two to eight rows by the faster product.")
            measure(model, network, prompts)


def costs(what: str, stock: Costs, quick: Costs) -> None:
    """What calls cost in stock code, and with few rows by the faster ways."""
    rows: list[tuple[str, ...]] = [
        ("beside the layers", *(f"{1e3 * c.call:.2f}" for c in (stock, quick))),
        ("a layer, one token", *(f"{1e3 * (c.of(1, 1) - c.call):.2f}" for c in (stock, quick))),
    ]
    for size in SIZES:
        found = (f"{1e3 * c.of(size, c.depth):.2f}" for c in (stock, quick))
        rows.append((f"a call, {size} token{'s' * (size > 1)}", *found))
    table(f"Costs of calls, {what}, ms", ("", "stock", "few rows faster"), rows)


def measure(model: Model, network: Network, prompts: Sequence[Sequence[int]]) -> None:
    """Interleaved runs on every prompt, the order turning from one prompt to the next.

    Single rows and prompts of 32 tokens take the stock product, in stock `generate` too.
    """
    sampling = Sampling(max_tokens=WRITTEN)
    told = forecast(network, prompts[:SEEN], sampling)
    setting, _ = told.best()
    draft, chosen = exit_draft(network, *setting), choose_draft(told, network)[0]
    ways: dict[str, Callable[[Sequence[int]], list[int]]] = {
        "stock generate": lambda row: _stock(network, row),
        "the same loop, no draft": lambda row: decode(network, row, sampling, PLAIN)[0],
        f"the best draft foreseen, {draft.what}": lambda row: decode(network, row, sampling, draft)[
            0
        ],
    }
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    same = dict.fromkeys(ways, True)
    for number, row in enumerate(prompts):
        texts = {}
        names = list(ways)[number % 3 :] + list(ways)[: number % 3]
        took: dict[str, list[float]] = {name: [] for name in ways}
        for name in names * TURNS:
            began = time.perf_counter()
            texts[name] = ways[name](row)
            took[name].append(time.perf_counter() - began)
        for name in ways:
            speeds[name].append(len(texts[name]) / statistics.median(took[name]))
            same[name] &= texts[name] == texts["stock generate"]
    stock, loop, drafted = speeds.values()
    rows = [
        ("the same loop over stock generate", "", _ratio(loop, stock)),
        (f"{draft.what} over the same loop", _told(told.speeds(setting)), _ratio(drafted, loop)),
        (f"{draft.what} over stock generate", "", _ratio(drafted, stock)),
    ]
    table(f"Speculation, {model.name} model, float32", ("tokens/s", "foreseen", "measured"), rows)
    print(f"\n`--speculate auto` takes {chosen.what if chosen else 'none'}.", flush=True)
    print(f"{len(prompts)} prompts; the same texts: {all(same.values())}.", flush=True)


def _stock(network: Network, row: Sequence[int]) -> list[int]:
    import torch

    return generate(network, torch.tensor([row]), max_tokens=WRITTEN).tokens[0]


def _ratio(above: Sequence[float], below: Sequence[float]) -> str:
    return _told([a / b for a, b in zip(above, below, strict=True)])


def _told(values: Sequence[float]) -> str:
    middle, low, high = median_interval(values)
    return f"{middle:.3f} [{low:.3f}, {high:.3f}]"


if __name__ == "__main__":
    main(sys.argv[1:])
