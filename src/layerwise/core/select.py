"""Selectors: `stack/layers/part.matrix`, with `*` in any field, name matrices of a network."""

import re
from collections.abc import Iterable

from layerwise.core.errors import LayerwiseError, nearest
from layerwise.core.stack import Matrix


def _field(pattern: str, values: Iterable[str]) -> bool:
    regex = ".*".join(re.escape(piece) for piece in pattern.split("*"))
    return any(re.fullmatch(regex, value) for value in values)


def _range(pattern: str, index: int, where: str) -> bool:
    found = re.fullmatch(r"(?:\*|(\d+)(?:-(\d+))?)(?:/([1-9]\d*))?", pattern)
    if not found:
        raise LayerwiseError(
            f"selector {where!r}",
            allowed="stack/layers/part.matrix with layers such as 4, 3-7, 0-8/2 or *",
            found=pattern,
            fix="correct the middle field",
        )
    low, high = int(found[1] or 0), int(found[2] or found[1] or index)
    return low <= index <= high and (index - low) % int(found[3] or 1) == 0


def selects(pattern: str, matrix: Matrix) -> bool:
    """Whether a selector names a matrix: by role or by its own name, `*` in any field.

    Layers are a number, a range or `*`, with or without a step: `decoder/0-8/2/mlp`.

    Example:
        >>> m = Matrix("decoder/3", "mlp", "down", "mlp.down_proj.weight", None, (2, 2), False,
        ...            "", "")
        >>> selects("decoder/3-7/mlp.down", m), selects("*/0-2/*", m), selects("*/*/mlp", m)
        (True, False, True)
    """
    stack, layers, inner = [*pattern.split("/", 2), "*", "*"][:3]
    step, slash, rest = inner.partition("/")
    if step.isdecimal():
        layers, inner = f"{layers}/{step}", rest if slash else "*"
    name, _, number = matrix.layer.partition("/")
    if not _field(stack, [name]) or not _range(layers, int(number), pattern):
        return False
    own = matrix.parameter.removesuffix(".weight").rpartition(".")[2]
    part, dot, role = inner.partition(".")
    expert = "" if matrix.expert is None else f"[{matrix.expert}]"
    roles = (matrix.role, matrix.role + expert, own, own + expert)
    return _field(part, [matrix.part]) and (not dot or _field(role, roles))


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
