"""English text that every machine has: the docstrings of the pinned packages.

    python -m benchmarks.docstrings out/text.jsonl

The second model is trained on its calibrate part, and measured on the others.
"""

import ast
import hashlib
import json
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

PACKAGES = ("networkx", "numpy", "scipy", "sympy", "torch", "transformers")


def sources() -> Iterator[tuple[str, Path]]:
    """Every module of the packages, but tests."""
    for package in PACKAGES:
        spec = find_spec(package)
        assert spec is not None and spec.origin is not None, f"{package} is not installed"
        root = Path(spec.origin).parent
        for path in sorted(root.rglob("*.py")):
            name = path.relative_to(root.parent).as_posix()
            if "test" not in name:
                yield name, path


def docstrings(path: Path) -> list[str]:
    """What a module says, in its order."""
    kinds = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    nodes = [n for n in ast.walk(ast.parse(path.read_bytes())) if isinstance(n, kinds)]
    nodes.sort(key=lambda node: getattr(node, "lineno", 0))
    return [text for node in nodes if (text := ast.get_docstring(node))]


def documents() -> list[str]:
    """A document per module, in an order drawn by sha256, each paragraph only once.

    Functions share whole paragraphs, which would carry the evaluate part into training.
    """
    found = [(name, docstrings(path)) for name, path in sources()]
    kept, seen = [], set()
    for name, texts in sorted(found, key=lambda pair: hashlib.sha256(pair[0].encode()).digest()):
        paragraphs = [p for text in texts for p in text.split("\n\n")]
        fresh = [p for p in dict.fromkeys(paragraphs) if len(p) < 80 or p not in seen]
        seen.update(paragraphs)
        text = "\n\n".join((name, *fresh))
        if len(text) >= 500:
            kept.append(text)
    return kept


def write_sample(path: Path, size: int = 6_000_000) -> None:
    """Documents as JSONL until `size` bytes are full."""
    part = path.with_suffix(".part")
    with part.open("w", encoding="utf-8") as file:
        for text in documents():
            line = json.dumps({"text": text}, ensure_ascii=False) + "\n"
            size -= len(line.encode())
            if size < 0:
                break
            file.write(line)
    part.replace(path)


if __name__ == "__main__":
    write_sample(Path(sys.argv[1]))
