"""Which files of a folder hold its weights, by the index where there is one."""

import json
from pathlib import Path
from typing import Any

from layerwise.core.errors import LayerwiseError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
#: tensors of single visits, in a folder that keeps every layer once
ADAPTERS = "layerwise.adapters"
PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl"}


def broken(path: Path, allowed: str, found: object) -> LayerwiseError:
    """The error of a file that is not whole."""
    return LayerwiseError(str(path), allowed=allowed, found=found, fix="copy the file again")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        LayerwiseError: it holds no JSON, or no object.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise broken(path, "a JSON object", str(error)) from None
    if not isinstance(found, dict):
        raise broken(path, "a JSON object", type(found).__name__)
    return found


def weight_files(folder: Path) -> tuple[list[Path], list[str]]:
    """The weight files of a folder, and the tensors that its index names, if it has one.

    Raises:
        LayerwiseError: the index is broken, a file is missing, or there is none but pickles.
    """
    index = folder / INDEX
    where = _read_index(index) if index.is_file() else {}
    names = sorted(set(where.values())) or _unindexed(folder)
    missing = [name for name in names if not _is_file(folder / name)]
    if missing or not names:
        raise _no_weights(folder, missing)
    return [folder / name for name in names], list(where)


def _read_index(index: Path) -> dict[str, str]:
    where = read_json(index).get("weight_map")
    wrong = "none"
    if isinstance(where, dict) and where:
        outside = [name for name in where.values() if not _is_inside(name)]
        if not outside:
            return where
        wrong = repr(outside[0])
    raise broken(index, "a `weight_map` from tensors to files of the folder", wrong)


def _is_inside(name: object) -> bool:
    if not isinstance(name, str) or not name or "\0" in name:
        return False
    return not Path(name).is_absolute() and ".." not in Path(name).parts


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name too long, or one that no file can have
        return False


def _unindexed(folder: Path) -> list[str]:
    if (folder / SINGLE).exists():
        return [SINGLE]
    return sorted(p.name for p in folder.glob("*.safetensors"))


def _no_weights(folder: Path, missing: list[str]) -> LayerwiseError:
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLES)
    found, fix = f"missing {', '.join(missing)}", "copy the missing files"
    if not missing:
        found = f"only pickled weights: {', '.join(pickles)}" if pickles else "none"
    if pickles and not missing:
        fix = "reading a pickle can run any code; where you trust it, `layerwise --trust pickles "
        fix += "...` rewrites it as safetensors once"
    return LayerwiseError(str(folder), allowed="all weights as safetensors", found=found, fix=fix)
