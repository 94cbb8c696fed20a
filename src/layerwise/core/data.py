"""Documents, their three uses, and token batches made from them."""

import hashlib
import json
import os
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from layerwise.core.errors import LayerwiseError

Use = Literal["calibrate", "select", "evaluate"]


class Document(NamedTuple):
    """One unit of data: what is split, counted and resampled as a whole.

    The text of a `chat` is the JSON of its messages.
    """

    key: str
    text: str
    chat: bool = False


def use_of(key: str) -> Use:
    """Decide what a document is for: sha256 of its key modulo 10; 0-5, 6-7, 8-9."""
    digit = int(hashlib.sha256(key.encode()).hexdigest(), 16) % 10
    return "calibrate" if digit < 6 else "select" if digit < 8 else "evaluate"


def stdlib_documents(use: Use | None = None) -> Iterator[Document]:
    """Source files of the running interpreter's standard library, keyed by relative path."""
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {"idlelib", "lib2to3", "site-packages", "__pycache__"}
    for folder, inner, files in os.walk(root):
        inner[:] = sorted(d for d in inner if d not in skipped and not d.startswith("test"))
        for name in sorted(files):
            path = Path(folder, name)
            key = path.relative_to(root).as_posix()
            if path.suffix != ".py" or name.startswith("test") or use not in (None, use_of(key)):
                continue
            text = path.read_text(encoding="utf-8", errors="replace")
            if text.strip():
                yield Document(key, text)


def documents(source: str | Path, use: Use | None = None) -> Iterator[Document]:
    """The documents, all or those of one use: `stdlib`, a text file, a folder, or a JSONL file.

    A text file is cut into blocks of about 4 KiB at blank lines; a JSONL row needs `text`, or
    `messages` for the chat template.

    Raises:
        LayerwiseError: the source does not exist, is empty, or a row has neither field.
    """
    if str(source) == "stdlib":
        yield from stdlib_documents(use)
        return
    found = _read_documents(Path(source))
    yield from (d for d in found if use in (None, use_of(d.key)))


def _read_documents(path: Path) -> Iterator[Document]:
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file() and not p.name.startswith("."))
        for file in files:
            yield Document(_read(file), _read(file))
    elif path.suffix == ".jsonl" and path.is_file():
        yield from _rows(path)
    elif path.is_file():
        yield from (Document(block, block) for block in _blocks(_read(path)))
    else:
        raise LayerwiseError(
            f"data {path}",
            allowed="`stdlib`, a text file, a folder of text files, or a .jsonl file",
            found="no such file or folder",
            fix="check the path",
        )


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise LayerwiseError(
            f"data {path}", allowed="text in UTF-8", found=str(error), fix="convert the file"
        ) from None


def _blocks(text: str, size: int = 4096) -> Iterator[str]:
    block = ""
    for paragraph in text.split("\n\n"):
        block += paragraph + "\n\n"
        if len(block.encode()) >= size:
            yield block
            block = ""
    if block.strip():
        yield block


def _rows(path: Path) -> Iterator[Document]:
    for number, line in enumerate(_read(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            chat = "text" not in row
            text = json.dumps(row["messages"]) if chat else row["text"]
            text.encode()  # half a surrogate pair is no text
        except (ValueError, KeyError, TypeError, AttributeError):
            raise LayerwiseError(
                f"data {path}, line {number}",
                allowed="a JSON object with `text` or `messages`",
                found=line[:80],
                fix="mend or remove the line",
            ) from None
        yield Document(text, text, chat)


class Texts(NamedTuple):
    """Where token batches come from, and how many there are of them."""

    source: str = "stdlib"
    seed: int = 0
    samples: int = 128
    length: int = 512

    def documents(self, use: Use) -> list[Document]:
        """Documents of one use, shuffled by the seed.

        Raises:
            LayerwiseError: there are none.
        """
        chosen = list(documents(self.source, use))
        random.Random(self.seed).shuffle(chosen)
        if not chosen:
            raise LayerwiseError(
                f"data {self.source}",
                allowed=f"documents for the use {use!r} (sha256 modulo 10)",
                found="none",
                fix="give more documents; a few dozen at least",
            )
        return chosen


def _tokens(tokenizer: Any, document: Document) -> list[int]:
    text = document.text
    if document.chat and tokenizer.chat_template:
        text = tokenizer.apply_chat_template(json.loads(text), tokenize=False)
    ids = tokenizer(text, verbose=False)["input_ids"]
    start = tokenizer.bos_token_id
    return ids if start is None or ids[:1] == [start] else [start, *ids]


def windows(tokenizer: Any, texts: Texts, use: Use, batch: int = 8) -> list[dict[str, Tensor]]:
    """`samples` windows of `length` tokens out of the joined documents, `batch` at a time.

    Raises:
        LayerwiseError: the documents have fewer tokens than one window.
    """
    stream: list[int] = []
    for document in texts.documents(use):
        stream += _tokens(tokenizer, document)
        if len(stream) >= texts.samples * texts.length:
            break
    count = min(texts.samples, len(stream) // texts.length)
    if count == 0:
        raise LayerwiseError(
            f"data {texts.source}",
            allowed=f"at least one window of {texts.length} tokens",
            found=f"{len(stream)} tokens for the use {use!r}",
            fix="give more text, or a smaller --set data.length",
        )
    ids = torch.tensor(stream[: count * texts.length]).reshape(count, texts.length)
    return [{"input_ids": ids[i : i + batch]} for i in range(0, count, batch)]


def samples_of(tokenizer: Any, texts: Texts, use: Use, count: int = 64) -> list[dict[str, Tensor]]:
    """The first `length` tokens of `count` documents, one document a batch, nothing padded."""
    rows = (_tokens(tokenizer, d)[: texts.length] for d in texts.documents(use))
    long_enough = [row for row in rows if len(row) > 16][:count]
    if not long_enough:
        raise LayerwiseError(
            f"data {texts.source}",
            allowed=f"documents of more than 16 tokens for the use {use!r}",
            found="none",
            fix="give longer documents",
        )
    return [{"input_ids": torch.tensor([row])} for row in long_enough]
