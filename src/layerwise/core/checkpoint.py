"""Safetensors folders: checked headers, tensors read one by one.

Files are opened, read and closed; nothing stays mapped, so memory is what is asked for.
"""

import hashlib
import json
import math
import mmap
import os
import struct
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cached_property, lru_cache, partial
from itertools import groupby
from pathlib import Path
from threading import Thread
from typing import Any, NamedTuple

import torch
from torch import Tensor

from layerwise.core.errors import LayerwiseError
from layerwise.core.index import ADAPTERS, INDEX, broken, read_json, weight_files
from layerwise.core.machine import BIG, remembered

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F4": torch.float4_e2m1fn_x2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
#: elements on disk in one element of torch, along the last axis
PACKED = {torch.float4_e2m1fn_x2: 2}
_LONGEST_HEADER = 100_000_000
#: bytes whose sha256 is worth remembering, and how many nanoseconds ago a file must have been
#: changed: one that was changed just now may change again within a tick of its clock
LONG, SETTLED = 1 << 28, 2 * 10**9


class TensorInfo(NamedTuple):
    """Where a stored tensor lies; `start` counts from the beginning of the file."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    nbytes: int


def read_header(path: Path) -> dict[str, TensorInfo]:
    """What a safetensors file holds, every size and offset checked against the file.

    Raises:
        LayerwiseError: the file is no safetensors file, is cut short, or has tensors that
            overlap, leave holes, or do not have the bytes that shape and dtype ask for.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else -1
        if not 2 <= length <= min(size - 8, _LONGEST_HEADER):
            raise broken(path, "a header length within the file", f"{length} in {size} bytes")
        try:
            header = json.loads(file.read(length))
        except (ValueError, RecursionError) as error:
            raise broken(path, "a JSON header", str(error)) from None
    if not isinstance(header, dict):
        raise broken(path, "a JSON object as header", type(header).__name__)
    found = {k: _entry(path, k, v, 8 + length) for k, v in header.items() if k != "__metadata__"}
    end = 8 + length
    for name, info in sorted(found.items(), key=lambda item: (item[1].start, item[1].nbytes)):
        if info.start != end:
            raise broken(path, f"tensor {name!r} at byte {end}", f"byte {info.start}")
        end += info.nbytes
    if end != size:
        raise broken(path, f"{end} bytes in all", f"{size} (is the download complete?)")
    return found


def _entry(path: Path, name: str, entry: Any, base: int) -> TensorInfo:
    try:
        code, shape = entry["dtype"], tuple(entry["shape"])
        start, end = entry["data_offsets"]
        good = all(type(n) is int and n >= 0 for n in (*shape, start, end))
        good = good and math.prod(n or 1 for n in shape) < 1 << 60
    except (KeyError, TypeError, ValueError):
        raise broken(path, f"dtype, shape and offsets for {name!r}", entry) from None
    dtype = DTYPES.get(code) if isinstance(code, str) else None
    if dtype is None:
        raise LayerwiseError(
            f"{path}, tensor {name!r}",
            allowed=f"a dtype of {', '.join(DTYPES)}",
            found=code,
            fix="convert the tensor to one of these, or install a newer layerwise",
        )
    if dtype in PACKED and good and shape and shape[-1] % PACKED[dtype] == 0:
        shape = (*shape[:-1], shape[-1] // PACKED[dtype])
    elif dtype in PACKED:
        good = False
    if not good or end - start != math.prod(shape) * dtype.itemsize:
        raise broken(path, f"offsets of {name!r} that fit its shape and dtype", entry)
    return TensorInfo(path, dtype, shape, base + start, end - start)


def read_tensor(info: TensorInfo) -> Tensor:
    """Read one tensor into memory of its own."""
    buffer = _pages(info.nbytes)
    if info.nbytes:
        with info.file.open("rb") as file:
            file.seek(info.start)
            got = file.readinto(buffer.numpy().data)
        if got != info.nbytes:
            raise broken(info.file, f"{info.nbytes} bytes from byte {info.start}", got)
    return buffer.view(info.dtype).reshape(info.shape)


def _pages(nbytes: int) -> Tensor:
    """Bytes; big ones in pages of their own, which go back to the system when they are freed."""
    if nbytes < BIG:
        return torch.empty(nbytes, dtype=torch.uint8)
    if "MADV_HUGEPAGE" not in dir(mmap):  # Linux alone has them
        return torch.empty(nbytes, dtype=torch.uint8)
    pages = mmap.mmap(-1, nbytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    pages.madvise(mmap.MADV_HUGEPAGE)  # faults of 4 kB each would take longer than reading
    return torch.frombuffer(pages, dtype=torch.uint8)


class Checkpoint:
    """A model folder: its configuration file and where every stored tensor lies."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        config = folder / "config.json"
        if not config.is_file():
            raise LayerwiseError(
                str(folder),
                allowed="a model folder with config.json and safetensors",
                found="no config.json",
                fix="give the folder that `save_pretrained` wrote, a hub id, or `demo`",
            )
        self.config = read_json(config)
        self.tensors = _stored_tensors(folder)
        beside = folder / ADAPTERS
        #: what single visits have of their own
        self.adapters = read_header(beside) if beside.is_file() else {}

    @property
    def nbytes(self) -> int:
        """Bytes of all stored tensors."""
        return sum(i.nbytes for i in (*self.tensors.values(), *self.adapters.values()))

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Read the named tensors.

        Raises:
            LayerwiseError: a weight is not a finite number.
        """
        wanted = list(names)
        if sum(self.tensors[name].nbytes for name in wanted) < BIG:
            return {name: self._one(name) for name in wanted}
        with ThreadPoolExecutor(2) as pool:
            return dict(zip(wanted, pool.map(self._one, wanted), strict=True))

    def _one(self, name: str) -> Tensor:
        tensor = read_tensor(self.tensors[name])
        if not is_finite(tensor):
            raise LayerwiseError(
                f"{self.tensors[name].file}, tensor {name!r}",
                allowed="finite weights",
                found="NaN or infinity",
                fix="take another copy of the checkpoint; this one cannot be measured",
            )
        return tensor

    def announce(self, names: Iterable[str]) -> None:
        """Let the system read tensors from the disk that will be asked for soon."""
        if "posix_fadvise" in dir(os):  # which takes half as long as reading
            infos = [self.tensors[name] for name in names]
            Thread(target=_advise, args=[infos], name="advice").start()

    @cached_property
    def structure(self) -> str:
        """sha256 of the canonical configuration and the sorted (name, shape, dtype)."""
        volatile = ("_name_or_path", "transformers_version", "dtype", "torch_dtype")
        config = {k: v for k, v in self.config.items() if k not in volatile}
        rows = sorted((n, list(i.shape), str(i.dtype)) for n, i in self.tensors.items())
        return hashlib.sha256(json.dumps([config, rows], sort_keys=True).encode()).hexdigest()

    @cached_property
    def weights(self) -> str:
        """sha256 of the sha256s of the tensors, in order of their names."""
        held = [*sorted(self.tensors.items()), *sorted(self.adapters.items())]
        files = sorted({info.file for _, info in held})
        stats = [file.stat() for file in files]
        stamps = tuple((s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns) for s in stats)
        return _weights(tuple(info for _, info in held), stamps)


def _advise(infos: Sequence[TensorInfo]) -> None:
    for path, own in groupby(infos, lambda info: info.file):
        with suppress(OSError), path.open("rb") as file:
            for info in own:
                os.posix_fadvise(file.fileno(), info.start, info.nbytes, os.POSIX_FADV_WILLNEED)


Stamps = tuple[tuple[int, int, int, int], ...]


@lru_cache(16)
def _weights(tensors: tuple[TensorInfo, ...], stamps: Stamps) -> str:
    """Hashed once while the files keep their stamps: per process, and what is long per user."""
    if sum(info.nbytes for info in tensors) < LONG:
        return _hashed(tensors)
    places = [(info.file.name, info.shape, info.start) for info in tensors]
    settled = time.time_ns() - max(changed for *_, changed in stamps) > SETTLED
    compute = partial(_hashed, tensors)
    return remembered("weights", repr((stamps, places)), compute) if settled else compute()


def _hashed(tensors: tuple[TensorInfo, ...]) -> str:
    def digest(info: TensorInfo) -> bytes:
        flat = read_tensor(info).reshape(-1).view(torch.uint8)
        return hashlib.sha256(flat.numpy().data).digest()

    total = hashlib.sha256()
    with ThreadPoolExecutor(2) as pool:
        for found in pool.map(digest, tensors):
            total.update(found)
    return total.hexdigest()


def is_finite(tensor: Tensor) -> bool:
    """Whether every element is a number; nearly always one sum tells."""
    if tensor.dtype in PACKED or not (tensor.is_floating_point() or tensor.is_complex()):
        return True
    wide = tensor.float() if tensor.dtype.itemsize < 4 else tensor
    return bool(torch.isfinite(wide.sum()) or torch.isfinite(wide).all())


def _stored_tensors(folder: Path) -> dict[str, TensorInfo]:
    """Where every tensor lies, as stock transformers finds them."""
    files, indexed = weight_files(folder)
    found: dict[str, TensorInfo] = {}
    for file in files:
        header = read_header(file)
        twice = sorted(found.keys() & header.keys())
        if twice:
            raise LayerwiseError(
                str(file),
                allowed="every tensor in one file",
                found=f"{twice[0]!r}, which is in {found[twice[0]].file.name} as well",
                fix="remove the file that does not belong to the model",
            )
        found |= header
    lost = [name for name in indexed if name not in found]
    if lost:
        raise broken(folder / INDEX, "tensors that are in the files", f"{lost[0]!r}, in none")
    return found
