"""The same layers trained from scratch in several orders, which `layerwise.open` builds.

    python examples/orders/train.py            # reuse maps, of a language model
    python examples/orders/train.py digits     # one after the other, or all on one input

Reuse maps (arXiv:2505.01855) run layer `l` of a tiny Llama `r_l` times before the next one; all
of eight visits cost the same. The wide form (arXiv:2309.08414) lets all residual layers read one
input, `y = x + sum_l f_l(x)`, at the same number of parameters.
"""

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import layerwise
from layerwise.core.quality import ratio
from layerwise.core.visits import read_wiring

sys.path.insert(0, str(Path(__file__).parents[1]))
from demo_model.train import batches, optimizers_of, rate
from sharing.train import LENGTH, VOCABULARY, losses, texts

#: of the residual layers that read digits
RATE = 3e-3
#: what the maps of eight visits are compared with
EQUAL = "0*2,1*2,2*2,3*2"
ORDERS = (
    EQUAL,
    "0*4,1*2,2,3",
    "0*3,1*2,2*2,3",
    "0,1*2,2*2,3*3",
    "0,1,2*2,3*4",
    "0-3,0-3",
    "0-3",
    "0+1+2+3",
)


def untrained(folder: Path, seed: int) -> None:
    """Write four layers of 128 channels, without training."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def language(options: argparse.Namespace) -> None:
    """Print the loss of a language model by the order of its layers."""
    tokens, asked = texts(64)
    print("| order | visits | loss | over the first | seconds |", flush=True)
    print("|---|---:|---:|---:|---:|", flush=True)
    first: np.ndarray | None = None
    for order in options.orders:
        began, found, count = time.monotonic(), [], np.ones(1)
        for seed in range(options.seeds):
            with TemporaryDirectory() as folder:
                untrained(Path(folder), seed)
                wiring = {"decoder": read_wiring(order)}
                network = layerwise.open(folder, wiring=wiring, dtype="float32").load()
            model = network.model.requires_grad_(True).train()
            train(model, tokens, options)
            loss, count = losses(model.eval(), asked)
            found.append(loss)
        mean = np.mean(found, axis=0)
        rise = "" if first is None else str(ratio(mean - first, count))
        first = mean if first is None else first
        cells = f"{len(network.stack.layers)} | {ratio(mean, count)} | {rise}"
        print(f"| `{order}` | {cells} | {time.monotonic() - began:.0f} |", flush=True)


def train(model: LlamaForCausalLM, tokens: Tensor, options: argparse.Namespace) -> None:
    """By Muon and AdamW, as the demo model was trained; rates fall to zero."""
    optimizers = optimizers_of(model)
    peaks = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    generator = torch.Generator().manual_seed(0)
    for step in range(options.steps):
        inputs, targets = batches(tokens, LENGTH, options.tokens, generator)
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            optimizer.param_groups[0]["lr"] = peak * rate(step, options.steps)
        logits = model(input_ids=inputs, use_cache=False).logits
        F.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
        nn.utils.clip_grad_norm_(optimizers[1].param_groups[0]["params"], 1.0)
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad()


class Block(nn.Module):
    """`x + W_2 relu(W_1 norm(x))`."""

    def __init__(self, dim: int, depth: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(dim), nn.Linear(dim, dim), nn.Linear(dim, dim)
        with torch.no_grad():
            self.down.weight /= depth**0.5  # else what a wide form adds grows with its width

    def forward(self, x: Tensor) -> Tensor:
        """One residual layer."""
        return x + self.down(self.up(self.norm(x)).relu())


class Residual(nn.Module):
    """Pixels to ten digits, through residual layers of 64 channels."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(64, depth) for _ in range(depth))
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits `[batch, 10]`."""
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def runs(depth: int, options: argparse.Namespace) -> Iterator[list[tuple[float, float, float]]]:
    """Of every split: (loss trained on, loss held out, share right) deep, and wide."""
    given, target = load_digits(return_X_y=True)
    x, y = torch.tensor(given / 16, dtype=torch.float32), torch.tensor(target)
    for seed in range(options.seeds):
        torch.manual_seed(seed)
        mixed = torch.randperm(len(x))
        model, held, seen = Residual(depth), mixed[:400], mixed[400:]
        name = layerwise.open(model, inputs={"x": x[:2]}).stack.name
        start = {k: v.clone() for k, v in model.state_dict().items()}
        found = []
        for order in (list(range(depth)), [{"parallel": list(range(depth))}]):
            model.load_state_dict(start)
            network = layerwise.open(model, inputs={"x": x[:2]}, wiring={name: order})
            fit(network.module.train(), x[seen], y[seen], options)
            with torch.no_grad():
                one, other = network.module(x[seen]), network.module(x[held])
            right = (other.argmax(-1) == y[held]).float().mean().item()
            known, new = F.cross_entropy(one, y[seen]), F.cross_entropy(other, y[held])
            found.append((known.item(), new.item(), right))
        yield found


def fit(model: nn.Module, x: Tensor, y: Tensor, options: argparse.Namespace) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01)
    generator = torch.Generator().manual_seed(0)
    for step in range(options.steps):
        rows = torch.randint(len(x), (128,), generator=generator)
        optimizer.param_groups[0]["lr"] = RATE * (1 - step / options.steps)
        F.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
        optimizer.zero_grad()


def digits(options: argparse.Namespace) -> None:
    """Print losses of residual layers one after the other, and side by side."""
    print("| layers | | loss trained on | loss held out | right, held out |", flush=True)
    print("|---:|---|---:|---:|---:|", flush=True)
    for depth in (2, 4, 8, 16):
        found = np.array(list(runs(depth, options)))  # [split, order, figure]
        for name, rows in (
            ("one after the other", found[:, 0]),
            ("all on one input", found[:, 1]),
            ("the difference", found[:, 1] - found[:, 0]),
        ):
            cells = (str(ratio(column, np.ones(len(column)))) for column in rows.T)
            print(f"| {depth} | {name} | {' | '.join(cells)} |", flush=True)


def main(words: Sequence[str] | None = None) -> None:
    """Train what is asked for and print its table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="?", choices=("language", "digits"), default="language")
    parser.add_argument("--orders", nargs="*", default=ORDERS, help="as `run --wiring` has them")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--tokens", type=int, default=1024, help="of a step of a language model")
    parser.add_argument("--seeds", type=int, default=2)
    options = parser.parse_args(words)
    (digits if options.what == "digits" else language)(options)


if __name__ == "__main__":
    main()
