"""What lies in a model folder beside its weights: tokenizer, chat template, processor."""

import shutil
from pathlib import Path

from layerwise.core.index import PICKLES

#: names the model that an adapter belongs to
ADAPTER = "adapter_config.json"
_WEIGHTS = {".safetensors", ".gguf", ".h5", ".msgpack", ".check", *PICKLES}
#: what describes the weights of the folder that it lies in, and no others
_OWN = {
    "config.json",
    ADAPTER,
    "README.md",
    "plan.yaml",
    "report.json",
    "report.html",
    "wiring.yaml",
    "records.json",
}


def files_in(folder: Path) -> list[Path]:
    """The files of a folder that are not hidden, by name."""
    return [p for p in sorted(folder.iterdir()) if p.is_file() and not p.name.startswith(".")]


def copy_companions(folder: Path, out: Path) -> None:
    """Copy what is neither weights, their index, configuration nor report."""
    for path in files_in(folder):
        described = path.name in _OWN or "index.json" in path.name
        if path.suffix not in _WEIGHTS and not described:
            shutil.copyfile(path, out / path.name)
