"""The two models of every quality figure."""

from pathlib import Path
from typing import NamedTuple

from benchmarks.docstrings import write_sample

SECOND = Path(__file__).parent / "second_model"
TEXT = Path(__file__).parents[1] / "out" / "docstrings.jsonl"


class Model(NamedTuple):
    """A folder and the text it is measured on."""

    name: str
    folder: str
    data: str


def models() -> list[Model]:
    """The demo model on `stdlib`, and the second model on docstrings."""
    if not TEXT.exists():
        TEXT.parent.mkdir(exist_ok=True)
        write_sample(TEXT)
    return [Model("demo", "demo", "stdlib"), Model("second", str(SECOND), str(TEXT))]
