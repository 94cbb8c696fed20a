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
from layerwise.core.task import answer, token_rows
from layerwise.export._gguf_file import FILE, GgufFile
from layerwise.export._gguf_models import known, sees_all
from layerwise.jobs.checks import asked

#: mean KL in nats per token, and share of positions whose likeliest token must agree
MOST_KL, LEAST_AGREE = 1e-3, 0.99
#: of what embeds: mean distance of a token's hidden state from ours by the length of ours, where
#: llama.cpp computes as we do, where it takes GELU from a table of halves or keeps keys and values
#: as such, and of packed files; the worst token may be so many times as far off
EXACT_OFF, ROUGH_OFF, PACKED_OFF, WORST = 1e-3, 1e-2, 5e-2, 5


class Agreement(NamedTuple):
    """How near two models are over some positions: mean KL, same likeliest token, how many."""

    kl: float
    agree: float
    count: int
    what = "logits"

    def exact(self, least: float) -> tuple[bool, str]:
        """Whether they compute the same, and what is allowed."""
        ok = self.kl <= MOST_KL and self.agree >= least
        return ok, f"{MOST_KL:.0e} and {least:.0%}"

    def near(self) -> tuple[bool, str]:
        """Whether they do but for how inputs are rounded, and what is allowed."""
        return self.kl <= MOST_KL, f"{MOST_KL:.0e}"

    def __str__(self) -> str:
        return (
            f"mean KL {self.kl:.1e} nats, {self.agree:.1%} of {self.count} likeliest tokens agree"
        )


class Distance(NamedTuple):
    """How near hidden states are, each by the length of ours: on average, at worst, how many."""

    mean: float
    worst: float
    count: int
    what = "hidden states"

    def exact(self, most: float) -> tuple[bool, str]:
        """Whether they are the same, and what is allowed."""
        ok = self.mean <= most and self.worst <= WORST * most
        return ok, f"{most:.0e} and {WORST * most:.0e}"

    def near(self) -> tuple[bool, str]:
        """Whether they are but for how inputs are rounded, and what is allowed."""
        return self.mean <= PACKED_OFF, f"{PACKED_OFF:.0e} on average"

    def __str__(self) -> str:
        return f"{self.count} states off by {self.mean:.1e} on average, {self.worst:.1e} at worst"


def distance(ours: Iterable[Tensor], theirs: Iterable[Tensor]) -> Distance:
    """`||theirs - ours|| / ||ours||` over the rows of some hidden states."""
    pairs = list(zip(ours, theirs, strict=True))
    off = torch.cat(
        [(b.double() - a.double()).norm(dim=-1) / a.double().norm(dim=-1) for a, b in pairs]
    )
    return Distance(off.mean().item(), off.max().item(), len(off))


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
def in_llama(
    file: Path,
    batches: Sequence[Any],
    read: Callable[[Any, Any], Tensor] = answer,
    embeds: bool = False,
) -> Iterator[Callable[[Any], Tensor]]:
    """Batch -> what `read` makes of the output for it of a GGUF file as llama.cpp runs it: of
    logits, or of hidden states where it `embeds` or is an encoder.
    """
    asked = ("input_ids", "decoder_input_ids")
    length = max(ids.shape[1] for batch in batches for name, ids in batch.items() if name in asked)
    with Llama(file, length) as engine:
        states = embeds or engine.embeds()
        yield lambda batch: read(_output(batch, engine, states), batch)


def _output(batch: Any, engine: Llama, embeds: bool) -> Any:
    """Logits, or last hidden states, as a network gives them; zeros where a row is padded."""
    ids = batch["input_ids"]
    kept = batch.get("attention_mask", torch.ones_like(ids)).bool()
    if "decoder_input_ids" in batch:
        pairs = zip(ids, kept, batch["decoder_input_ids"], strict=True)
        found = [engine.answers(row[own].tolist(), target.tolist()) for row, own, target in pairs]
        return {"logits": torch.stack(found)}
    run = engine.states if embeds else engine.logits
    rows = [run(row[own].tolist()) for row, own in zip(ids, kept, strict=True)]
    found = rows[0].new_zeros(*ids.shape, rows[0].shape[-1])  # [inputs, seq, width]
    found[kept] = torch.cat(rows)
    return {"last_hidden_state": found} if embeds else found


def _in_llama(
    file: Path,
    batches: Sequence[Any],
    ours: Sequence[Tensor],
    measure: Callable[[Iterable[Tensor], Iterable[Tensor]], Any],
) -> Any:
    with in_llama(file, batches, token_rows, measure is distance) as answers:
        return measure(ours, map(answers, batches))


def engine_checks(
    file: Path,
    batches: Sequence[Any],
    ours: Sequence[Tensor],
    least: float = LEAST_AGREE,
    off: float = 0.0,
) -> list[dict[str, Any]]:
    """llama.cpp against our dequantized model: with the file's weights unpacked, and as it is.

    Unpacked, both compute the same thing and must agree within the protocol's tolerance. As it
    is, llama.cpp rounds the inputs of every product to 8 bits, which is its own doing: the KL must
    stay within the tolerance, and the share of likeliest tokens is told.

    Args:
        file: the GGUF file.
        batches: what both are asked.
        ours: what our model gives for each, as `token_rows` reads it.
        least: share of positions whose likeliest token must agree.
        off: of what embeds, whose hidden states are compared: their mean distance.
    """
    measure, allowed = (distance, off) if off else (agreement, least)
    with TemporaryDirectory(dir=file.parent) as folder:
        wide = Path(folder, FILE)
        GgufFile(file).unpack(wide)
        exact = _in_llama(wide, batches, ours, measure)
    packed = _in_llama(file, batches, ours, measure)
    (same, limits), (near, limit) = exact.exact(allowed), packed.near()
    return [
        {
            "name": f"llama.cpp gives the {exact.what} of our dequantized model, weights unpacked",
            "ok": same,
            "found": f"{exact}; allowed {limits}",
        },
        {
            "name": "llama.cpp on the packed file stays near our dequantized model",
            "ok": near,
            "found": f"{packed}; allowed {limit}, inputs rounded to 8 bits by llama.cpp",
        },
    ]


def off_of(network: Network) -> float:
    """How far hidden states may be off; 0 where logits are compared."""
    rough = ROUGH_OFF if known(network).rough or not sees_all(network) else EXACT_OFF
    return rough if network.task == "embed" else 0.0


def must_run(folder: Path, network: Network, batch: Any) -> list[str]:
    """Run a written file in llama.cpp and refuse it if it computes anything else.

    Returns:
        What llama.cpp itself does to the packed weights beyond the tolerance, or nothing.

    Raises:
        LayerwiseError: its logits, or hidden states, are not those that were computed while it was
            written.
    """
    held, wanted = asked(folder)
    # of a few tokens, one that leads by a hair decides nothing: what is wrong shows in the KL
    exact, packed = engine_checks(folder / FILE, [held], [wanted], 0.0, off_of(network))
    if not exact["ok"]:
        raise LayerwiseError(
            f"{folder / FILE}",
            allowed=exact["name"],
            found=exact["found"],
            fix="this result is not sound and was not given its name; use --target hf",
        )
    return [] if packed["ok"] else [f"{packed['name']}: {packed['found']}"]
