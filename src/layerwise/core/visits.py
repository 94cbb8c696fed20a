"""Execution orders: how they are written.

A repeated layer is a second module with the same parameters and a cache slot of its own, so that
stock code runs it. What a visit leaves out (`core/absent.py`), reads in common with others
(`core/together.py`) or has of its own (`core/adapters.py`) is done by a function in the place of a
module's forward.
"""

import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from layerwise.core.errors import LayerwiseError, refusing
from layerwise.core.stack import Layer, LowRank, Visit, Wiring

_ITEM = re.compile(r"(\d+)(?:-(\d+))?(?:/([a-z_0-9]+(?:\+[a-z_][a-z_0-9]*)*))?(?:\*(\d+))?")
_TOGETHER = re.compile(r"\d+(?:\+\d+)+")
#: the longest order that is read
MOST_VISITS = 10_000


def parse_wiring(entries: Sequence[Any], depth: int, where: str) -> Wiring:
    """Read `[0, 1, 1, {layer: 3, copy: true}, {layer: 4, parts: [mlp]}, {parallel: [5, 6]}]`.

    `{layer: 2, mix: {2: -1, 3: 1, 4: 1}}` is a layer whose weights are that sum over layers, and
    `{layer: 2, adapter: {of: 5, rank: 8}}` one that is brought closer to layer 5.

    Raises:
        LayerwiseError: an entry is no layer of the stack.

    Example:
        >>> [v.layer for v in parse_wiring([0, 2, 2, {"parallel": [1, 3]}], 4, "wiring")]
        [0, 2, 2, 1, 3]
    """
    visits: list[Visit] = []
    if any(isinstance(entry, Visit) for entry in entries):
        entries = entries_of(tuple(entries))
    for entry in entries:
        together = _fields(entry, {"parallel"})
        members = together["parallel"] if together else [entry]
        if not isinstance(members, list | tuple) or len(members) < (2 if together else 1):
            raise _wrong(where, depth, entry)
        number = len(visits) if together else None
        visits += [_visit(member, depth, where, number) for member in members]
    if not visits:
        raise LayerwiseError(where, allowed="at least one layer", found="none", fix="keep one")
    return tuple(visits)


def _fields(entry: Any, known: set[str]) -> dict[str, Any] | None:
    """An entry as its fields, if it has any, and of these only known ones."""
    whole = isinstance(entry, Mapping) and entry and set(entry) <= known
    return dict(entry) if whole else None


def _visit(entry: Any, depth: int, where: str, number: int | None) -> Visit:
    given = {"copy": False, "parts": None, "mix": None, "adapter": None, "layer": entry}
    given |= _fields(entry, set(given)) or {}
    layer, parts = given["layer"], given["parts"]
    named = parts is None or (isinstance(parts, list | tuple) and len(parts) > 0)
    if type(layer) is not int or type(given["copy"]) is not bool or not named:
        raise _wrong(where, depth, entry)
    if not 0 <= layer < depth:
        raise _wrong(where, depth, entry)
    names = None if parts is None else tuple(map(str, parts))
    mix = None if given["mix"] is None else _mix(given["mix"], depth, where, entry)
    adapter = _adapter(given["adapter"], depth, where, entry)
    return Visit(layer, given["copy"], names, adapter, number, mix)


def _mix(given: Any, depth: int, where: str, entry: Any) -> tuple[tuple[int, float], ...]:
    """Layers and their shares, in the order of the layers, so that sums come out the same."""
    whole = isinstance(given, Mapping) and len(given) > 0
    for layer, share in given.items() if whole else ():
        whole &= type(layer) is int and 0 <= layer < depth
        whole &= type(share) in (int, float) and math.isfinite(share)
    if not whole:
        raise _wrong(where, depth, entry)
    return tuple(sorted(given.items()))


def _adapter(given: Any, depth: int, where: str, entry: Any) -> LowRank | str | None:
    """A name, or the layer that a visit is brought closer to and the rank of what is added."""
    if given is None or (isinstance(given, str) and given):
        return given
    fields = _fields(given, {"of", "rank"}) or {}
    of, rank = fields.get("of"), fields.get("rank")
    if type(of) is not int or type(rank) is not int or not 0 <= of < depth or rank < 0:
        raise _wrong(where, depth, entry)
    return LowRank(of, rank)


def _wrong(where: str, depth: int, entry: Any) -> LayerwiseError:
    return LayerwiseError(
        where,
        allowed=f"layer numbers from 0 to {depth - 1}, {{layer: n, copy: true, parts: [mlp]}}, "
        "{layer: n, mix: {n: 0.5, m: 0.5}}, {layer: n, adapter: {of: m, rank: 8}}, "
        "or {parallel: [n, m]}",
        found=entry,
        fix="correct the entry",
    )


def read_wiring(text: str) -> list[Any]:
    """An order as it is typed, as a plan has it.

    `6` or `0-5`; `6/mlp` for one part of it alone; `6+7` for both on the same input; `*2` behind
    any of these for twice in a row.

    Raises:
        LayerwiseError: an item is none of these.

    Example:
        >>> read_wiring("0-2,3*2,4/mlp,5+6")
        [0, 1, 2, 3, 3, {'layer': 4, 'parts': ['mlp']}, {'parallel': [5, 6]}]
    """
    entries: list[Any] = []
    for item in filter(None, (piece.strip() for piece in text.split(","))):
        entries += _item(item)
        if len(entries) > MOST_VISITS:
            break
    if not 0 < len(entries) <= MOST_VISITS:
        raise LayerwiseError(
            "--wiring",
            allowed=f"1 to {MOST_VISITS} visits, such as 0-5,6,6,7",
            found=text if not entries else f"more than {MOST_VISITS}",
            fix="name the layers in the order in which they run",
        )
    return entries


def _item(item: str) -> list[Any]:
    if _TOGETHER.fullmatch(item):
        return [{"parallel": [int(number) for number in item.split("+")]}]
    found = _ITEM.fullmatch(item)
    first, last = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
    times = int(found[4] or 1) if found else 0
    if found is None or last < first or times < 1 or (last - first + 1) * times > MOST_VISITS:
        raise LayerwiseError(
            "--wiring",
            allowed="items such as 6, 0-5, 6*2, 6/mlp and 6+7, with commas between them",
            found=item,
            fix="correct the item",
        )
    parts = found[3].split("+") if found[3] else None
    layers = range(first, last + 1)
    return [n if parts is None else {"layer": n, "parts": parts} for n in layers] * times


def entries_of(wiring: Wiring) -> list[Any]:
    """An order as a plan writes it.

    Example:
        >>> entries_of(parse_wiring([{"layer": 2, "parts": ["mlp"]}, {"parallel": [0, 1]}], 3, ""))
        [{'layer': 2, 'parts': ['mlp']}, {'parallel': [0, 1]}]
    """
    entries: list[Any] = []
    groups: dict[int, list[Any]] = {}
    for visit in wiring:
        more = {"copy": True} if visit.copy else {}
        more |= {"parts": list(visit.parts)} if visit.parts is not None else {}
        more |= {"mix": dict(visit.mix)} if visit.mix is not None else {}
        own = visit.adapter._asdict() if isinstance(visit.adapter, LowRank) else visit.adapter
        more |= {"adapter": own} if own is not None else {}
        entry = {"layer": visit.layer, **more} if more else visit.layer
        if visit.parallel is None:
            entries.append(entry)
        elif visit.parallel in groups:
            groups[visit.parallel].append(entry)
        else:
            groups[visit.parallel] = [entry]
            entries.append({"parallel": groups[visit.parallel]})
    return entries


def folded(entries: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """The layers that an order visits, each once, and the order in their numbers.

    Visits of one layer with different mixes are different layers. Adapters get the names under
    which they are stored: the number of the visit.

    Example:
        >>> folded([0, 3, 3, {"parallel": [5, 6]}])
        ([0, 3, 5, 6], [0, 1, 1, {'parallel': [2, 3]}])
    """
    wiring = parse_wiring(entries, sys.maxsize, "wiring")
    own = [Visit(visit.layer, mix=visit.mix) for visit in wiring]
    kept = sorted(dict.fromkeys(own), key=lambda visit: visit.layer)
    order = [replace(v, layer=kept.index(o), mix=None) for v, o in zip(wiring, own, strict=True)]
    named = [v if v.adapter is None else replace(v, adapter=str(n)) for n, v in enumerate(order)]
    return entries_of(tuple(kept)), entries_of(tuple(named))


def with_adapters(entries: Sequence[Any]) -> bool:
    """Whether a visit of an order has something of its own.

    Example:
        >>> with_adapters([0, {"layer": 0, "adapter": {"of": 1, "rank": 8}}]), with_adapters([0, 0])
        (True, False)
    """
    return any(v.adapter is not None for v in parse_wiring(entries, sys.maxsize, "wiring"))


def only_drops(entries: Sequence[Any]) -> bool:
    """Whether an order leaves layers out and does nothing else.

    Example:
        >>> only_drops([0, 2, 3]), only_drops([0, 1, 1]), only_drops([{"parallel": [0, 1]}])
        (True, False, False)
    """
    plain = all(type(entry) is int for entry in entries)
    return plain and list(entries) == sorted(set(entries))


def each_once(entries: Sequence[Any]) -> bool:
    """Whether layers run in their own order, each once at most, whole or in part.

    Example:
        >>> each_once([0, {"layer": 2, "parts": ["mlp"]}]), each_once([0, 1, 1]), each_once([1, 0])
        (True, False, False)
    """
    wiring = parse_wiring(entries, sys.maxsize, "wiring")
    own = all(v == Visit(v.layer, parts=v.parts) for v in wiring)
    layers = [visit.layer for visit in wiring]
    return own and layers == sorted(set(layers))


def is_plain(visit: Visit) -> bool:
    """Whether a visit runs the layer as stock code does."""
    return visit.parts is None and visit.parallel is None


def check_alike(layers: Sequence[Layer], wiring: Wiring) -> None:
    """Layers whose weights are added, or compared, must have the same tensors.

    Raises:
        LayerwiseError: they differ in a name or a shape.
    """
    for visit in wiring:
        others = [index for index, _ in visit.mix or ()]
        others += [visit.adapter.of] if isinstance(visit.adapter, LowRank) else []
        for index in others:
            if layers[visit.layer].shapes != layers[index].shapes:
                raise LayerwiseError(
                    f"wiring, mix or adapter of {layers[visit.layer].key}",
                    allowed="layers with the same tensors",
                    found=f"others in {layers[index].key}",
                    fix="put layers of one kind together",
                )


#: in a folder that keeps every layer once: the order in which they run, by stack
FOLDED = "wiring.yaml"


def read_folded(folder: Path) -> dict[str, list[Any]]:
    """The order that a folder of the target `compact` names; nothing in any other folder.

    Raises:
        LayerwiseError: the file holds no orders.
    """
    file = folder / FOLDED
    if not file.exists():
        return {}
    with refusing(str(file), allowed="an order of layers for each stack", fix="copy it again"):
        found = yaml.safe_load(file.read_text(encoding="utf-8"))
        whole = isinstance(found, dict) and all(isinstance(v, list) for v in found.values())
        if not whole:
            raise ValueError(f"{found}")
    return found
