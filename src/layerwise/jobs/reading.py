"""A few prompts read layer by layer: what the network would say after each, and where it acts."""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from layerwise.core.data import Texts
from layerwise.core.errors import LayerwiseError
from layerwise.core.network import Network
from layerwise.core.reader import Reader
from layerwise.core.stats import Stats, observe
from layerwise.core.stops import Batch
from layerwise.core.task import config_value, takes_images
from layerwise.describe.lens import active_layers, answer_of, compared, layer_states
from layerwise.jobs.session import Progress, load_reader, silent
from layerwise.jobs.tail import WORDS, Tail, network_end
from layerwise.measure.states import token_sample

#: tokens of the prompt that is taken from the data where none is given
DEFAULT = 24
#: likeliest tokens that are kept
LIKELIEST = 5


class Read(NamedTuple):
    """One prompt: its tokens, and per boundary of the last stack and token what was found.

    `source` is what an encoder reads while `tokens` go through the decoder, else empty.
    `boundaries` are `input` and the keys of the layers. `words` and `shares` are the likeliest
    tokens and their probabilities `[boundary, token, 5]`, `kl` is to the network's answer in nats
    `[boundary, token]`; empty where the network does not answer in words. `active` says for which
    tokens a layer is no void `[layer, token]`; empty where layers change the shape of the state.
    """

    tokens: list[str]
    source: list[str]
    boundaries: list[str]
    words: list[list[list[str]]]
    shares: list[list[list[float]]]
    kl: list[list[float]]
    active: list[list[bool]]


def announced(network: Network, prompts: Sequence[str]) -> str:
    """What reading costs, before it starts."""
    if takes_images(network.module):
        return "the page has no prompts: the network reads images"
    count = len(prompts) or 1
    what = "a prompt" if count == 1 else f"{count} prompts"
    return f"the page: one short forward more over {what}"


def read_prompts(
    network: Network, prompts: Sequence[str], texts: Texts, progress: Progress = silent
) -> list[Read]:
    """Read prompts in one short forward, or without any the first tokens of the data.

    Args:
        network: it is walked once, layer by layer.
        prompts: texts; for an encoder with a decoder the first half is read, the rest continued.
        texts: where a prompt comes from if none is given.
        progress: called with what is done, how far, and out of how much.

    Returns:
        One reading per prompt; none of a network that reads no text, or has no tokenizer at hand.

    Raises:
        LayerwiseError: a prompt was given to a network that does not read, or is too long for it.
    """
    if takes_images(network.module) or network.source is None:
        if prompts:
            raise LayerwiseError(
                "--prompt",
                allowed="networks that read text, opened from a folder",
                found=f"{prompts[0]!r} for one that does not",
                fix="leave it out",
            )
        return []
    reader = load_reader(network)
    given = list(prompts) or [first_text(texts)]
    rows = [_tokens(network, reader, text, bool(prompts)) for text in given]
    batches = [_batch(reader, row) for row in rows]
    count = sum(b.get("decoder_input_ids", b["input_ids"]).numel() for b in batches)
    probes = {"token_sample": token_sample(tokens=count)}
    stats = observe(network, batches, probes, partial(progress, "reading prompts"))
    with torch.no_grad():
        return _readings(network, reader, stats, batches)


def first_text(texts: Texts) -> str:
    """The beginning of a document that is not measured on, or of one that is if there is none."""
    try:
        found = texts.documents("select")
    except LayerwiseError:
        found = texts.documents("calibrate")
    return next((d.text for d in found if len(d.text) > 4 * DEFAULT), found[0].text)[: 40 * DEFAULT]


def _tokens(network: Network, reader: Reader, text: str, whole: bool) -> list[int]:
    """The tokens of a prompt, all or the first of them."""
    row = reader.tokens(text, bare=reader.task == "seq2seq")
    row = row if whole else row[:DEFAULT]
    most = config_value(network.model.config, "max_position_embeddings")
    if isinstance(most, int) and len(row) > most > 0:
        raise LayerwiseError(
            "--prompt",
            allowed=f"at most {most} tokens, the context of this network",
            found=f"{len(row)} tokens",
            fix="give a shorter one",
        )
    if len(row) < 1 + (reader.task == "seq2seq"):
        raise LayerwiseError(
            "--prompt", allowed="a text with tokens", found=repr(text[:40]), fix="give a longer one"
        )
    return row


def _batch(reader: Reader, row: list[int]) -> dict[str, Tensor]:
    ids = torch.tensor([row])
    if reader.task != "seq2seq":
        return {"input_ids": ids}
    half = (len(row) + 1) // 2
    pair = reader.pair(ids[:, :half], ids[:, half:])
    return {key: value for key, value in pair.items() if key != "labels"}


def _readings(
    network: Network, reader: Reader, stats: Stats, batches: Sequence[Batch]
) -> list[Read]:
    stack = next(s for s in network.stacks if s.name == network_end(network))
    samples = stats.along("token_sample", stack)
    states = layer_states(stack, stats)
    *_, last = states.values()
    same = {k: x for k, x in states.items() if x.shape == last.shape}
    tail = Tail(network, batches[0]) if network.task in WORDS else None
    document = next(iter(samples.values())).where[:, 0]
    found = []
    for number, batch in enumerate(batches):
        mine = {k: x[document == number] for k, x in same.items()}
        said = _said(tail, mine, reader) if tail else ([], [], [])
        active: list[Any] = []
        if len(same) == len(states):
            growth = torch.stack(list(mine.values())).float().norm(dim=-1).diff(dim=0)
            active = active_layers(growth, 0.8, "range").tolist()
        read, *more = (
            batch[k][0].tolist() for k in ("input_ids", "decoder_input_ids") if k in batch
        )
        tokens, source = (more[0], read) if more else (read, [])
        spelt = [[spelled(reader, i) for i in ids] for ids in (tokens, source)]
        found.append(Read(spelt[0], spelt[1], list(mine), *said, active))
    return found


def _said(tail: Tail, states: dict[str, Tensor], reader: Reader) -> tuple[list, list, list]:
    """The likeliest tokens after every boundary, their probabilities, and KL to the answer."""
    *_, last = states.values()
    final = answer_of(tail(last))
    words, shares, kl = [], [], []
    for x in states.values():
        logits = tail(x)
        top = logits.float().softmax(-1).topk(min(LIKELIEST, logits.shape[-1]))
        words.append([[spelled(reader, i) for i in row] for row in top.indices.tolist()])
        shares.append([[round(p, 4) for p in row] for row in top.values.tolist()])
        kl.append([round(v, 4) for v in compared(final, logits)[:, 0].tolist()])
    return words, shares, kl


def spelled(reader: Reader, token: int) -> str:
    """A token as people read it; one that is no text by itself by its name."""
    name = str(reader.processor.convert_ids_to_tokens(token))
    text = reader.processor.decode([token])
    if name[:1] in ("Ġ", "▁") and not text.startswith(" "):
        text = f" {text}"
    return text if text.strip("\ufffd") else name
