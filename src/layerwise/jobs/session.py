"""What every step of the main job needs: the model's tokenizer, data, budget and progress."""

import math
import re
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryFile
from typing import NamedTuple

from torch import nn
from transformers import AutoImageProcessor, AutoTokenizer

from layerwise.core.data import Texts
from layerwise.core.errors import LayerwiseError, refusing
from layerwise.core.network import Network
from layerwise.core.plan import DataSpec
from layerwise.core.reader import Reader
from layerwise.core.task import config_value, takes_images
from layerwise.core.trust import trusted

#: (what is done, steps done, steps in all)
Progress = Callable[[str, int, int], None]


def silent(what: str, done: int, total: int) -> None:
    """No progress."""


def load_reader(network: Network) -> Reader:
    """What turns documents into batches of a network: its tokenizer or image processor.

    Raises:
        LayerwiseError: there is none in its folder.
    """
    folder, module = network.folder or network.checkpoint.folder, network.module
    images = takes_images(module)
    config = network.model.config
    files = "preprocessor_config.json" if images else "tokenizer.json and tokenizer_config.json"
    with refusing(
        f"{'image processor' if images else 'tokenizer'} of {folder}",
        allowed=f"{files} beside config.json, without code of their own",
        fix="copy them from the original model",
    ):
        if images:
            processor = AutoImageProcessor.from_pretrained(
                folder, backend="pil", trust_remote_code=trusted("code")
            )
        else:
            processor = AutoTokenizer.from_pretrained(folder, trust_remote_code=trusted("code"))
            if not processor("a word", add_special_tokens=False)["input_ids"]:
                raise FileNotFoundError("a tokenizer without tokens")
    start = config_value(config, "decoder_start_token_id")
    start = config_value(config, "bos_token_id") if start is None else start
    classes = {str(name): int(number) for name, number in (config.label2id or {}).items()}
    rows = 0 if images else _embedding_rows(network.module)
    return Reader(network.task, processor, images, start or 0, classes, rows)


def _embedding_rows(module: nn.Module) -> int:
    """How many tokens a model knows; 0 where it does not tell."""
    try:
        return len(module.get_input_embeddings().weight)  # type: ignore[operator]
    except (NotImplementedError, AttributeError):
        return 0


def check_out(out: Path, option: str = "--out") -> Path:
    """The path of a result, once it is sure that it can be written; its folder is made.

    Raises:
        LayerwiseError: something is in its place, or its folder cannot be written to.
    """
    if out.is_dir():
        raise LayerwiseError(
            f"{option} {out}",
            allowed="a name for the result",
            found="a folder",
            fix="choose a name in it",
        )
    with refusing(
        f"{option} {out}",
        allowed="a name in a folder that can be written to",
        fix="choose another place, or make that folder writable",
    ):
        out.parent.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=out.parent).close()
    return out


def check_new(out: Path) -> None:
    """Make sure that a folder can be written where there is nothing yet.

    Raises:
        LayerwiseError: something is in its place, or its parent cannot be written to.
    """
    if out.exists():
        raise LayerwiseError(
            f"--out {out}",
            allowed="a new folder",
            found="one that exists",
            fix="choose another name or remove it",
        )
    check_out(out)


def texts_of(data: DataSpec) -> Texts:
    """The data a plan names."""
    return Texts(data.source, data.seed, data.samples, data.length)


class Budget(NamedTuple):
    """One upper bound, in one of its units."""

    size: float | None = None
    bytes: int | None = None
    bits: float | None = None
    depth: int | None = None
    sparsity: float | None = None
    flops: float | None = None
    speed: float | None = None
    kl: float | None = None

    def as_dict(self) -> dict[str, float]:
        """The one that is set, by its unit."""
        return {k: v for k, v in self._asdict().items() if v is not None}


_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY = {"k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}


def parse_bytes(text: str) -> int:
    """Bytes from `1200000`, `2GB` (10^9) or `2GiB` (2^30).

    Raises:
        LayerwiseError: the unit is unknown.

    Example:
        >>> parse_bytes("2GB"), parse_bytes("1.5 MiB")
        (2000000000, 1572864)
    """
    match = re.fullmatch(r"\s*(\d{1,18}(?:\.\d*)?)\s*([kmgt]?)(i?)b?\s*", text.lower())
    if not match or (match[3] and not match[2]):
        raise LayerwiseError(
            "--bytes",
            allowed="a number with B, kB, MB, GB, KiB, MiB or GiB",
            found=text,
            fix="write for instance 2GB or 1.5GiB",
        )
    return int(float(match[1]) * (_BINARY if match[3] else _UNITS)[match[2]])


def parse_share(text: str, option: str) -> float:
    """A share from `20%` or `0.2`.

    Example:
        >>> parse_share("20%", "--size")
        0.2
    """
    match = re.fullmatch(r"\s*(\d*\.?\d+|\d+\.)\s*(%?)\s*", text)
    value = float(match[1]) / (100 if match[2] else 1) if match else math.nan
    if not 0 < value <= 1:
        raise LayerwiseError(
            option,
            allowed="more than 0% and at most 100%",
            found=text,
            fix="write for instance 20%",
        )
    return value


def parse_speed(text: str) -> float:
    """How many times as fast, from `1.5x` or `1.5`.

    Example:
        >>> parse_speed("1.5x")
        1.5
    """
    match = re.fullmatch(r"\s*(\d{1,3}(?:\.\d+)?)\s*x?\s*", text)
    value = float(match[1]) if match else math.nan
    if not value > 1:
        raise LayerwiseError(
            "--speed", allowed="more than 1x", found=text, fix="write for instance 1.5x"
        )
    return value


def parse_positive(value: float, option: str, such_as: float) -> float:
    """Mean bits of a weight or a KL, checked.

    Raises:
        LayerwiseError: it is no positive number.
    """
    if not 0 < value < math.inf:
        raise LayerwiseError(
            option, allowed="a number above 0", found=value, fix=f"write for instance {such_as}"
        )
    return value
