"""A GGUF file run by llama.cpp, against our own dequantized model."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from torch import Tensor

from layerwise.core.errors import LayerwiseError
from layerwise.core.llama import Llama
from layerwise.core.network import Network
from layerwise.core.quality import divergence
from layerwise.core.task import answer
from layerwise.export._gguf_file import FILE, GgufFile
from layerwise.jobs.checks import asked

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


def agreement(ours: Iterable[Tensor], theirs: Iterable[Tensor]) -> Agreement:
    """Mean KL(ours ‖ theirs) and top-1 agreement over the rows of some logits."""
    kl = same = count = 0.0
    for mine, other in zip(ours, theirs, strict=True):
        p, q = mine.double().log_softmax(-1), other.double().log_softmax(-1)
        kl += divergence(p, q).sum().item()
        same += (mine.argmax(-1) == other.argmax(-1)).sum().item()
        count += len(mine)
    return Agreement(kl / count, same / count, int(count))


@contextmanager
def in_llama(file: Path, batches: Sequence[Any]) -> Iterator[Callable[[Any], Tensor]]:
    """Batch -> logits of a GGUF file as llama.cpp runs it, as `answer` gives them."""
    length = max(batch["input_ids"].shape[1] for batch in batches)
    with Llama(file, length) as engine:
        yield lambda batch: _answered(batch, engine.logits)


def _answered(batch: Any, logits: Callable[[list[int]], Tensor]) -> Tensor:
    rows = [logits(row.tolist()) for row in batch["input_ids"]]
    return answer(torch.stack(rows), batch)


def _in_llama(file: Path, batches: Sequence[Any], ours: Sequence[Tensor]) -> Agreement:
    with in_llama(file, batches) as answers:
        return agreement(ours, map(answers, batches))


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
        exact = _in_llama(wide, batches, ours)
    packed = _in_llama(file, batches, ours)
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
        What llama.cpp itself does to the packed weights beyond the tolerance, or nothing.

    Raises:
        LayerwiseError: its logits are not those that were computed while it was written.
    """
    held, wanted = asked(folder)
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
