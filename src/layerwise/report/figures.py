"""Figures as text: as many digits as the interval, or the column, can carry."""

import math
from collections.abc import Iterable, Sequence
from numbers import Real
from typing import Any, NamedTuple

MINUS, TIMES, DASH = "\N{MINUS SIGN}", "\N{MULTIPLICATION SIGN}", "\N{EN DASH}"
UNITS = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


class Figure(NamedTuple):
    """A value and, where it was estimated, its 95% interval."""

    value: float
    low: float | None = None
    high: float | None = None

    @property
    def reach(self) -> tuple[float, ...]:
        """The finite ones among value, low and high: what a scale has to show."""
        return tuple(x for x in self if x is not None and math.isfinite(x))

    def over(self, unit: float) -> "Figure":
        """The same in another unit."""
        low = None if self.low is None else self.low / unit
        high = None if self.high is None else self.high / unit
        return Figure(self.value / unit, low, high)


class Text(NamedTuple):
    """A figure in words: the value, and the interval or an empty string."""

    value: str
    interval: str = ""

    def __str__(self) -> str:
        return f"{self.value} {self.interval}".rstrip()


def figure(given: Any) -> Figure | None:
    """A number or `[value, low, high]` as a figure; `None`, NaN and anything else as `None`.

    Example:
        >>> figure([2.0, 1.5, 2.5]).high
        2.5
        >>> figure(3).low, figure(None)
        (None, None)
    """
    if isinstance(given, Sequence) and not isinstance(given, str) and len(given) == 3:
        found = figure(given[0])
        low, high = figure(given[1]), figure(given[2])
        if found is None or low is None or high is None:
            return found
        return Figure(found.value, low.value, high.value)
    if isinstance(given, Real) and not isinstance(given, bool) and not math.isnan(given):
        return Figure(float(given))
    return None


def magnitude(x: float) -> int:
    """The power of ten of the first digit of `x`, 0 for 0."""
    return math.floor(math.log10(abs(x))) if x and math.isfinite(x) else 0


def number(x: float, decimals: int) -> str:
    """`x` with so many decimals, or as a power of ten where those would not show it.

    Example:
        >>> number(1234.5, 0), number(0.02131, 4), number(2.13e-9, 3)
        ('1,234', '0.0213', '2.1×10⁻⁹')
    """
    if not math.isfinite(x):
        return "∞" if x > 0 else f"{MINUS}∞"
    if x and abs(x) < 1e-3 and (decimals > 6 or not round(x, decimals)):
        power = magnitude(x)
        first, raised = f"{x / 10.0**power:.1f}", str(power).translate(SUPERSCRIPTS)
        return f"{first}{TIMES}10{raised}".replace("-", MINUS)
    decimals = 2 - magnitude(x) if decimals > 6 else decimals
    return f"{x:,.{max(0, min(decimals, 6))}f}".replace("-", MINUS)


def decimals_of(found: Figure) -> int:
    """Two digits of the interval's width; three of the value where there is no interval."""
    low, high = found.low, found.high
    if low is not None and high is not None and math.isfinite(high - low) and high > low:
        return 1 - magnitude(high - low)
    return 2 - magnitude(found.value)


def column_decimals(found: Iterable[Figure | None]) -> int | None:
    """Decimals for a column: three digits of the largest; `None`, each its own, over 4 decades."""
    sizes = [abs(f.value) for f in found if f and f.value and math.isfinite(f.value)]
    if not sizes:
        return 0
    if max(sizes) > 1e4 * min(sizes):
        return None
    most, least = 2 - magnitude(max(sizes)), 1 - magnitude(min(sizes))
    return max(0, most, min(least, most + 1))


def words(found: Figure, unit: float = 1, suffix: str = "", decimals: int | None = None) -> Text:
    """A figure in units of `unit`, its interval with the same decimals.

    Example:
        >>> str(words(Figure(0.02131, 0.0191, 0.0238)))
        '0.0213 [0.0191, 0.0238]'
        >>> str(words(Figure(0.974, 0.971, 0.977), unit=0.01, suffix="%"))
        '97.40% [97.10, 97.70]'
    """
    scaled = found.over(unit)
    digits = decimals_of(scaled) if decimals is None else decimals
    value = number(scaled.value, digits) + suffix
    if scaled.low is None or scaled.high is None:
        return Text(value)
    return Text(value, f"[{number(scaled.low, digits)}, {number(scaled.high, digits)}]")


def byte_unit(most: float) -> tuple[float, str]:
    """The decimal unit in which `most` bytes are read best."""
    return next(((unit, name) for unit, name in UNITS if most >= unit), (1, "bytes"))


def size(nbytes: float) -> str:
    """Bytes in words.

    Example:
        >>> size(15217152), size(512)
        ('15.2 MB', '512 bytes')
    """
    unit, name = byte_unit(nbytes)
    return f"{number(nbytes / unit, 0 if unit == 1 else 2 - magnitude(nbytes / unit))} {name}"


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round values that cover `low` to `high`.

    Example:
        >>> ticks(0, 15.2)
        [0.0, 5.0, 10.0, 15.0]
    """
    if not high > low:
        return [low]
    step = 10.0 ** magnitude((high - low) / most)
    step = next(step * m for m in (1, 2, 5, 10, 20) if (high - low) / (step * m) <= most - 1)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Round values over a logarithmic range: 1, 2, 5 where it is short, else decades."""
    short = high / low < 1e3
    steps = (1, 2, 5) if short else (1,)
    powers = range(magnitude(low), magnitude(high) + 1)
    return [m * 10.0**p for p in powers for m in steps if low <= m * 10.0**p <= high]
