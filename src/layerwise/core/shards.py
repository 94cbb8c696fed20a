"""Writing safetensors: files whole or not at all, folders shard by shard."""

import json
import os
import struct
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from torch import Tensor, uint8

from layerwise.core.checkpoint import DTYPES, PACKED
from layerwise.core.index import INDEX

#: bytes of a file that is on the disk before the next one is written
LONG = 1 << 26
_CODES = {dtype: code for code, dtype in DTYPES.items()}


def write_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file without copying what is contiguous; whole or not at all."""
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        tensor = tensors[name]
        *rows, last = tensor.shape or (1,)
        stored = [*rows, last * PACKED.get(tensor.dtype, 1)] if tensor.ndim else []
        header[name] = {
            "dtype": _CODES[tensor.dtype],
            "shape": stored,
            "data_offsets": [end, end + tensor.nbytes],
        }
        end += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    part = path.with_name(path.name + ".part")
    with part.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in order:
            flat = tensors[name].detach().cpu().contiguous().reshape(-1)
            file.write(flat.view(uint8).numpy().data)
        if end >= LONG:  # what is left to the system waits, and then all at once
            file.flush()
            os.fsync(file.fileno())
            forget(file.fileno())
    part.replace(path)


def forget(file: int) -> None:
    """Let the system use the memory again that holds a file's bytes beside the disk.

    The next file goes there: fresh memory takes several times longer, above all in a virtual
    machine, and what is read stays at hand.
    """
    if "posix_fadvise" in dir(os):
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)


class ShardWriter:
    """Collects tensors and writes a shard whenever `limit` bytes have come together.

    One shard at a time is written behind the caller's back.
    """

    def __init__(self, folder: Path, limit: int = 128_000_000) -> None:
        self.folder, self.limit = folder, limit
        self.nbytes = 0
        self._waiting: dict[str, Tensor] = {}
        self._shards: list[list[str]] = []
        self._pool = ThreadPoolExecutor(1)
        self._writing: Future[None] | None = None

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the tensors of one layer; they stay together."""
        self._waiting |= tensors
        self.nbytes += sum(t.nbytes for t in tensors.values())
        if sum(t.nbytes for t in self._waiting.values()) >= self.limit:
            self._flush()

    def _flush(self) -> None:
        if self._waiting:
            self._settle()
            path = self.folder / f"shard-{len(self._shards)}"
            self._writing = self._pool.submit(write_safetensors, path, self._waiting)
            self._shards.append(list(self._waiting))
            self._waiting = {}

    def _settle(self) -> None:
        """Wait for the shard that is being written; what went wrong with it is raised here."""
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

    def close(self) -> list[str]:
        """Give the shards their final names, write the index, and say which files there are."""
        self._flush()
        self._settle()
        self._pool.shutdown()
        count = len(self._shards)
        files = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
        if count == 1:
            files = ["model.safetensors"]
        for i, name in enumerate(files):
            (self.folder / f"shard-{i}").replace(self.folder / name)
        if count > 1:
            where = {n: files[i] for i, names in enumerate(self._shards) for n in names}
            index = {"metadata": {"total_size": self.nbytes}, "weight_map": where}
            path = self.folder / INDEX
            path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
            files.append(path.name)
        return files
