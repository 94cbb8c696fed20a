"""What this machine has room for, and how it says that it has none left."""

import errno
import hashlib
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import NamedTemporaryFile

import torch
from torch import Tensor

from layerwise.core.errors import LayerwiseError

#: what is worth a place of its own
BIG = 1 << 20

#: errors of the file system that a user can mend, and how
_MENDING = {
    errno.ENOSPC: "free some space and run the same command again; finished layers are kept",
    errno.EDQUOT: "free some of your quota and run the same command again",
    errno.EROFS: "choose a folder on a file system that can be written",
    errno.EACCES: "choose a folder that you may write, or change its permissions",
    errno.EPERM: "choose a folder that you may write, or change its permissions",
    errno.ENOTDIR: "choose a path whose parents are folders",
    errno.EISDIR: "give a file, not a folder",
    errno.EIO: "check the disk, then run the same command again",
}


def told(error: OSError | MemoryError) -> LayerwiseError | None:
    """An error of the system in the one form, where a user can mend it."""
    if isinstance(error, MemoryError):
        return LayerwiseError(
            "memory", allowed="what this machine has", found="more", fix=_LESS_MEMORY
        )
    if error.errno not in _MENDING:
        return None
    return LayerwiseError(
        str(error.filename or "disk"),
        allowed="a place that can be written",
        found=error.strerror,
        fix=_MENDING[error.errno],
    )


_LESS_MEMORY = "use fewer --samples or a shorter --length, or a machine with more memory"


def write_whole(path: Path, text: str) -> None:
    """Write a text file that is there whole or not at all."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def has_bfloat16() -> bool:
    """Whether the processor multiplies in bfloat16; without, float32 is three or four times faster.

    Also false where it cannot be told.
    """
    known = (getattr(torch.cpu, name, None) for name in _BFLOAT16)
    return any(supported is not None and supported() for supported in known)


#: what tells of instructions on such numbers
_BFLOAT16 = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")


def remembered(kind: str, key: str, compute: Callable[[], str]) -> str:
    """A short text that takes long to compute, kept in the user's cache under all it depends on.

    The cache is `layerwise` in `$XDG_CACHE_HOME`, by default `~/.cache`; where it cannot be read
    or written, nothing is remembered.
    """
    home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    path = home / "layerwise" / kind / hashlib.sha256(key.encode()).hexdigest()
    with suppress(OSError, UnicodeDecodeError):
        if found := path.read_text(encoding="utf-8"):
            return found
    found = compute()
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, found)
    return found


def check_disk(folder: Path, needed: Mapping[str, int]) -> None:
    """Refuse, before anything is computed, what the disk under a folder cannot take.

    Raises:
        LayerwiseError: there is less room than the sum of what is needed.
    """
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    _check(f"disk of {folder.resolve()}", needed, free, "free some space or choose another --out")


def check_memory(needed: Mapping[str, int]) -> None:
    """Refuse, before the first layer, what the memory of this machine cannot hold.

    Raises:
        LayerwiseError: less is available than the sum of what is needed.
    """
    available = available_memory()
    if available:
        _check("memory", needed, available, _LESS_MEMORY)


def _check(where: str, needed: Mapping[str, int], room: int, fix: str) -> None:
    total = sum(needed.values())
    if total > room:
        parts = ", ".join(f"{name} {amount(n)}" for name, n in needed.items() if n)
        raise LayerwiseError(
            where,
            allowed=f"{amount(room)}, which are free",
            found=f"{amount(total)} needed: {parts}",
            fix=fix,
        )


def on_disk(tensor: Tensor) -> Tensor:
    """A big tensor in a file without a name, which the system drops with the tensor.

    It is read and written like any other, and takes no memory that cannot be given back.
    """
    if tensor.nbytes < BIG or tensor.device.type != "cpu":
        return tensor
    with NamedTemporaryFile(prefix="layerwise-") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, tensor.nbytes)
        except (OSError, AttributeError):
            return tensor  # no room there, or another system
        place = torch.from_file(file.name, True, tensor.numel(), dtype=tensor.dtype)
    return place.copy_(tensor.reshape(-1)).view(tensor.shape)


def amount(nbytes: float) -> str:
    """Bytes in the largest decimal unit.

    Example:
        >>> amount(1_230_000_000), amount(512)
        ('1.23 GB', '512 B')
    """
    for power, unit in ((9, "GB"), (6, "MB"), (3, "kB")):
        if abs(nbytes) >= 10**power:
            return f"{nbytes / 10**power:.2f} {unit}"
    return f"{nbytes:.0f} B"


def available_memory() -> int:
    """Bytes that can still be taken; 0 where the system does not tell."""
    known = dict(line.split(":", 1) for line in _lines("/proc/meminfo") if ":" in line)
    found = [1024 * int(known[key].split()[0]) for key in ("MemAvailable",) if key in known]
    limit, used = _lines("/sys/fs/cgroup/memory.max"), _lines("/sys/fs/cgroup/memory.current")
    if limit and used and limit[0].isdigit():
        found.append(int(limit[0]) - int(used[0]))
    return max(min(found), 0) if found else 0


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


@contextmanager
def quiet_stdout() -> Iterator[None]:
    """Let nothing reach stdout, neither from Python nor from libraries below it."""
    sys.stdout.flush()
    kept = os.dup(1)
    try:
        with Path(os.devnull).open("wb") as nowhere:
            os.dup2(nowhere.fileno(), 1)
            yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
