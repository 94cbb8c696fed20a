"""Selectors: `stack/layers/part.matrix`, with `*` in any field, name matrices of a network."""

import re
from collections.abc import Callable, Iterable
from functools import lru_cache
from operator import itemgetter
from typing import NamedTuple, TypeVar

from layerwise.core.errors import LayerwiseError, nearest
from layerwise.core.stack import Matrix

T = TypeVar("T")


class _Fields(NamedTuple):
    """A selector, taken apart; without a `role` it names whole parts."""

    stack: re.Pattern[str]
    first: int
    last: float
    step: int
    part: re.Pattern[str]
    role: re.Pattern[str] | None


@lru_cache(1 << 14)
def _fields(selector: str) -> _Fields:
    stack, layers, inner = [*selector.split("/", 2), "*", "*"][:3]
    step, slash, rest = inner.partition("/")
    if step.isdecimal():
        layers, inner = f"{layers}/{step}", rest if slash else "*"
    found = re.fullmatch(r"(?:\*|(\d+)(?:-(\d+))?)(?:/([1-9]\d*))?", layers)
    if not found:
        raise LayerwiseError(
            f"selector {selector!r}",
            allowed="stack/layers/part.matrix with layers such as 4, 3-7, 0-8/2 or *",
            found=layers,
            fix="correct the middle field",
        )
    first, last = int(found[1] or 0), float(found[2] or found[1] or "inf")
    part, dot, role = inner.partition(".")
    names = _words(stack), first, last, int(found[3] or 1)
    return _Fields(*names, _words(part), _words(role) if dot else None)


def _words(pattern: str) -> re.Pattern[str]:
    return re.compile(".*".join(re.escape(piece) for piece in pattern.split("*")))


def selects(pattern: str, matrix: Matrix) -> bool:
    """Whether a selector names a matrix: by role or by its own name, `*` in any field.

    Layers are a number, a range or `*`, with or without a step: `decoder/0-8/2/mlp`.

    Example:
        >>> m = Matrix("decoder/3", "mlp", "down", "mlp.down_proj.weight", None, (2, 2), False,
        ...            "", "")
        >>> selects("decoder/3-7/mlp.down", m), selects("*/0-2/*", m), selects("*/*/mlp", m)
        (True, False, True)
    """
    stack, first, last, step, part, role = _fields(pattern)
    name, _, number = matrix.layer.partition("/")
    index = int(number)
    if not first <= index <= last or (index - first) % step or not stack.fullmatch(name):
        return False
    if role is None or not part.fullmatch(matrix.part):
        return role is None and part.fullmatch(matrix.part) is not None
    return any(map(role.fullmatch, _names(matrix)))


def _names(matrix: Matrix) -> tuple[str, ...]:
    """What a matrix is called in its part: by its role or its own name, with its expert or not."""
    own = matrix.parameter.removesuffix(".weight").rpartition(".")[2]
    expert = "" if matrix.expert is None else f"[{matrix.expert}]"
    return matrix.role, matrix.role + expert, own, own + expert


def full_names(matrix: Matrix) -> list[str]:
    """The selectors that name a matrix in its layer alone."""
    return [f"{matrix.layer}/{matrix.part}.{name}" for name in _names(matrix)]


#: a selector of one matrix, or of experts of one name
_SINGLE = re.compile(r"[^*/]+/(?:0|[1-9]\d*)/[^*/.]+\.[^*]+")


def last_naming(pairs: Iterable[tuple[str, T]], otherwise: T) -> Callable[[Matrix], T]:
    """What the last selector that names a matrix stands for; selectors of single ones cost nothing.

    Example:
        >>> m = Matrix("decoder/3", "mlp", "down", "mlp.down_proj.weight", None, (2, 2), False,
        ...            "", "")
        >>> last_naming([("*/*/mlp", 1), ("decoder/3/mlp.down", 2), ("decoder/3/mlp.up", 3)], 0)(m)
        2
    """
    single: dict[str, tuple[int, T]] = {}
    several: list[tuple[int, str, T]] = []
    for number, (pattern, value) in enumerate(pairs):
        if _SINGLE.fullmatch(pattern):
            single[pattern] = number, value
        else:
            several.append((number, pattern, value))
    several.reverse()  # the last one counts

    def found(matrix: Matrix) -> T:
        own = (single[name] for name in full_names(matrix) if name in single)
        last, value = max(own, key=itemgetter(0), default=(-1, otherwise))
        later = (v for n, pattern, v in several if n > last and selects(pattern, matrix))
        return next(later, value)

    return found


def check_selector(pattern: str, matrices: Iterable[Matrix], where: str) -> None:
    """A selector must name something.

    Raises:
        LayerwiseError: it names nothing; the nearest names are shown.
    """
    found = list(matrices)
    if not any(selects(pattern, m) for m in found):
        names = sorted({f"{m.part}.{m.role}" for m in found})
        stacks = sorted({m.layer.partition("/")[0] for m in found})
        wanted = pattern.rpartition("/")[2]
        raise LayerwiseError(
            f"{where} {pattern!r}",
            allowed=f"stack/layers/part.matrix with stack {' or '.join(stacks)}, layers that are "
            f"there, and one of {', '.join(names)}",
            found="nothing of that name",
            fix=nearest(wanted, set(names) - {wanted}, "correct the selector"),
        )
