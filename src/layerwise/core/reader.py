"""From documents to the batches of a network, with labels, for every kind of task."""

import json
from collections.abc import Mapping, Sequence
from itertools import islice
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from layerwise.core.data import Document, Texts, Use
from layerwise.core.errors import LayerwiseError, refusing
from layerwise.core.task import IGNORED, Task

#: share of the tokens that are hidden for masked models (BERT)
HIDDEN = 0.15
#: documents of one batch of a network without a head, which are compared with each other
TOGETHER = 16

Batches = list[dict[str, Tensor]]


class Reader(NamedTuple):
    """What turns documents into batches: the task, a tokenizer or image processor, and more.

    `start` is the first token of a decoder, `classes` the class of every label that is known,
    `rows` how many tokens the model has an embedding for (0: nobody knows).
    """

    task: Task
    processor: Any
    images: bool = False
    start: int = 0
    classes: Mapping[str, int] = MappingProxyType({})
    rows: int = 0

    def tokens(self, text: str, chat: bool = False, bare: bool = False) -> list[int]:
        """Tokens of a text; with `bare` without those that mark its ends."""
        if chat and self.processor.chat_template:
            with refusing(
                f"messages {text[:80]}",
                allowed="messages that the chat template of the tokenizer takes",
                fix="mend the row, or give it a `text` instead",
            ):
                text = self.processor.apply_chat_template(json.loads(text), tokenize=False)
        with refusing(
            "tokenizer",
            allowed="one that reads the data",
            fix="copy the tokenizer that belongs to this model into its folder",
        ):
            ids = self.processor(text, verbose=False, add_special_tokens=not bare)["input_ids"]
        if self.rows and ids and max(ids) >= self.rows:
            raise LayerwiseError(
                "tokenizer",
                allowed=f"tokens below {self.rows}, the rows of the model's embedding",
                found=f"token {max(ids)}, {self.processor.convert_ids_to_tokens(max(ids))!r}",
                fix="copy the tokenizer that belongs to this model into its folder",
            )
        start = self.processor.bos_token_id
        if bare or self.task != "causal" or start is None or ids[:1] == [start]:
            return ids
        return [start, *ids]

    def ends(self) -> tuple[list[int], list[int]]:
        """What the tokenizer puts before and after a text."""
        bare, whole = self.tokens("a", bare=True), self.tokens("a")
        at = next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), 0)
        return whole[:at], whole[at + len(bare) :]

    def batch(self, rows: Sequence[Sequence[int]], generator: torch.Generator) -> dict[str, Tensor]:
        """Rows of equally many tokens as a batch of the task."""
        ids = torch.tensor(rows)
        if self.task == "causal":
            return {"input_ids": ids, "labels": _shifted(ids)}
        if self.task == "seq2seq":
            half = ids.shape[1] // 2
            return self.pair(ids[:, :half], ids[:, half:])
        before, after = (torch.tensor(x, dtype=torch.long) for x in self.ends())
        whole = torch.cat([before.expand(len(ids), -1), ids, after.expand(len(ids), -1)], 1)
        if self.task != "masked":
            return {"input_ids": whole}
        drawn = torch.rand(ids.shape, generator=generator) < HIDDEN
        drawn[:, 0] |= ~drawn.any(1)
        hidden = torch.zeros_like(whole, dtype=torch.bool)
        hidden[:, len(before) : len(before) + ids.shape[1]] = drawn
        labels = whole.masked_fill(~hidden, IGNORED)
        return {"input_ids": whole.masked_fill(hidden, self._mask()), "labels": labels}

    def pair(self, source: Tensor, target: Tensor) -> dict[str, Tensor]:
        """A source and its target, which the decoder sees one token late."""
        before, after = (torch.tensor(x, dtype=torch.long) for x in self.ends())
        count = len(source)
        whole = torch.cat([before.expand(count, -1), source, after.expand(count, -1)], 1)
        start = torch.full((count, 1), self.start)
        shifted = torch.cat([start, target[:, :-1]], 1)
        return {"input_ids": whole, "decoder_input_ids": shifted, "labels": target}

    def _mask(self) -> int:
        found = self.processor.mask_token_id
        if found is None:
            raise LayerwiseError(
                "tokenizer",
                allowed="one with a mask token, for a masked language model",
                found="none",
                fix="set `mask_token` in tokenizer_config.json",
            )
        return found

    def padded(self, rows: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        """Rows of any lengths as one batch, padded on the right, with its mask."""
        pad, width = self.processor.pad_token_id or 0, max(map(len, rows))
        ids = [[*row, *[pad] * (width - len(row))] for row in rows]
        mask = [[1] * len(row) + [0] * (width - len(row)) for row in rows]
        return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}

    def picture(self, documents: Sequence[Document]) -> dict[str, Tensor]:
        """Images as a batch, with the classes that their folders name."""
        from PIL import Image

        opened = []
        for path in (d.path for d in documents if d.path):
            with refusing(f"data {path}", allowed="an image", fix="mend or remove the file"):
                opened.append(Image.open(path).convert("RGB"))
        pixels = self.processor(images=opened, return_tensors="pt")["pixel_values"]
        known = [self.classes.get(d.label) for d in documents]
        if any(number is None for number in known):
            return {"pixel_values": pixels}
        return {"pixel_values": pixels, "labels": torch.tensor(known)}


def _shifted(ids: Tensor) -> Tensor:
    labels = torch.full_like(ids, IGNORED)
    labels[:, :-1] = ids[:, 1:]
    return labels


def windows(reader: Reader, texts: Texts, use: Use, batch: int = 8) -> Batches:
    """`samples` windows of `length` tokens out of the joined documents, `batch` at a time.

    Images, and documents with a target, are samples by themselves.

    Raises:
        LayerwiseError: the documents have fewer tokens than one window.
    """
    found = texts.documents(use, reader.images)
    if reader.images:
        chosen = found[: texts.samples]
        return [reader.picture(chosen[i : i + batch]) for i in range(0, len(chosen), batch)]
    if reader.task == "seq2seq" and found[0].target:
        return _pairs(reader, found[: texts.samples], texts.length)
    bare = reader.task != "causal"
    stream: list[int] = []
    for document in found:
        stream += reader.tokens(document.text, document.chat, bare)
        if len(stream) >= texts.samples * texts.length:
            break
    count = min(texts.samples, len(stream) // texts.length)
    if count == 0:
        raise LayerwiseError(
            f"data {texts.source}",
            allowed=f"at least one window of {texts.length} tokens",
            found=f"{len(stream)} tokens for the use {use!r}",
            fix="give more text, or a smaller --length",
        )
    width = texts.length - (sum(map(len, reader.ends())) if bare else 0)
    rows = [stream[i * width : (i + 1) * width] for i in range(count)]
    generator = torch.Generator().manual_seed(texts.seed)
    return [reader.batch(rows[i : i + batch], generator) for i in range(0, count, batch)]


def samples_of(reader: Reader, texts: Texts, use: Use, count: int = 64) -> Batches:
    """The first `length` tokens of `count` documents, one document a batch, nothing padded.

    A network without a head gets several documents at once, padded, to compare them.

    Raises:
        LayerwiseError: no document is long enough.
    """
    found = texts.documents(use, reader.images)
    if reader.images:
        return [reader.picture(found[i : i + 8]) for i in range(0, len(found[:count]), 8)]
    if reader.task == "seq2seq" and found[0].target:
        return _pairs(reader, found[:count], texts.length)
    bare = reader.task in ("masked", "seq2seq")
    rows = (reader.tokens(d.text, d.chat, bare)[: texts.length] for d in found)
    long_enough = list(islice((row for row in rows if len(row) > 16), count))
    if not long_enough:
        raise LayerwiseError(
            f"data {texts.source}",
            allowed=f"documents of more than 16 tokens for the use {use!r}",
            found="none",
            fix="give longer documents",
        )
    if reader.task in ("embed", "classify"):
        return _padded(reader, long_enough)
    generator = torch.Generator().manual_seed(texts.seed)
    return [reader.batch([row], generator) for row in long_enough]


def _pairs(reader: Reader, documents: Sequence[Document], length: int) -> Batches:
    end = reader.ends()[1]
    rows = []
    for document in documents:
        source = reader.tokens(document.text, document.chat, bare=True)[:length]
        target = [*reader.tokens(document.target, bare=True), *end][:length]
        rows.append(reader.pair(torch.tensor([source]), torch.tensor([target])))
    return rows


def _padded(reader: Reader, rows: list[list[int]]) -> Batches:
    """Batches of documents of different lengths; a lone last one joins the batch before it."""
    starts = list(range(0, max(len(rows) - 1, 1), TOGETHER))
    batches = []
    for start, stop in zip(starts, [*starts[1:], len(rows)], strict=True):
        batches.append(reader.padded(rows[start:stop]))
    return batches
