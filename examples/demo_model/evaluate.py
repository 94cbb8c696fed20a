"""Measure the demo model on text that it never saw, beside a trigram fitted to the same text.

    python examples/demo_model/evaluate.py out/demo

Writes `evaluation.json`, and `loss.svg` where there is a `loss.json`, into the model's folder.

The text is the evaluate part of the standard library. A document is one row of tokens behind one
end mark, and every token after the mark is a target, exactly once and for both models. The
language model reads windows of 512 inputs that do not overlap (the last target of a window is
the first input of the next), so it sees 1 to 512 tokens of context. The trigram always sees the
two tokens before the target, across windows too: its memory is so short that cutting would only
handicap it. It is fitted to the calibrate part, which is what the language model was trained on.

The code tables in `encodings/` are a sixth of the tokens and nearly the same in every file, which
flatters any model; the second half of the table is without them.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from train import tokens_of
from transformers import AutoModelForCausalLM, AutoTokenizer
from trigram import Array, Trigram, codes_of

from layerwise.core.data import Document, stdlib_documents, use_of

LENGTH = 512
Spread = tuple[float, float, float]  # estimate, low and high end of its 95% interval


class Row(NamedTuple):
    """One line of the table."""

    model: str
    text: str
    tokens: int
    nats: Spread
    perplexity: Spread


def spread(items: list[Document], count: int | None) -> list[Document]:
    """`count` items at equal distances, so that no package of the library is preferred."""
    if count is None or count >= len(items):
        return items
    return [items[i] for i in np.linspace(0, len(items) - 1, count).round().astype(int)]


@torch.inference_mode()
def model_losses(model: torch.nn.Module, streams: list[Array], batch: int = 8) -> Array:
    """Summed loss of each document in nats."""
    windows = [
        (document, torch.from_numpy(stream[start : start + LENGTH + 1]))
        for document, stream in enumerate(streams)
        for start in range(0, len(stream) - 1, LENGTH)
    ]
    windows.sort(key=lambda w: len(w[1]))  # equal lengths meet, so little is padded
    losses = np.zeros(len(streams))
    for first in range(0, len(windows), batch):
        documents, rows = zip(*windows[first : first + batch], strict=True)
        # Causal attention never looks right, so padding there needs no mask but on the targets.
        ids = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=-100)
        logits = model(input_ids=ids[:, :-1].clamp(min=0), use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.mT, ids[:, 1:], reduction="none")
        np.add.at(losses, list(documents), loss.double().sum(1).numpy())
        print(f"\r{first + len(rows)} of {len(windows)} windows", end="", file=sys.stderr)
    print(file=sys.stderr)
    return losses


def trigram_losses(fit: list[Array], streams: list[Array], vocabulary: int) -> Array:
    trigram = Trigram(fit, vocabulary)
    end, (a, b, c) = int(fit[0][0]), map(int, fit[0][1:4])
    trigram.check([(end, end), (end, a), (a, b), (b, c), (a, end), (c, a)])
    return np.array(
        [-np.log(trigram.probability(codes_of([s], vocabulary))).sum() for s in streams]
    )


def resampled(values: Array, tokens: Array) -> Array:
    """Mean per token: first of the documents, then of 2000 draws of documents.

    The seed is fixed, so calls share their draws and may be compared draw by draw.
    """
    documents = len(tokens)
    draws = np.random.default_rng(0).multinomial(documents, [1 / documents] * documents, 2000)
    weights = np.vstack([np.ones((1, documents)), draws])
    return (weights @ values) / (weights @ tokens)


def interval(means: Array) -> Spread:
    """Estimate and 95% bootstrap interval."""
    low, high = np.quantile(means[1:], [0.025, 0.975])
    return float(means[0]), float(low), float(high)


def row(model: str, text: str, losses: Array, tokens: Array) -> Row:
    means = resampled(losses, tokens)
    return Row(model, text, int(tokens.sum()), interval(means), interval(np.exp(means)))


def running_mean(curve: Array, width: int) -> Array:
    sums = np.concatenate([[0.0], np.cumsum(curve)])
    last = np.arange(1, len(curve) + 1)
    first = np.maximum(last - width, 0)
    return (sums[last] - sums[first]) / (last - first)


def drawing(curve: Array) -> str:
    """The loss curve as SVG: running mean of 25 steps on labelled axes."""
    means = running_mean(curve, 25)
    low, high = np.floor(means.min()), np.ceil(means.max())
    x = 60 + 560 * np.arange(len(means)) / max(1, len(means) - 1)
    y = 280 - 260 * (means - low) / max(1.0, high - low)
    points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))
    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 640 330" font-family="sans-serif"'
        ' font-size="12">',
        '<rect width="640" height="330" fill="white"/>',
        '<path d="M60 20V280H620" fill="none" stroke="black"/>',
        '<text x="340" y="322" text-anchor="middle">step</text>',
        '<text x="-150" y="18" text-anchor="middle" transform="rotate(-90)">'
        "training loss, nats per token</text>",
    ]
    for value in np.arange(low, high + 1):
        at = 280 - 260 * (value - low) / max(1.0, high - low)
        parts.append(f'<text x="52" y="{at + 4:.0f}" text-anchor="end">{value:.0f}</text>')
        parts.append(f'<path d="M60 {at:.1f}H620" stroke="#ddd"/>')
    for share in (0, 0.25, 0.5, 0.75, 1):
        label = f"{share * len(means):.0f}"
        parts.append(
            f'<text x="{60 + 560 * share:.0f}" y="298" text-anchor="middle">{label}</text>'
        )
    parts.append(f'<polyline points="{points}" fill="none" stroke="#1f6feb" stroke-width="1.5"/>')
    return "\n".join([*parts, "</svg>\n"])


def compare(text: str, own: Array, trigram: Array, tokens: Array) -> tuple[list[Row], Spread]:
    """A row for each model, and how many times the trigram's perplexity is the higher one."""
    rows = [row("language model", text, own, tokens), row("trigram", text, trigram, tokens)]
    return rows, interval(np.exp(resampled(trigram - own, tokens)))


def report(rows: list[Row], ratio: Spread) -> str:
    lines = []
    for r in rows:
        estimate, low, high = r.perplexity
        lines.append(
            f"{r.text:<20}{r.model:<16}{r.tokens:>8}{r.nats[0]:>12.4f}"
            f"  {estimate:.2f} [{low:.2f}, {high:.2f}]"
        )
    lines.append("{:<20}trigram / model: {:.2f} [{:.2f}, {:.2f}]".format(rows[0].text, *ratio))
    return "\n".join(lines)


def options_of() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, nargs="?", default=Path("out/demo"))
    parser.add_argument("--documents", type=int, help="evaluate at most so many (default: all)")
    return parser.parse_args()


def main() -> None:
    options, began = options_of(), time.time()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    documents = list(stdlib_documents())
    calibrate = [d for d in documents if use_of(d.key) == "calibrate"]
    evaluate = [d for d in documents if use_of(d.key) == "evaluate"]
    evaluate = spread(evaluate, options.documents)
    fit, scored = (
        [tokens_of(tokenizer, [d.text]).numpy() for d in part] for part in (calibrate, evaluate)
    )
    tokens = np.array([len(stream) - 1 for stream in scored])

    trigram = trigram_losses(fit, scored, len(tokenizer))
    print(f"trigram done after {time.time() - began:.0f} s", file=sys.stderr)
    own = model_losses(model, scored)
    prose = np.array([not d.key.startswith("encodings/") for d in evaluate])
    result: dict[str, object] = {
        "documents": len(scored),
        "calibrate_tokens": sum(len(s) - 1 for s in fit),
    }
    print(f"{'text':<20}{'model':<16}{'tokens':>8}{'nats/token':>12}  perplexity [95%]")
    for text, part in {"all": prose | True, "without encodings/": prose}.items():
        rows, ratio = compare(text, own[part], trigram[part], tokens[part])
        print(report(rows, ratio))
        result[text] = {"rows": [r._asdict() for r in rows], "ratio": ratio}
    result["seconds"] = round(time.time() - began, 1)
    (options.model / "evaluation.json").write_text(json.dumps(result, indent=1))
    curve = options.model / "loss.json"
    if curve.exists():
        (options.model / "loss.svg").write_text(drawing(np.array(json.loads(curve.read_text()))))


if __name__ == "__main__":
    main()
