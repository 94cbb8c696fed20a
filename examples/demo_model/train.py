"""Train the language model that ships with layerwise: Llama-shaped, 7.6 M parameters.

    python examples/demo_model/train.py --out out/demo --steps 1500

The text is the calibrate part of the running interpreter's standard library; nothing of the
select and evaluate parts is seen, by the tokenizer either. Training resumes from the last
checkpoint in `--out`. `evaluate.py` beside this file measures the result.
"""

import argparse
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, final

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from layerwise.core.data import stdlib_documents, use_of

END = "<|endoftext|>"


def make_tokenizer(texts: list[str], size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE with GPT-2's word pattern, which every engine knows."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END, eos_token=END, model_max_length=512
    )


def tokens_of(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    """All texts in one row, each after one end mark."""
    ids = [i for text in texts for i in (tokenizer.bos_token_id, *tokenizer(text)["input_ids"])]
    return torch.tensor(ids)


def orthogonalise(gradients: torch.Tensor) -> torch.Tensor:
    """Newton-Schulz steps towards the nearest orthogonal matrices of a batch (Jordan, 2024)."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = gradients.shape[1] > gradients.shape[2]
    x = gradients.mT if tall else gradients
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum made orthogonal, for matrices; equal shapes are stepped as one batch."""

    def __init__(self, params, lr: float, momentum: float = 0.95, weight_decay: float = 0.1):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[torch.Tensor]] = {}
            for p in group["params"]:
                if p.grad is not None:  # a layer that was left out has none
                    by_shape.setdefault(p.shape, []).append(p)
            for shape, params in by_shape.items():
                updates = []
                for p in params:
                    buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
                    buffer.lerp_(p.grad, 1 - group["momentum"])
                    updates.append(p.grad.lerp(buffer, group["momentum"]))
                scale = 0.2 * math.sqrt(max(shape))
                for p, update in zip(params, orthogonalise(torch.stack(updates)), strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(update, alpha=-group["lr"] * scale)


def batches(tokens: torch.Tensor, length: int, count: int, generator: torch.Generator):
    """Windows at random offsets, `count` tokens a batch."""
    starts = torch.randint(len(tokens) - length - 1, (count // length,), generator=generator)
    windows = torch.stack([tokens[s : s + length + 1] for s in starts])
    return windows[:, :-1], windows[:, 1:]


def rate(step: int, steps: int) -> float:
    """Warm up over 50 steps, then fall linearly to zero."""
    warm = min(50, steps // 2)
    return min((step + 1) / max(1, warm), (steps - step) / (steps - warm))


def optimizers_of(model: PreTrainedModel) -> tuple[Muon, torch.optim.AdamW]:
    """Muon for the matrices of the layers, AdamW for embeddings (tied head too), norms, biases."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    matrices, others = [], []
    for p in model.parameters():
        (matrices if p.ndim == 2 and id(p) not in embeddings else others).append(p)
    return (
        Muon(matrices, lr=4e-3),
        torch.optim.AdamW(others, lr=4e-3, betas=(0.9, 0.95), weight_decay=0.0),
    )


@final
class Run(NamedTuple):
    """What a checkpoint holds, and the place of the checkpoint."""

    checkpoint: Path
    model: PreTrainedModel
    optimizers: Sequence[torch.optim.Optimizer]
    generator: torch.Generator
    curve: list[float]

    def resume(self) -> None:
        if not self.checkpoint.exists():
            return
        state = torch.load(self.checkpoint, weights_only=True)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.generator.set_state(state["generator"])
        self.curve.extend(state["curve"])
        print(f"resumed at step {state['step']}", flush=True)

    def save(self) -> None:
        state = {
            "model": self.model.state_dict(),
            "optimizers": [o.state_dict() for o in self.optimizers],
            "generator": self.generator.get_state(),
            "step": len(self.curve),
            "curve": self.curve,
        }
        torch.save(state, self.checkpoint.with_suffix(".part"))
        self.checkpoint.with_suffix(".part").replace(self.checkpoint)

    def step(self, inputs: torch.Tensor, targets: torch.Tensor) -> None:
        device = self.model.device
        logits = self.model(input_ids=inputs.to(device), use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.to(device).flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.optimizers[1].param_groups[0]["params"], 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
        self.model.zero_grad()
        self.curve.append(round(loss.item(), 4))


def train(
    model: PreTrainedModel, tokens: torch.Tensor, options: argparse.Namespace, short: float = 0.7
) -> list[float]:
    """Train up to `options.steps`, the first `short` of them on windows of 256; the loss curve."""
    optimizers = optimizers_of(model)
    peaks = [o.param_groups[0]["lr"] for o in optimizers]
    generator = torch.Generator().manual_seed(0)
    run = Run(options.out / "checkpoint.pt", model, optimizers, generator, [])
    run.resume()
    start, began = len(run.curve), time.time()
    for step in range(start, options.steps):
        length = 256 if step < short * options.steps else 512
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = peak * rate(step, options.steps)
        run.step(*batches(tokens, length, options.tokens, generator))
        if (step + 1) % 10 == 0:
            speed = (step + 1 - start) * options.tokens / (time.time() - began)
            loss = sum(run.curve[-10:]) / 10
            print(f"{step + 1} loss {loss:.3f} {speed:.0f} tokens/s", flush=True)
        if (step + 1) % 50 == 0 or step + 1 == options.steps:
            run.save()
    return run.curve


def options_of(description: str | None) -> argparse.Namespace:
    """The options that all training scripts share; makes the output folder, sets the seed."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--tokens", type=int, default=4096, help="tokens a step")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    return options


def save(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, out: Path, curve: list[float]
) -> None:
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    (out / "loss.json").write_text(json.dumps(curve))


def llama(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=2048,
            hidden_size=256,
            intermediate_size=512,
            num_hidden_layers=12,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def main() -> None:
    options = options_of(__doc__)
    texts = [d.text for d in stdlib_documents() if use_of(d.key) == "calibrate"]
    tokenizer = make_tokenizer(texts, 2048)
    tokens = tokens_of(tokenizer, texts)
    model = llama(tokenizer).to(options.device)
    print(f"{len(tokens)} tokens, {model.num_parameters()} parameters", flush=True)
    save(model, tokenizer, options.out, train(model, tokens, options))


if __name__ == "__main__":
    main()
