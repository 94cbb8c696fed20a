"""The registry: one record per method, made only by `@method`."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, NamedTuple, TypeVar, get_args, get_origin

from layerwise.core.errors import LayerwiseError, nearest

#: Positional arguments of every family; what follows `*` is an option of the method.
FAMILIES: dict[str, tuple[str, ...]] = {
    "measure": (),
    "score": ("stack", "stats"),
    "describe": ("stack", "stats"),
    "allocate": ("damage", "menus", "budget"),
    "search": ("space", "evaluate", "limit"),
    "rewrite": ("seam", "stats"),
    "weight": ("weight", "stats"),
    "layer": ("layer", "stats", "calls"),
    "activation": ("layer", "stats"),
    "stack": ("stack", "scores"),
    "slot": ("config",),
    "merge": ("base", "tuned"),
    "train": ("stack", "batch"),
    "run": ("stack",),
    "explain": ("op", "inputs", "output", "relevance"),
    "verify": ("original", "edited", "data"),
    "export": ("stack", "plan", "path"),
}


class Size(NamedTuple):
    """How much there is of a network and its data: what a method's cost depends on.

    `inside` and `outside` count the parameters in and beside the layers, `widest` is the largest
    smaller side of a matrix, `views` the perturbed documents and the copies of each.
    """

    layers: int
    matrices: int
    widest: int
    inside: int
    outside: int
    tokens: int
    views: tuple[int, int] = (0, 0)


#: what a method costs beyond the pass over the data, in words that follow its name; from the
#: sizes and the values of all its options
Cost = Callable[[Size, Mapping[str, Any]], str]
#: squared errors of a matrix under several settings of all options, without statistics
Errors = Callable[[Any, Sequence[Mapping[str, Any]]], list[float]]


@dataclass(frozen=True)
class Method:
    """A registered method: its function, where it belongs and what a user may set.

    The steps of a chain that follow it find under a name in `gives` another of its `needs`. An
    edit that goes `by_rows` makes of every row of a matrix what it makes of that row alone.
    """

    name: str
    family: str
    function: Callable[..., Any]
    aliases: tuple[str, ...]
    paper: str | None
    needs: tuple[str, ...]
    options: Mapping[str, inspect.Parameter]
    given: tuple[str, ...]
    cost: Cost | None = None
    gives: Mapping[str, str] = field(default_factory=dict)
    errors: Errors | None = None
    by_rows: bool = False

    def costs(self, size: Size, options: Mapping[str, Any]) -> str:
        """What it costs beyond the pass, with some options set; nothing if it costs no more."""
        return f"{self.name} {self.cost(size, self.values(options))}" if self.cost else ""

    def values(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """The values of all its options, with some of them set."""
        return {key: p.default for key, p in self.options.items()} | dict(options)

    @property
    def summary(self) -> str:
        """First line of the docstring."""
        return (inspect.getdoc(self.function) or "").partition("\n")[0]

    def bind(self, options: Mapping[str, Any] | None = None, **given: Any) -> Callable[..., Any]:
        """Fix the user's options, checked by name and type, and what the engine gives."""
        chosen = dict(options or {})
        for key, value in chosen.items():
            if key not in self.options:
                raise LayerwiseError(
                    f"{self.name}, option {key!r}",
                    allowed=", ".join(self.options) or "no option",
                    found=value,
                    fix=nearest(key, self.options, "the method's page lists its options"),
                )
            _check_type(self, key, value)
        needed = {key: value for key, value in given.items() if key in self.given}
        return partial(self.function, **chosen, **needed)


_METHODS: dict[str, Method] = {}
F = TypeVar("F", bound=Callable[..., Any])


def method(
    family: str,
    *,
    name: str | None = None,
    aliases: tuple[str, ...] = (),
    paper: str | None = None,
    needs: tuple[str, ...] = (),
    cost: Cost | None = None,
    gives: Mapping[str, str] = {},
    errors: Errors | None = None,
    by_rows: bool = False,
) -> Callable[[F], F]:
    """Register a function as a method of a family, under its own name.

    The signature is the configuration: positional arguments are the family's, keywords with a
    default are the user's options, keywords without one are given by the engine. What costs more
    than the pass over the data says so through `cost`, before it starts. An edit of a matrix may
    tell the `errors` of many settings at once, and goes `by_rows` if no row depends on another.

    Raises:
        LayerwiseError: the family is unknown, the positional arguments are not the family's, or
            the name or an alias is taken.
    """

    def register(function: F) -> F:
        title = name or function.__name__.rstrip("_")
        parameters = inspect.signature(function).parameters
        positional = tuple(
            key for key, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD
        )
        if positional != FAMILIES.get(family):
            raise LayerwiseError(
                f"@method({family!r}) on {title}",
                allowed=f"positional arguments {FAMILIES.get(family, tuple(FAMILIES))}",
                found=positional,
                fix="follow the family's signature and make the rest keyword-only",
            )
        keywords = {k: p for k, p in parameters.items() if p.kind is p.KEYWORD_ONLY}
        record = Method(
            name=title,
            family=family,
            function=function,
            aliases=aliases,
            paper=paper,
            needs=needs,
            options={k: p for k, p in keywords.items() if p.default is not p.empty},
            given=tuple(k for k, p in keywords.items() if p.default is p.empty),
            cost=cost,
            gives=gives,
            errors=errors,
            by_rows=by_rows,
        )
        for key in (title, *aliases):
            if key in _METHODS:
                raise LayerwiseError(
                    f"@method on {title}",
                    allowed="a name that is free",
                    found=f"{key!r}, taken by the {_METHODS[key].family} method of that name",
                    fix="choose another name or make it an option of that method",
                )
        _METHODS.update(dict.fromkeys((title, *aliases), record))
        return function

    return register


def methods(family: str | None = None) -> list[Method]:
    """All registered methods, each once, in order of family and name.

    Raises:
        LayerwiseError: there is no such family.
    """
    if family is not None and family not in FAMILIES:
        raise LayerwiseError(
            f"family {family!r}",
            allowed=", ".join(FAMILIES),
            found=family,
            fix=nearest(family, FAMILIES, "choose one of these"),
        )
    unique = {m.name: m for m in _METHODS.values() if family in (None, m.family)}
    order = list(FAMILIES)
    return sorted(unique.values(), key=lambda m: (order.index(m.family), m.name))


def find(name: str, *families: str | None) -> Method:
    """The method of a name or alias, in any of some families; in all without one.

    Raises:
        LayerwiseError: there is none in these families; the nearest names are shown.
    """
    wanted = [family for family in families if family]
    found = _METHODS.get(name)
    if found is None or (wanted and found.family not in wanted):
        names = [k for k, m in _METHODS.items() if not wanted or m.family in wanted]
        which = " or ".join(map(repr, wanted))
        raise LayerwiseError(
            f"method {name!r}",
            allowed=f"a method of family {which}" if wanted else "a registered method",
            found=name,
            fix=nearest(name, names, "`layerwise methods` lists them all"),
        )
    return found


def _check_type(record: Method, key: str, value: Any) -> None:
    default = record.options[key].default
    annotation = record.options[key].annotation
    if get_origin(annotation) is Literal and value not in get_args(annotation):
        raise LayerwiseError(
            f"{record.name}, option {key!r}",
            allowed=" or ".join(map(repr, get_args(annotation))),
            found=repr(value),
            fix="choose one of them",
        )
    if default is None or isinstance(default, tuple):
        return
    number = isinstance(default, float) and isinstance(value, int | float)
    if isinstance(value, bool) != isinstance(default, bool) or not (
        number or isinstance(value, type(default))
    ):
        raise LayerwiseError(
            f"{record.name}, option {key!r}",
            allowed=f"a value of type {type(default).__name__}, such as {default!r}",
            found=repr(value),
            fix="write the value in that form",
        )
