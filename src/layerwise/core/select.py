"""Selectors: `stack/layers/part.matrix`, with `*` in any field, name matrices of a network."""

import re
from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

from layerwise.core.errors import LayerwiseError, nearest
from layerwise.core.stack import Matrix


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
    own = matrix.parameter.removesuffix(".weight").rpartition(".")[2]
    expert = "" if matrix.expert is None else f"[{matrix.expert}]"
    return any(map(role.fullmatch, (matrix.role, matrix.role + expert, own, own + expert)))


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
