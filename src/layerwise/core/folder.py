"""From what a user names to a folder of ordinary safetensors.

Adapters, GGUF files and quantized checkpoints are made dense once, into the user's cache; what
lies in the folder says that it is needed, never the architecture.
"""

import hashlib
import os
from functools import cache
from importlib import resources
from pathlib import Path
from tempfile import TemporaryDirectory

from layerwise.core.checkpoint import Checkpoint
from layerwise.core.dense import Recipe, recipe_for
from layerwise.core.errors import LayerwiseError, notice, refusing


def demo_folder() -> Path:
    """Where the shipped demo model lies."""
    return Path(str(resources.files("layerwise") / "demo_model"))


def find_folder(model: str | Path) -> Path:
    """A folder of ordinary safetensors, from a path, `demo`, or a hub id.

    Raises:
        LayerwiseError: there is no such folder and the hub has none either, or it holds an
            adapter or quantized weights, or it is a GGUF file, that cannot be made dense.
    """
    folder = _named(str(model))
    recipe = recipe_for(folder, find_folder)
    if recipe is None:
        return folder
    made = _cached(recipe)
    notice(f"{recipe.what}; dense weights in {made}")
    return made


def _named(model: str) -> Path:
    if model == "demo":
        return demo_folder()
    if model and Path(model).is_dir():
        return Path(model)
    if Path(model).suffix == ".gguf" and Path(model).is_file():
        return Path(model)
    if Path(model).is_absolute() or model.startswith(".") or model.count("/") != 1:
        raise LayerwiseError(
            f"model {model}",
            allowed="a folder with config.json and safetensors, a GGUF file, a hub id, or `demo`",
            found="a file" if model and Path(model).is_file() else "no such folder",
            fix="check the path",
        )
    from huggingface_hub import snapshot_download

    with refusing(
        f"model {model}",
        allowed="a local folder or a hub id that can be downloaded",
        fix="check the spelling and the network, or download the folder first",
    ):
        return Path(snapshot_download(model, ignore_patterns=["*.bin", "*.pt", "*.gguf"]))


def cache_folder() -> Path:
    """Where made folders are kept: `layerwise/models` below the user's cache directory."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "layerwise" / "models"


def _cached(recipe: Recipe) -> Path:
    """The made folder, from the cache if the same inputs were seen before; whole or not there."""
    inputs = [(path.name, _digest(path)) for path in recipe.inputs]
    place = cache_folder() / hashlib.sha256(repr((recipe.by, inputs)).encode()).hexdigest()[:32]
    if place.is_dir():
        return place
    with refusing(
        f"cache {place.parent}", allowed="a folder to write to", fix="set XDG_CACHE_HOME"
    ):
        place.parent.mkdir(parents=True, exist_ok=True)
        part = TemporaryDirectory(dir=place.parent, prefix=".part-")
    with part as name:
        recipe.write(Path(name, "model"))
        Checkpoint(Path(name, "model"))
        if not place.is_dir():
            Path(name, "model").replace(place)
    return place


def _digest(path: Path) -> str:
    known = path.stat()
    return _sha256(path, known.st_size, known.st_mtime_ns)


@cache
def _sha256(path: Path, size: int, changed: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
