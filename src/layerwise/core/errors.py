"""The one form of error that a user sees, and what another library raises put into it."""

import difflib
import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache


class LayerwiseError(Exception):
    """Say where something is wrong, what is allowed, what was found, and what to do.

    Args:
        where: the command, method, file or option, with layer and path where there are any.
        allowed: what would have been right.
        found: what came; always shown.
        fix: the next step for the person who reads it.

    Example:
        >>> print(LayerwiseError("gptq, bits", allowed="2 to 8", found=9, fix="choose fewer bits"))
        gptq, bits: allowed is 2 to 8; found 9. To mend it: choose fewer bits.
    """

    def __init__(self, where: str, *, allowed: str, found: object, fix: str) -> None:
        end = "" if fix.endswith("?") else "."
        shown = shortened(str(found).rstrip("."), 400)
        text = f"{where}: allowed is {allowed}; found {shown}. To mend it: {fix.rstrip('.')}{end}"
        super().__init__(printable(text))
        self.where, self.allowed, self.found, self.fix = where, allowed, found, fix


@contextmanager
def refusing(where: str, *, allowed: str, fix: str) -> Iterator[None]:
    """Turn whatever another library raises on a bad input into the one form of error.

    The first exception stays its cause, for those who read tracebacks.

    Raises:
        LayerwiseError: the block raised; an error that is one already passes through.

    Example:
        >>> with refusing("depth", allowed="a number", fix="write one"):
        ...     int("many")
        Traceback (most recent call last):
        layerwise.core.errors.LayerwiseError: depth: allowed is a number; found ValueError: ...
    """
    try:
        yield
    except LayerwiseError:
        raise
    except Exception as error:
        named = f"{type(error).__name__}: {first_line(error)}"
        found = (error.strerror or named) if isinstance(error, OSError) else named
        raise LayerwiseError(where, allowed=allowed, found=found, fix=fix) from error


def first_line(error: BaseException) -> str:
    """What an exception says, in one line; most libraries go on with advice of their own."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    head = lines[:2] if lines and lines[0].endswith(":") else lines[:1]
    return shortened(" ".join(head), 200)


def first_few(names: Sequence[str]) -> str:
    """The first three of some names, and how many more there are.

    Example:
        >>> first_few(["a", "b", "c", "d"])
        'a, b, c and 1 more'
    """
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


def shortened(text: str, limit: int) -> str:
    """A text of at most `limit` characters."""
    return text if len(text) <= limit else text[: limit - 1] + "…"


def printable(text: str) -> str:
    r"""A text that any terminal takes: what a file brought in cannot steer it.

    Example:
        >>> printable("a\x1b[2Jb\ud800")
        'a\\x1b[2Jb\\ud800'
    """
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def nearest(word: str, known: Iterable[str], otherwise: str) -> str:
    """What to do about a name that is not known: the nearest ones, if any is near.

    Example:
        >>> nearest("gptqq", ["gptq", "rtn"], "list them")
        'did you mean gptq?'
        >>> nearest("x", ["gptq", "rtn"], "list them")
        'list them'
    """
    near = difflib.get_close_matches(word, list(known), n=3)
    near = difflib.get_close_matches(word, near, n=1, cutoff=0.85) or near
    return f"did you mean {' or '.join(near)}?" if near else otherwise


@cache
def notice(text: str) -> None:
    """Tell the user something on stderr, every text once in a process."""
    logging.getLogger("layerwise").warning("note: %s", text)
