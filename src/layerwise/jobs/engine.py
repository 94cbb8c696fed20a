"""A GGUF file run by llama.cpp, against our own dequantized model."""

from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from torch import Tensor

from layerwise.core.checkpoint import read_header, read_tensor
from layerwise.core.errors import LayerwiseError
from layerwise.core.llama import Llama
from layerwise.core.machine import amount, available_memory
from layerwise.core.network import Network
from layerwise.core.task import answer
from layerwise.export._gguf_file import FILE, GgufFile
from layerwise.jobs.checks import CHECK, CHECKED

#: mean KL in nats per token, and share of positions whose likeliest token must agree
MOST_KL, LEAST_AGREE = 1e-3, 0.99


class Agreement(NamedTuple):
    """How near two models are over some positions: mean KL, same likeliest token, how many."""

    kl: float
    agree: float
    count: int

    def __str__(self) -> str:
        return (
            f"mean KL {self.kl:.1e} nats, {self.agree:.1%} of {self.count} likeliest tokens agree"
        )


def agreement(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> Agreement:
    """Mean KL(ours ‖ theirs) and top-1 agreement over the rows of some logits."""
    kl = same = count = 0.0
    for mine, other in zip(ours, theirs, strict=True):
        p, q = mine.double().log_softmax(-1), other.double().log_softmax(-1)
        kl += (p.exp() * (p - q)).sum().item()
        same += (mine.argmax(-1) == other.argmax(-1)).sum().item()
        count += len(mine)
    return Agreement(kl / count, same / count, int(count))


def run_engine(file: Path, batches: Sequence[Any]) -> list[Tensor]:
    """Logits of a GGUF file for batches of one row, as `answer` gives them."""
    length = max(batch["input_ids"].shape[1] for batch in batches)
    with Llama(file, length) as engine:
        return [_answered(batch, engine.logits) for batch in batches]


def _answered(batch: Any, logits: Callable[[list[int]], Tensor]) -> Tensor:
    rows = [logits(row.tolist()) for row in batch["input_ids"]]
    return answer(torch.stack(rows), batch)


def engine_checks(
    file: Path, batches: Sequence[Any], ours: Sequence[Tensor], least: float = LEAST_AGREE
) -> list[dict[str, Any]]:
    """llama.cpp against our dequantized model: with the file's weights unpacked, and as it is.

    Unpacked, both compute the same thing and must agree within the protocol's tolerance. As it
    is, llama.cpp rounds the inputs of every product to 8 bits, which is its own doing: the KL must
    stay within the tolerance, and the share of likeliest tokens is told.
    """
    with TemporaryDirectory(dir=file.parent) as folder:
        wide = Path(folder, FILE)
        GgufFile(file).unpack(wide)
        exact = agreement(ours, run_engine(wide, batches))
    packed = agreement(ours, run_engine(file, batches))
    limits = f"allowed {MOST_KL:.0e} and {least:.0%}"
    return [
        {
            "name": "llama.cpp gives the logits of our dequantized model, weights unpacked",
            "ok": exact.kl <= MOST_KL and exact.agree >= least,
            "found": f"{exact}; {limits}",
        },
        {
            "name": "llama.cpp on the packed file stays near our dequantized model",
            "ok": packed.kl <= MOST_KL,
            "found": f"{packed}; allowed {MOST_KL:.0e}, inputs rounded to 8 bits by llama.cpp",
        },
    ]


def must_run(folder: Path, network: Network, batch: Any) -> list[str]:
    """Run a written file in llama.cpp and refuse it if it computes anything else.

    Returns:
        What could not be checked, and why.

    Raises:
        LayerwiseError: its logits are not those that were computed while it was written.
    """
    wide = 4 * sum(p.numel() for p in network.model.parameters())
    room = available_memory()
    if room and 2 * wide > room:
        return [f"not run in llama.cpp as a check: that takes {amount(2 * wide)}"]
    held = {name: read_tensor(info) for name, info in read_header(folder / CHECK).items()}
    wanted = held.pop(CHECKED)
    # of a few tokens, one that leads by a hair decides nothing: what is wrong shows in the KL
    exact, packed = engine_checks(folder / FILE, [held], [wanted], least=0.0)
    if not exact["ok"]:
        raise LayerwiseError(
            f"{folder / FILE}",
            allowed=exact["name"],
            found=exact["found"],
            fix="this result is not sound and was not given its name; use --target hf",
        )
    return [] if packed["ok"] else [f"{packed['name']}: {packed['found']}"]
