"""The two models of every quality figure."""

from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent


class Model(NamedTuple):
    """A folder and the text it is measured on."""

    name: str
    folder: str
    data: str


def models() -> list[Model]:
    """The demo model on `stdlib`, and the second model on the text that lies beside it."""
    found = [Model("demo", "demo", "stdlib")]
    second = HERE / "second_model"
    if (second / "model.safetensors").exists():
        found.append(Model("second", str(second), str(second / "text.jsonl")))
    return found
