"""One layer shared by all visits: what experts in its feed-forward part change.

    python examples/sharing/train.py

Tiny Llama-shaped models, six visits of one layer, are trained on the standard library's text, each
for as many steps, and asked about documents that none of them saw. One compares experts of own
matrices with a dense part of the same active size, and norms of every visit with shared ones
(arXiv:2107.11817); one puts experts of low rank on the shared part (arXiv:2512.12880), and merges
them in the end.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from layerwise.core.data import stdlib_documents, use_of
from layerwise.core.folder import demo_folder
from layerwise.core.quality import ratio
from layerwise.slot.mixture import FeedForward, MixtureSlot, expert_parts, low_rank_experts, merged

sys.path.insert(0, str(Path(__file__).parents[1]))
from demo_model.train import batches, tokens_of

DIM, WIDTH, VISITS, LENGTH, VOCABULARY = 128, 256, 6, 128, 2048
#: of the loss that keeps experts in use
BALANCE = 0.01


def shared_model(part: Callable[[LlamaConfig], nn.Module], own_norms: bool) -> LlamaForCausalLM:
    """Six visits of one layer: attention and feed-forward part shared, norms perhaps not."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=DIM,
        intermediate_size=WIDTH,
        num_hidden_layers=VISITS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    layers: Any = model.model.layers
    mlp = part(config)
    for layer in layers:
        layer.self_attn, layer.mlp = layers[0].self_attn, mlp
        if not own_norms:
            layer.input_layernorm = layers[0].input_layernorm
            layer.post_attention_layernorm = layers[0].post_attention_layernorm
    return model


def with_experts(model: LlamaForCausalLM, visits: tuple[int, ...], **options: Any) -> None:
    """Put low-rank experts on the shared part, at some visits, each with its own."""
    layers: Any = model.model.layers
    own: Any = layers[0].mlp
    for visit in visits:
        slot = low_rank_experts(model.config, **options)
        for expert in slot.experts:
            expert.shared = own  # type: ignore[union-attr]
        layers[visit].mlp = slot


def texts(documents: int) -> tuple[Tensor, list[Tensor]]:
    """The calibrate part in one row, and the beginnings of some documents of the evaluate part."""
    tokenizer = AutoTokenizer.from_pretrained(demo_folder())
    found: dict[str, list[str]] = {use: [] for use in ("calibrate", "select", "evaluate")}
    for document in stdlib_documents():
        found[use_of(document.key)].append(document.text)
    asked = [tokens_of(tokenizer, [text])[: LENGTH + 1] for text in found["evaluate"]]
    return tokens_of(tokenizer, found["calibrate"]), [a for a in asked if len(a) > 1][:documents]


def slots(model: nn.Module) -> list[MixtureSlot]:
    return [module for module in model.modules() if isinstance(module, MixtureSlot)]


def train(model: LlamaForCausalLM, tokens: Tensor, steps: int, rate: float) -> None:
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    for step in range(steps):
        inputs, targets = batches(tokens, LENGTH, 8 * LENGTH, generator)
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 20) * (1 - step / steps)
        logits = model(input_ids=inputs, use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        (loss + BALANCE * sum(slot.balance for slot in slots(model))).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def losses(model: LlamaForCausalLM, documents: list[Tensor]) -> tuple[np.ndarray, np.ndarray]:
    """Loss in nats and tokens of every document."""
    found = []
    for ids in documents:
        logits = model(input_ids=ids[None, :-1], use_cache=False).logits[0]
        found.append((F.cross_entropy(logits, ids[1:], reduction="sum").item(), len(ids) - 1))
    loss, count = np.array(found).T
    return loss, count


def sizes(model: LlamaForCausalLM) -> tuple[int, int]:
    """Parameters outside of the embedding, and of the feed-forward part that a token runs."""
    whole = sum(p.numel() for p in model.parameters()) - VOCABULARY * DIM
    layers: Any = model.model.layers
    active = 0
    for layer in layers:
        part = layer.mlp
        if isinstance(part, FeedForward):
            active += sum(p.numel() for p in part.parameters())
            continue
        expert = sum(p.numel() for p in part.experts[0].parameters())
        active += part.active * expert + part.router.weight.numel()
    return whole, active // len(layers)


def compared() -> Iterator[tuple[str, LlamaForCausalLM]]:
    """The networks to train, by name."""
    dense = lambda config: FeedForward(DIM, WIDTH)  # noqa: E731
    experts = partial(expert_parts, count=4, active=2)  # each of half the width
    yield "one part, own norms", shared_model(dense, True)
    yield "one part, shared norms", shared_model(dense, False)
    yield "experts, own norms", shared_model(experts, True)
    yield "experts, shared norms", shared_model(experts, False)
    for mix in ("outputs", "weights"):
        model = shared_model(dense, True)
        with_experts(model, (2, 3), count=4, active=2, rank=8, mix=mix)
        yield f"low-rank experts at two visits, {mix} mixed", model


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=300, help="of every network")
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--documents", type=int, default=64)
    parser.add_argument("--only", action="append", help="networks whose names begin so")
    options = parser.parse_args()
    tokens, asked = texts(options.documents)
    print("| network | parameters | active | loss | over the first | seconds |", flush=True)
    print("|---|---:|---:|---:|---:|---:|", flush=True)
    first: np.ndarray | None = None
    for name, model in compared():
        if not name.startswith(tuple(options.only or [""])):
            continue
        began = time.monotonic()
        train(model, tokens, options.steps, options.rate)
        seconds = time.monotonic() - began
        first = tell(name, model, asked, first, f"{seconds:.0f}")
        if name.startswith("low-rank"):
            layers: Any = model.model.layers
            for rank in (8, 32):
                kept = [layer.mlp for layer in layers]
                for layer in layers:
                    if isinstance(layer.mlp, MixtureSlot):
                        layer.mlp = merged(layer.mlp, rank)
                tell(f"... merged, rank {rank}", model, asked, first, "")
                for layer, part in zip(layers, kept, strict=True):
                    layer.mlp = part


def tell(
    name: str,
    model: LlamaForCausalLM,
    asked: list[Tensor],
    first: np.ndarray | None,
    seconds: str,
) -> np.ndarray:
    """Print the row of a network; gives the losses that the others are compared with."""
    model.eval()
    loss, count = losses(model, asked)
    whole, active = sizes(model)
    rise = "" if first is None else str(ratio(loss - first, count))
    cells = f"{whole:,} | {active:,} | {ratio(loss, count)} | {rise} | {seconds}"
    print(f"| {name} | {cells} |", flush=True)
    return loss if first is None else first


if __name__ == "__main__":
    main()
