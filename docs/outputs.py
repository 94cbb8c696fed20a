"""What the examples on a page print: run, and compared with what the page shows.

A block of `sh` or `python` is an example if a region follows it:

    <!-- output -->
    <!-- /output -->

The examples of a page run in order, in one temporary folder and one namespace. Commands of
layerwise run in this process, so that torch is imported once; a line may end in a pipe, as in
`layerwise plan demo --bits 3 | tail -n 2`.
"""

import io
import math
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import chdir, redirect_stderr, redirect_stdout
from itertools import zip_longest
from tempfile import TemporaryDirectory
from textwrap import shorten
from typing import Any

import torch

from layerwise.cli import app
from layerwise.core import open as opening

EXAMPLE = re.compile(
    r"(```(sh|python)\n((?:(?!```).)*)```\n<!-- output -->\n)(.*?)(<!-- /output -->)", re.S
)
FENCED = "```text\n{}\n```\n"

#: a number that stands alone, with its unit of bytes; `g128` or `decoder/3` is a word
FIGURE = re.compile(r"(?<![\w.:/-])(-?\d+(?:\.\d+)?(?:e[+-]?\d+)?)(?: ([kMG]?)B\b)?(?![\w/]|\.\d)")
SCALE = {"": 1, "k": 1e3, "M": 1e6, "G": 1e9}
#: a line or a column with one of these words holds figures of this machine and moment
CLOCK = re.compile(r"\b(seconds?|tokens/s|prefill|decode|memory)\b")
#: figures may differ by this share, for GPTQ's choices hang on a processor's last bits, and what
#: is measured of a solved model by more; below the floor lies what rounding leaves of zero
SHARE, MEASURED, FLOOR = 0.1, 0.25, 1e-4
INTERVAL = re.compile(r"\[\S+, \S+\]|% interval")
#: a line of a table: it goes on from the line above, or has three cells or more
TABULAR = re.compile(r"^  |\S  +\S.*\S  +\S")
#: examples run on the standard library, another text in every version; a page has to show which
VERSION = re.compile(r"Python (\d+\.\d+\.\d+)")
VERDICT = re.compile(r"The (naive )?plan('s| is) ")


def refreshed(page: str, tell: Callable[[str], None]) -> str:
    """The page with its outputs made anew if one of them differs; `tell` is told how it does."""
    if not EXAMPLE.search(page):
        return page
    torch.set_num_threads(1)  # sums in the same order, whatever the number of cores
    os.environ |= {"COLUMNS": "100", "NO_COLOR": "1", "CUDA_VISIBLE_DEVICES": ""}
    os.environ["OMP_NUM_THREADS"] = "1"  # of processes that examples start
    opening.has_bfloat16 = lambda: False  # products of the same type, whatever the processor
    same_text = set(VERSION.findall(page)) <= {platform.python_version()}
    names: dict[str, Any] = {}
    found = []

    def run(example: re.Match) -> str:
        head, language, code, shown, foot = example.groups()
        print(f"running {code.strip().splitlines()[0]}", file=sys.stderr)
        printed = FENCED.format(console(code) if language == "sh" else script(code, names))
        found.append(difference(shown, printed, same_text) if shown else "there was no output")
        return head + printed + foot

    with TemporaryDirectory() as folder, chdir(folder):
        fresh = EXAMPLE.sub(run, page)
    for drift in filter(None, found):
        tell(drift)
    return fresh if any(found) else page


def script(code: str, names: dict[str, Any]) -> str:
    """What a block of Python prints; what it names stays."""
    with redirect_stdout(io.StringIO()) as out:
        exec(code, names)
    return _trimmed(out.getvalue())


def console(commands: str) -> str:
    """What the commands of a block print, one after the other."""
    printed = ""
    for line in commands.replace("\\\n", "").splitlines():
        own, _, rest = line.partition(" | ")
        if own.startswith("layerwise "):
            text = _layerwise(shlex.split(own, comments=True)[1:])
            printed += _shell(rest, text) if rest else text
        else:
            printed += _shell(line, "")
    return _trimmed(printed)


def _layerwise(words: list[str]) -> str:
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
        status = app(words, prog_name="layerwise", standalone_mode=False)
    if status:
        raise SystemExit(f"layerwise {shlex.join(words)}: exit status {status}\n{err.getvalue()}")
    return out.getvalue()


def _shell(line: str, text: str) -> str:
    return subprocess.run(
        line, shell=True, input=text, stdout=subprocess.PIPE, text=True, check=True
    ).stdout


def _trimmed(text: str) -> str:
    return "\n".join(line.rstrip() for line in text.strip("\n").splitlines())


def difference(shown: str, printed: str, same_text: bool = True) -> str:
    """How two outputs differ, or nothing.

    Words and the shape of tables must be equal, figures only within `SHARE`, those beside an
    interval within `MEASURED`, and figures of time, speed and memory not at all. Where the page
    shows what came of another text, figures are not compared, nor what follows from them: how
    often a word occurs, and the verdict.
    """
    words = _words if same_text else _plain_words
    for old, new in zip_longest(_parts(shown), _parts(printed), fillvalue=""):
        for a, b in zip_longest(words(old), words(new), fillvalue="nothing"):
            if a != b:
                return f"{a} is now {b} in {shorten(old or new, 90)}"
        if same_text and not CLOCK.search(old):
            share = MEASURED if INTERVAL.search(old) else SHARE
            for a, b in zip(_figures(old), _figures(new), strict=True):
                if not math.isclose(a, b, rel_tol=share, abs_tol=FLOOR):
                    return f"{a:g} is now {b:g} in {shorten(old, 90)}"
    return ""


def _words(part: str) -> list[str]:
    return FIGURE.sub("#", part).split()


def _plain_words(part: str) -> list[str]:
    return sorted({word for word in _words(VERDICT.split(part)[0]) if re.fullmatch(r"\D+", word)})


def _figures(part: str) -> list[float]:
    return [float(number) * SCALE[unit] for number, unit in FIGURE.findall(part)]


def _parts(text: str) -> Iterator[str]:
    """Lines, and tables column by column, for how a cell is wrapped depends on its figures."""
    table: list[str] = []
    for line in [*text.splitlines(), ""]:
        if TABULAR.search(line):
            table.append(line)
            continue
        yield from _columns(table)
        table = []
        yield line


def _columns(lines: list[str]) -> Iterator[str]:
    width = max(map(len, lines), default=0)
    rows = [line.ljust(width) for line in lines]
    inked = "".join("x" if any(row[i] != " " for row in rows) else " " for i in range(width))
    for span in re.finditer(r"x+(?: x+)*", inked):
        yield " ".join(" ".join(row[slice(*span.span())] for row in rows).split())
