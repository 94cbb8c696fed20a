"""Models as stock transformers loads them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig

from layerwise.core.network import model_class
from layerwise.core.task import answer, forward_arguments


def load_stock(folder: Path, dtype: str, device: torch.device) -> nn.Module:
    """The model as stock transformers loads it."""
    config = AutoConfig.from_pretrained(folder)
    kind = model_class(config)
    module = kind.from_pretrained(folder, dtype=getattr(torch, dtype))
    return nn.Module.to(module, device).eval()


def answers_of(module: nn.Module) -> Callable[[Any], Tensor]:
    """Batch -> answer `[rows, classes]`, without a cache."""
    device = next(module.parameters()).device

    def run(batch: Any) -> Tensor:
        inputs = {k: v.to(device) for k, v in batch.items()}
        return answer(module(**forward_arguments(module, inputs)), batch)

    return run
