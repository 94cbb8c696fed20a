"""Continue training the demo model so that its early layers can answer: LayerSkip's recipe.

    python examples/layerskip/train.py --out out/layerskip --minutes 10

Two things are added to plain training on the standard library's text. Layers are left out at
random, the later the more often, and the shared norm and head also answer after some earlier
layers, which counts in the loss. Only the calibrate part of the text is seen.
"""

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoTokenizer, LlamaForCausalLM

from layerwise.core.data import stdlib_documents, use_of
from layerwise.core.folder import demo_folder

sys.path.insert(0, str(Path(__file__).parents[1]))
from demo_model.train import batches, optimizers_of, save, tokens_of


def dropout_rates(depth: int, most: float) -> list[float]:
    """How often each layer is left out: `p_l = most (e^(l ln 2 / (L - 1)) - 1)`.

    >>> [round(p, 3) for p in dropout_rates(5, 1.0)]
    [0.0, 0.189, 0.414, 0.682, 1.0]
    """
    return [most * (math.exp(layer * math.log(2) / (depth - 1)) - 1) for layer in range(depth)]


def exit_weights(exits: Sequence[int], depth: int, scale: float, equal: bool) -> list[float]:
    """What the loss after each exit counts, summing to 1; exits are numbers of layers run.

    As published with `l = exit - 1`: `scale l (l + 1) / 2`, and for the last layer `L - 1` more
    than `scale (L - 2)(L - 1) / 2`. With `equal` the last one counts as much as all others.

    >>> [round(w, 3) for w in exit_weights([4, 8], 8, 1.0, False)]
    [0.176, 0.824]
    >>> exit_weights([2, 4, 8], 8, 1.0, True)
    [0.25, 0.25, 0.5]
    """
    if equal:
        early = len(exits) - 1
        return [0.5 if e == depth else 0.5 / early for e in exits] if early else [1.0]
    last = depth - 1
    raw = [
        last + scale * (last - 1) * last / 2 if e == depth else scale * (e - 1) * e / 2
        for e in exits
    ]
    return [w / sum(raw) for w in raw]


def exits_at(step: int, depth: int, every: int, among: Sequence[int] = ()) -> list[int]:
    """The exits of a step: one in `every` of them, moved on by one each step, and the last.

    >>> exits_at(0, 8, 4), exits_at(1, 8, 4), exits_at(1, 8, 2, [1, 2])
    ([1, 5, 8], [2, 6, 8], [2, 8])
    """
    found = among or range(1, depth)
    return [e for i, e in enumerate(found) if i % every == step % every] + [depth]


def dropped(
    own: Callable[..., Tensor], rate: float, states: dict[int, Tensor], number: int, generator: Any
) -> Callable[..., Tensor]:
    """A layer that each sample leaves out at a rate, and that keeps what it returned."""

    def run(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        keep = (torch.rand(len(x), generator=generator) >= rate).nonzero()[:, 0].to(x.device)
        out = x if not len(keep) else own(x[keep], *args, **kwargs)
        if 0 < len(keep) < len(x):
            out = x.index_copy(0, keep, out)
        states[number] = out
        return out

    return run


def loss_of(
    model: LlamaForCausalLM,
    states: dict[int, Tensor],
    targets: Tensor,
    weights: dict[int, float],
    taught: bool,
) -> Tensor:
    """Cross-entropy after every exit, by the shared norm and head, weighted.

    Early exits are held against the text, or `taught` by what the last layer answers.
    """
    last = max(weights)
    logits = {e: model.lm_head(model.model.norm(states[e])).flatten(0, 1) for e in weights}
    answer = logits[last].detach().softmax(-1) if taught else targets.flatten()
    total = weights[last] * F.cross_entropy(logits[last], targets.flatten())
    for number, weight in weights.items():
        if number != last:
            total = total + weight * F.cross_entropy(logits[number], answer)
    return total


def train(model: LlamaForCausalLM, tokens: Tensor, options: argparse.Namespace) -> list[float]:
    """Train until the time is over; rates fall with the time that is left."""
    layers: Any = model.model.layers
    depth, states = len(layers), {}
    generator = torch.Generator().manual_seed(0)
    rates = dropout_rates(depth, options.dropout)
    for number, (layer, rate) in enumerate(zip(layers, rates, strict=True), 1):
        vars(layer)["forward"] = dropped(layer.forward, rate, states, number, generator)
    optimizers = optimizers_of(model)
    peaks = [options.rate * o.param_groups[0]["lr"] for o in optimizers]
    began, curve, spent = time.monotonic(), [], 0.0
    while spent < 1:
        windows = batches(tokens, 256, options.tokens, generator)
        inputs, targets = (ids.to(options.device) for ids in windows)
        exits = exits_at(len(curve), depth, options.every, options.exits)
        weights = exit_weights(exits, depth, options.scale, options.equal)
        warm = min(1.0, (len(curve) + 1) / 20)
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = peak * warm * (1 - spent)
        model(input_ids=inputs, use_cache=False, logits_to_keep=1)
        counts = dict(zip(exits, weights, strict=True))
        loss = loss_of(model, states, targets, counts, options.taught)
        loss.backward()
        nn.utils.clip_grad_norm_(optimizers[1].param_groups[0]["params"], 1.0)
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad()
        curve.append(round(loss.item(), 4))
        spent = (time.monotonic() - began) / (60 * options.minutes)
        if len(curve) % 10 == 0:
            print(f"{len(curve)} loss {sum(curve[-10:]) / 10:.3f} {spent:.0%}", flush=True)
    for layer in layers:
        vars(layer).pop("forward")
    return curve


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--tokens", type=int, default=2048, help="tokens a step")
    parser.add_argument("--dropout", type=float, default=0.1, help="of the last layer")
    parser.add_argument("--every", type=int, default=4, help="one in so many exits a step")
    parser.add_argument("--exits", type=int, nargs="*", default=(), help="these alone; all without")
    parser.add_argument("--scale", type=float, default=1.0, help="of the early exits' losses")
    parser.add_argument("--equal", action="store_true", help="early exits count like the last")
    parser.add_argument("--taught", action="store_true", help="by the last layer, not the text")
    parser.add_argument("--rate", type=float, default=0.25, help="of the rates of a first training")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(demo_folder())
    model = LlamaForCausalLM.from_pretrained(demo_folder(), dtype=torch.float32)
    texts = [d.text for d in stdlib_documents() if use_of(d.key) == "calibrate"]
    tokens = tokens_of(tokenizer, texts)
    curve = train(model.train().to(options.device), tokens, options)
    print(f"{len(curve)} steps of {options.tokens} tokens", flush=True)
    save(model, tokenizer, options.out, curve)


if __name__ == "__main__":
    main()
