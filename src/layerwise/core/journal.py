"""A long job's memory: what is finished is on disk, and is never done again."""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from torch import Tensor

from layerwise.core.checkpoint import read_header, read_tensor
from layerwise.core.errors import LayerwiseError
from layerwise.core.shards import write_safetensors
from layerwise.core.weight import Weight, flatten, unflatten


class Journal:
    """A folder with one line per finished layer and that layer's records beside it.

    A line is written and synced after its file, so that a kill at any moment leaves either a
    finished layer or none. One process at a time works on a journal; the system gives it free
    when that process ends, however it ends.
    """

    def __init__(self, folder: Path, job: Mapping[str, Any]) -> None:
        self.folder = folder
        self.lines: dict[str, dict[str, Any]] = {}
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = _locked(folder)
        self._path = folder / "journal.jsonl"
        if self._path.exists():
            self._resume(job)
        else:
            self._append({"job": dict(job)})

    def _resume(self, job: Mapping[str, Any]) -> None:
        whole = self._path.read_bytes()
        lines = whole.split(b"\n")
        try:
            complete = [json.loads(line) for line in lines[:-1]]
            before = dict(complete[0]["job"]) if complete else {}
            self.lines = {line["layer"]: line for line in complete[1:]}
        except (ValueError, KeyError, TypeError) as error:
            raise LayerwiseError(
                f"journal {self.folder}",
                allowed="the lines that were written",
                found=f"others ({error})",
                fix=f"delete {self.folder} and start again",
            ) from None
        if lines[-1]:
            self._path.write_bytes(whole[: len(whole) - len(lines[-1])])
        if not complete:
            self._append({"job": dict(job)})
            return
        now = json.loads(json.dumps(dict(job)))
        if before != now:
            changed = [k for k in {**before, **now} if before.get(k) != now.get(k)]
            raise LayerwiseError(
                f"journal {self.folder}",
                allowed="the same job as the one that was interrupted",
                found=f"a change in {', '.join(changed)}",
                fix=f"undo the change, choose another --out, or delete {self.folder}",
            )

    def _append(self, line: Mapping[str, Any]) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def __contains__(self, layer: str) -> bool:
        return layer in self.lines

    def write(self, layer: str, records: Mapping[str, Weight], report: Mapping[str, Any]) -> None:
        """Keep the records of a finished layer and what is to be reported of it."""
        trees: dict[str, Any] = {}
        tensors: dict[str, Tensor] = {}
        for key, record in records.items():
            trees[key], found = flatten(record, f"{key}:")
            tensors |= found
        path = self._file(layer)
        write_safetensors(path, tensors)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        line = {"layer": layer, "sha256": digest, "trees": trees, "report": dict(report)}
        self._append(line)
        self.lines[layer] = line

    def read(self, layer: str) -> dict[str, Weight]:
        """The records of a finished layer.

        Raises:
            LayerwiseError: the file is not the one that was written.
        """
        line, path = self.lines[layer], self._file(layer)
        if not path.exists() or hashlib.sha256(path.read_bytes()).hexdigest() != line["sha256"]:
            raise LayerwiseError(
                f"journal {path}",
                allowed="the file that was written when the layer was finished",
                found="another or none",
                fix=f"delete {self.folder} and start again",
            )
        tensors = {name: read_tensor(info) for name, info in read_header(path).items()}
        return {key: unflatten(tree, tensors) for key, tree in line["trees"].items()}

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *exception: object) -> None:
        self._lock.close()

    def remove(self) -> None:
        """The job is done: forget it."""
        shutil.rmtree(self.folder)
        self._lock.close()

    def _file(self, layer: str) -> Path:
        return self.folder / (layer.replace("/", "-") + ".safetensors")


def _locked(folder: Path) -> IO[str]:
    """The journal's lock file, held; systems without such locks go without."""
    file = (folder / "lock").open("a")
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:
        return file
    except BlockingIOError:
        file.close()
        raise LayerwiseError(
            f"journal {folder}",
            allowed="one run at a time on an output folder",
            found="another run that is still at work on it",
            fix="wait for it, stop it, or choose another --out",
        ) from None
    return file
