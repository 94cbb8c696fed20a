"""Documents and their three uses: calibrate, select, evaluate."""

import hashlib
import json
import os
import random
import sysconfig
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

from layerwise.core.errors import LayerwiseError, refusing

Use = Literal["calibrate", "select", "evaluate"]


class Document(NamedTuple):
    """One unit of data: what is split, counted and resampled as a whole.

    The text of a `chat` is the JSON of its messages; `target` is what a seq2seq model shall say
    to the text; an image has a path, and the name of its folder as its label.
    """

    key: str | bytes
    text: str
    chat: bool = False
    target: str = ""
    path: Path | None = None
    label: str = ""


def use_of(key: str | bytes) -> Use:
    """Decide what a document is for: sha256 of its key modulo 10; 0-5, 6-7, 8-9."""
    data = key.encode() if isinstance(key, str) else key
    digit = int(hashlib.sha256(data).hexdigest(), 16) % 10
    return "calibrate" if digit < 6 else "select" if digit < 8 else "evaluate"


def stdlib_documents(use: Use | None = None) -> tuple[Document, ...]:
    """Source files of the running interpreter's standard library, keyed by relative path."""
    return _modules(Path(sysconfig.get_path("stdlib")), use)


@cache
def _modules(root: Path, use: Use | None) -> tuple[Document, ...]:
    found = []
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
                found.append(Document(key, text))
    return tuple(found)


def documents(source: str | Path, use: Use | None = None) -> Iterator[Document]:
    """The documents, all or those of one use.

    A source is `stdlib`, a text file, a folder of them, a JSONL or Parquet file, or the id of a
    data set on the hub. A text file is cut into blocks of about 4 KiB at blank lines; a row needs
    `text` (and may have a `target`), or `messages` for the chat template.

    Raises:
        LayerwiseError: the source does not exist, is empty, or a row has neither field.
    """
    if str(source) == "stdlib":
        yield from stdlib_documents(use)
        return
    found = _read_documents(Path(source))
    yield from (d for d in found if use in (None, use_of(d.key)))


IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


def image_documents(source: str | Path, use: Use | None = None) -> Iterator[Document]:
    """The images below a folder; the name of the folder that holds one is its label.

    Raises:
        LayerwiseError: the source is no folder of images.
    """
    root = Path(source)
    files = sorted(p for p in root.rglob("*") if p.suffix.lower() in IMAGES)
    if not files:
        raise LayerwiseError(
            f"data {source}",
            allowed="a folder of images, in one folder per class where classes are known",
            found="no image" if root.is_dir() else "no such folder",
            fix="give one with --data",
        )
    for file in files:
        data = file.read_bytes()
        if use in (None, use_of(data)):
            yield Document(data, "", path=file, label=file.parent.name)


def _read_documents(path: Path) -> Iterator[Document]:
    if path == Path():
        raise LayerwiseError(
            "data", allowed=_SOURCES, found="an empty name", fix="name one with --data"
        )
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file() and not p.name.startswith("."))
        for file in files:
            yield Document(_read(file), _read(file))
    elif path.suffix == ".jsonl" and path.is_file():
        yield from _rows(path)
    elif path.suffix == ".parquet" and path.is_file():
        yield from _parquet(path)
    elif path.is_file():
        yield from (Document(block, block) for block in _blocks(_read(path)))
    else:
        yield from _hub(path)


_SOURCES = (
    "`stdlib`, a text file, a folder of text files, a .jsonl or .parquet file, or the id of a data "
    "set on the hub (pip install datasets)"
)


def _hub(path: Path) -> Iterator[Document]:
    """Rows of a data set on the hub: its `train` part, or the first it has."""
    with refusing(f"data {path}", allowed=_SOURCES, fix="check the path"):
        local = path.is_absolute() or path.parts[:1] in ((), (".",), ("..",)) or path.suffix
        if local or len(path.parts) > 2:
            raise FileNotFoundError("no such file or folder")
        from datasets import load_dataset  # pyright: ignore[reportMissingImports]

        parts = load_dataset(str(path))
    rows = parts["train"] if "train" in parts else next(iter(parts.values()))
    for number, row in enumerate(rows, 1):
        yield _document(row, f"data {path}, row {number}", str(row)[:80])


def _parquet(path: Path) -> Iterator[Document]:
    with refusing(
        f"data {path}",
        allowed="a Parquet file, read by pyarrow",
        fix="copy the file again, or pip install pyarrow",
    ):
        from pyarrow.parquet import ParquetFile

        number = 0
        for part in ParquetFile(path).iter_batches():
            for row in part.to_pylist():
                number += 1
                yield _document(row, f"data {path}, row {number}", str(row)[:80])


def _read(path: Path) -> str:
    with refusing(
        f"data {path}", allowed="text in UTF-8", fix="convert the file, or give another with --data"
    ):
        return path.read_text(encoding="utf-8")


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
        except (ValueError, RecursionError):
            row = None
        yield _document(row, f"data {path}, line {number}", line[:80])


def _document(row: Any, where: str, shown: str) -> Document:
    """The document of a row with `text`, perhaps a `target`, or with `messages`."""
    try:
        chat = "text" not in row
        if chat and not all({"role", "content"} <= set(m) for m in row["messages"]):
            raise ValueError("a message without role or content")
        text = json.dumps(row["messages"]) if chat else row["text"]
        target = row.get("target") or ""
        (text + target).encode()  # half a surrogate pair is no text
    except (ValueError, KeyError, TypeError, AttributeError):
        raise LayerwiseError(
            where,
            allowed="an object with `text` or `messages`, each of these with role and content",
            found=shown,
            fix="mend or remove the line",
        ) from None
    return Document(text, text, chat, target)


class Texts(NamedTuple):
    """Where token batches come from, and how many there are of them."""

    source: str = "stdlib"
    seed: int = 0
    samples: int = 128
    length: int = 512

    def documents(self, use: Use, images: bool = False) -> list[Document]:
        """Documents of one use, shuffled by the seed.

        Raises:
            LayerwiseError: there are none.
        """
        chosen = list(image_documents(self.source, use) if images else documents(self.source, use))
        random.Random(self.seed).shuffle(chosen)
        if not chosen:
            every = image_documents(self.source) if images else documents(self.source)
            raise LayerwiseError(
                f"data {self.source}",
                allowed=f"documents for the use {use!r}, which their sha256 decides",
                found=f"none among {sum(1 for _ in every)} documents",
                fix="give more documents; a few dozen at least",
            )
        return chosen
