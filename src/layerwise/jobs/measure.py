"""Speed, memory and decoding of a loaded model."""

import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from layerwise.core.task import example_inputs, forward_arguments, takes_images
from layerwise.jobs.stock import answers_of, load_stock


def generates(module: nn.Module) -> bool:
    """Whether a model continues a sequence of tokens."""
    return isinstance(module, PreTrainedModel) and module.can_generate()


def greedy_tokens(module: nn.Module, ids: Tensor, count: int, cached: bool) -> Tensor:
    """Continue by the most likely token, stock `generate`, never stopping early."""
    device = next(module.parameters()).device
    with torch.no_grad():
        found = module.generate(  # type: ignore[operator]
            ids.to(device),
            attention_mask=torch.ones_like(ids, device=device),
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            use_cache=cached,
            pad_token_id=0,
        )
    config: Any = module.config
    return found[:, 1 if config.is_encoder_decoder else ids.shape[1] :].cpu()


def agrees_cached(module: nn.Module, ids: Tensor, count: int = 32) -> tuple[int, int]:
    """How many greedily decoded tokens are the same with and without a cache.

    They all are if one plain forward over them finds each the most likely; only where it does not
    are they decoded once more.
    """
    cached = greedy_tokens(module, ids, count, cached=True)
    if _most_likely(module, ids, cached):
        return cached.numel(), cached.numel()
    plain = greedy_tokens(module, ids, count, cached=False)
    same = int((cached == plain).long().cumprod(1).sum())
    return same, cached.numel()


def _most_likely(module: nn.Module, ids: Tensor, tokens: Tensor) -> bool:
    """Whether every token is the most likely one behind those before it, without a cache."""
    config: Any = module.config
    if config.is_encoder_decoder:
        return False  # its first token is up to the settings of `generate`
    whole = torch.cat([ids, tokens[:, :-1]], 1).to(next(module.parameters()).device)
    with torch.no_grad():
        output = module(**forward_arguments(module, {"input_ids": whole}))
    return torch.equal(output.logits[:, ids.shape[1] - 1 :].argmax(-1).cpu(), tokens)


def speeds(
    modules: Sequence[nn.Module], batches: Sequence[Any], repeats: int = 3
) -> list[tuple[float, float | None]]:
    """Median prefill and decode tokens per second of each model, interleaved; batch 1, 128 in.

    Models that do not generate are timed on the first batch: tokens or images per second.
    """
    if not generates(modules[0]):
        return [(speed, None) for speed in _passes(modules, batches[0], repeats)]
    ids = torch.cat([b["input_ids"] for b in batches if b["input_ids"].shape[0] == 1], 1)[:, :128]
    prefill: list[list[float]] = [[] for _ in modules]
    decode: list[list[float]] = [[] for _ in modules]
    for _ in range(repeats):
        for number, module in enumerate(modules):
            began = time.perf_counter()
            greedy_tokens(module, ids, 1, cached=True)
            middle = time.perf_counter()
            greedy_tokens(module, ids, 33, cached=True)
            ended = time.perf_counter()
            prefill[number].append(ids.shape[1] / (middle - began))
            decode[number].append(32 / max(ended - middle - (middle - began), 1e-9))
    return [
        (statistics.median(p), statistics.median(d)) for p, d in zip(prefill, decode, strict=True)
    ]


def _passes(modules: Sequence[nn.Module], batch: Any, repeats: int) -> list[float]:
    main = batch["pixel_values"][:, 0, 0, 0] if "pixel_values" in batch else batch["input_ids"]
    times: list[list[float]] = [[] for _ in modules]
    for _ in range(repeats):
        for number, module in enumerate(modules):
            began = time.perf_counter()
            with torch.no_grad():
                answers_of(module)(batch)
            times[number].append(main.numel() / (time.perf_counter() - began))
    return [statistics.median(found) for found in times]


def peak_memory(folder: Path, dtype: str) -> int | None:
    """Peak anonymous memory of a fresh process that loads the model and runs a small batch."""
    command = [sys.executable, "-m", "layerwise.jobs.measure", str(folder), dtype]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    last = found.stdout.strip().splitlines()[-1:] or [""]
    return int(last[0]) if last[0].isdigit() else None


def anonymous_bytes() -> int:
    """Anonymous resident memory of this process; 0 where the system does not tell."""
    try:
        text = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    lines = [line for line in text.splitlines() if line.startswith("RssAnon")]
    return int(lines[0].split()[1]) * 1024 if lines else 0


class PeakMemory:
    """Samples anonymous memory from a thread while a block runs."""

    def __init__(self) -> None:
        self.peak = self.start = anonymous_bytes()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def _sample(self) -> None:
        while not self._stop.wait(0.005):
            self.peak = max(self.peak, anonymous_bytes())

    def __enter__(self) -> "PeakMemory":
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()
        self.peak = max(self.peak, anonymous_bytes())


def _main(folder: str, dtype: str) -> None:
    with PeakMemory() as memory, torch.no_grad():
        module = load_stock(Path(folder), dtype, torch.device("cpu"))
        inputs = example_inputs(module)
        if not takes_images(module):
            inputs = {key: ids.repeat(1, 16) for key, ids in inputs.items()}
        answers_of(module)(inputs)
    print(memory.peak - memory.start)


if __name__ == "__main__":
    _main(*sys.argv[1:])
