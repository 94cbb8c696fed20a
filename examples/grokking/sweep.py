"""Weight decay and grokking: two readouts of attention heads, and the boundary between regimes.

    python examples/grokking/sweep.py                    about four minutes on one core
    python examples/grokking/sweep.py --decays 0.01 1    two of them

A transformer of 2 layers and 4 heads learns to add modulo a prime from a part of all pairs, once
per weight decay and seed. At the end of each run `layerwise inspect`'s measures of the heads say
how alike they are and how spread out they look, and a logistic curve is fitted to the share of runs
that came to know the other pairs. After arXiv:2605.20441 (4 layers, 8 heads, width 128, 20000
steps), far smaller; by its author's later note the readouts are no detector of grokking.
"""

import argparse
from typing import NamedTuple

import torch
import transformers as t
from torch import Tensor
from torch.nn.functional import cross_entropy

import layerwise
from layerwise.describe.boundary import logistic_boundary
from layerwise.jobs.inspect import inspect_model
from layerwise.jobs.wanted import Wanted


class Pairs(NamedTuple):
    """Sums modulo a prime: `a b =` and the answer, of which some are learned from."""

    ids: Tensor
    answers: Tensor
    train: Tensor
    test: Tensor


def pairs(prime: int, share: float, seed: int) -> Pairs:
    a, b = torch.meshgrid(torch.arange(prime), torch.arange(prime), indexing="ij")
    ids = torch.stack([a.flatten(), b.flatten(), torch.full((prime**2,), prime)], 1)
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))
    cut = int(share * len(ids))
    return Pairs(ids, ids[:, :2].sum(1) % prime, order[:cut], order[cut:])


def network(prime: int, seed: int) -> t.LlamaForCausalLM:
    torch.manual_seed(seed)
    config = t.LlamaConfig(
        vocab_size=prime + 1,
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=8,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
    )
    return t.LlamaForCausalLM(config)


def accuracy(model: t.LlamaForCausalLM, data: Pairs, rows: Tensor) -> float:
    with torch.no_grad():
        logits = model(data.ids[rows]).logits[:, -1]
    return (logits.argmax(-1) == data.answers[rows]).float().mean().item()


def trained(data: Pairs, prime: int, decay: float, seed: int, steps: int) -> tuple:
    """A model after its training, and the first step at which it knew the other pairs."""
    model, reached = network(prime, seed), 0
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=2e-3, weight_decay=decay, betas=(0.9, 0.98)
    )
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        logits = model(data.ids[data.train]).logits[:, -1]
        cross_entropy(logits, data.answers[data.train]).backward()
        optimizer.step()
        if step % 50 == 0 and accuracy(model, data, data.test) > 0.95:
            reached = step
            break
    return model.eval(), reached


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--decays", type=float, nargs="+", default=[0.03, 0.1, 0.3, 1.0, 3.0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--prime", type=int, default=23)
    parser.add_argument("--share", type=float, default=0.6)
    given = parser.parse_args()
    amounts, hits = [], []
    print("decay  seed  train  test   step  head cosine  entropy  spread of entropy", flush=True)
    for decay in given.decays:
        for seed in range(given.seeds):
            data = pairs(given.prime, given.share, seed)
            model, reached = trained(data, given.prime, decay, seed, given.steps)
            batch = {"input_ids": data.ids[data.test]}
            opened = layerwise.open(model)
            rows = inspect_model(opened, [batch], Wanted(("head_patterns",))).rows
            names = ("cosine", "entropy", "entropy_spread")
            found = [sum(r[f"head_patterns.{n}"] for r in rows) / len(rows) for n in names]
            shown = [accuracy(model, data, part) for part in (data.train, data.test)]
            print(
                f"{decay:<6g} {seed:<5} {shown[0]:.2f}   {shown[1]:.2f}   {reached or '-':<5} "
                f"{found[0]:<12.3f} {found[1]:<8.3f} {found[2]:.3f}",
                flush=True,
            )
            amounts.append(decay)
            hits.append(reached > 0)
    boundary = logistic_boundary(amounts, hits)
    low, high = boundary.interval
    print(
        f"half of the runs reach it at a decay of {boundary.critical:.3g} "
        f"({low:.3g} to {high:.3g}), steepness {boundary.steepness:.3g}"
    )


if __name__ == "__main__":
    main()
