"""Documents, their three uses, and token batches made from them."""

import hashlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

Use = Literal["calibrate", "select", "evaluate"]


class Document(NamedTuple):
    """One unit of data: what is split, counted and resampled as a whole."""

    key: str
    text: str


def use_of(key: str) -> Use:
    """Decide what a document is for: sha256 of its key modulo 10; 0-5, 6-7, 8-9."""
    digit = int(hashlib.sha256(key.encode()).hexdigest(), 16) % 10
    return "calibrate" if digit < 6 else "select" if digit < 8 else "evaluate"


def stdlib_documents() -> Iterator[Document]:
    """Source files of the running interpreter's standard library, keyed by relative path."""
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {"idlelib", "lib2to3", "site-packages", "__pycache__"}
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if any(part in skipped or part.startswith("test") for part in relative.parts):
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        if text.strip():
            yield Document(relative.as_posix(), text)
