"""Parts and matrices of one layer, read off how its modules behave when its call is replayed."""

import math
from collections.abc import Iterable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from layerwise.core.calls import Call, record_calls, snapshot, tensors_in
from layerwise.core.hollow import ShortCircuit
from layerwise.core.stack import Matrix, Part

#: Names that settle a role where behaviour leaves it open.
HINTS = {
    "q": ("q_proj", "query", "q_lin", "wq", "q", "q_attn"),
    "k": ("k_proj", "key", "k_lin", "wk", "k"),
    "v": ("v_proj", "value", "v_lin", "wv", "v"),
    "qkv": ("qkv_proj", "query_key_value", "c_attn", "qkv", "wqkv"),
    "gate": ("gate_proj", "w1", "wi_0", "gate", "linear_v"),
    "up": ("up_proj", "w3", "wi_1", "up", "wi", "linear"),
    "gate_up": ("gate_up_proj", "up_gate_proj"),
}


class Use(NamedTuple):
    """One use of a weight: its parameter's path in the layer, input, output, orientation, and how
    many numbers of the parameter it takes.
    """

    parameter: str
    x: Tensor
    output: Tensor
    consumed_transposed: bool
    size: int
    conv: bool = False


def dissect(call: Call) -> tuple[tuple[Part, ...], list[Matrix]]:
    """Parts and matrices of one layer, by replaying its call on the hollow model."""
    layer = call.module
    where = {p.untyped_storage().data_ptr(): n for n, p in layer.named_parameters() if p.ndim > 1}
    shapes = {n: p.shape for n, p in layer.named_parameters()}
    uses: list[Use] = []

    def seen(x: Tensor, weight: Tensor, transposed: bool, output: Tensor, conv: bool) -> None:
        name = where.get(weight.untyped_storage().data_ptr())
        if name is not None and all(u.parameter != name for u in uses):
            uses.append(Use(name, x, output, transposed, weight.numel(), conv))

    with torch.no_grad(), ShortCircuit(seen):
        children = dict(_members(layer))
        args, kwargs = snapshot((call.args, call.kwargs))
        calls = record_calls(children, lambda: layer(*args, **kwargs))
    mixing = {c.path for c in calls if _mixes(c, call)}
    crossing = {c.path for c in calls if _crosses(c, call)} - mixing
    names = _part_names(children, mixing, crossing, uses)
    parts = tuple(
        Part(part, members[0] in mixing, tuple(members))
        for part, members in _inverse(names).items()
    )
    return parts, _matrices(uses, names, shapes)


def _members(layer: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The children of a layer; of a list, which nobody calls, those that it holds.

    What a list holds alone is the layer itself, in a wrapper.
    """
    for name, child in layer.named_children():
        if not isinstance(child, nn.ModuleList | nn.ModuleDict):
            yield name, child
            continue
        held = dict(child.named_children())
        for key, inner in held.items():
            if len(held) > 1:
                yield f"{name}.{key}", inner
            else:
                yield from ((f"{name}.{key}.{path}", own) for path, own in _members(inner))


def _owner(parameter: str, children: Iterable[str]) -> str:
    """The child that a parameter belongs to."""
    return next((c for c in children if parameter.startswith(f"{c}.")), "")


def _part_names(
    children: Iterable[str], mixing: set[str], crossing: set[str], uses: list[Use]
) -> dict[str, str]:
    """Child -> name of its part; only children that hold matrices belong to one."""
    owners = {u.parameter: _owner(u.parameter, children) for u in uses}
    names: dict[str, str] = {}
    for child in (c for c in children if c in owners.values()):
        names[child] = "mlp"
        if child in mixing | crossing:
            leaves = {_leaf(name) for name, owner in owners.items() if owner == child}
            attends = leaves & {n for role in ("q", "k", "v", "qkv") for n in HINTS[role]}
            title = "attention" if attends or "attn" in child or "attention" in child else "mixer"
            title = f"cross_{title}" if child in crossing else title
            count = sum(name.rstrip("0123456789") == title for name in names.values())
            names[child] = f"{title}{count + 1}" if count else title
    return names


def _inverse(names: dict[str, str]) -> dict[str, list[str]]:
    inverse: dict[str, list[str]] = {}
    for child, part in names.items():
        inverse.setdefault(part, []).append(child)
    return inverse


def _mixes(child: Call, layer: Call) -> bool:
    """Whether the last position of a module's output depends on the others of its input."""
    hidden = next((t for t in tensors_in((layer.args, layer.kwargs)) if t.ndim == 3), None)
    inputs = tensors_in((child.args, child.kwargs))
    x = next((t for t in inputs if hidden is not None and t.shape == hidden.shape), None)
    return x is not None and x.is_floating_point() and _depends(child, x, x, position=-1) is True


def _crosses(child: Call, layer: Call) -> bool:
    """Whether a module's output depends on all of another sequence that its layer received."""
    received = [t for t in tensors_in((layer.args, layer.kwargs)) if t.ndim == 3]
    other = [
        t
        for t in tensors_in((child.args, child.kwargs))
        if t.is_floating_point() and any(t is one for one in received[1:])
    ]
    return any(_depends(child, t, received[0], position=-1) is True for t in other)


def sees_ahead(layer: Call) -> bool:
    """Whether the first position of a layer's output depends on later ones.

    A stream may hold several states of every position, in an axis before it or behind it. Such
    states mix, and samples do not: positions are those of which the last alone sees the others.
    """
    inputs = [t for t in tensors_in((layer.args, layer.kwargs)) if t.is_floating_point()]
    if not inputs or inputs[0].ndim < 3:
        return True
    x = inputs[0]
    first, last = (partial(_depends, layer, x, x, position) for position in (0, -1))
    if first() is not True:
        return False
    return x.ndim == 3 or first(axis=-3) is not False or last(axis=-3) is not True


def _depends(child: Call, x: Tensor, like: Tensor, position: int, axis: int = -2) -> bool | None:
    """Whether one position of the output depends on the others of `x`; None if it cannot run.

    The output is the first tensor that has as many positions as `like`, along an axis of both.
    """
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(x.shape, generator=generator).to(x.dtype)
    second = torch.randn(x.shape, generator=generator).to(x.dtype)
    second.select(axis, position).copy_(first.select(axis, position))
    kept = []
    for value in (first, second):
        swapped = tree_map(
            lambda t, v=value: v.clone() if t is x else t, snapshot((child.args, child.kwargs))
        )
        try:
            with torch.no_grad(), ShortCircuit():
                out = child.module(*swapped[0], **swapped[1])
        except (RuntimeError, TypeError, ValueError, IndexError, AttributeError):
            return None
        found = [t for t in tensors_in(out) if t.shape[:-1] == like.shape[:-1]]
        if not found:
            return None
        kept.append(found[0].select(axis, position).float())
    return not torch.allclose(kept[0], kept[1], rtol=1e-4, atol=1e-6)


def _matrices(uses: list[Use], names: dict[str, str], shapes: dict) -> list[Matrix]:
    """Matrices with roles; the input and fusion groups are named after their first member."""
    rows: list[tuple[Use, str, str, str]] = []
    for use in uses:
        module = use.parameter.rpartition(".")[0]
        parent = module.rpartition(".")[0]
        alike = [u for u in uses if _same_memory(u.x, use.x)]
        fused = [
            u
            for u in alike
            if u.x is use.x and u.parameter.rpartition(".")[0].rpartition(".")[0] == parent
        ]
        part = names.get(_owner(use.parameter, names), "other")
        rows.append((use, part, alike[0].parameter, (fused or [use])[0].parameter))
    counts = {use.parameter: _experts(use, uses, shapes[use.parameter]) for use in uses}
    roles = _roles(rows, counts)
    matrices = []
    for (use, part, inputs, fusion), role in zip(rows, roles, strict=True):
        shape, count = shapes[use.parameter], counts[use.parameter]
        experts = range(count) if count else [None]
        below = [shape[0] // max(count, 1), *shape[1:]]
        tail = shape[1:] if count and len(shape) == 3 else below
        out, in_ = tail[0], math.prod(tail[1:])
        size = (in_, out) if use.consumed_transposed else (out, in_)
        for expert in experts:
            suffix = "" if expert is None else f"[{expert}]"
            matrices.append(
                Matrix(
                    layer="",
                    part=part,
                    role=role,
                    parameter=use.parameter,
                    expert=expert,
                    shape=size,
                    transposed=use.consumed_transposed,
                    inputs=f"{_title(rows, roles, inputs)}{suffix}",
                    fusion=_title(rows, roles, fusion),
                )
            )
    return matrices


def _experts(use: Use, uses: list[Use], shape: torch.Size) -> int:
    """How many experts a parameter holds: along an axis of its own, or one below the other where
    something else gives so many numbers for every token; 0 where it is one matrix.
    """
    if use.conv or len(shape) == 3:
        return 0 if use.conv else shape[0]
    count = shape.numel() // use.size
    routed = any(u.output.shape[-1] == count for u in uses if u.parameter != use.parameter)
    return count if routed and count > 1 and shape[0] % count == 0 else 0


def _same_memory(a: Tensor, b: Tensor) -> bool:
    return a is b or (
        a.data_ptr() == b.data_ptr()
        and a.numel() == b.numel()
        and a.stride()[-1:] == b.stride()[-1:]
        and a._version == b._version
    )


def _title(rows: list, roles: list[str], parameter: str) -> str:
    for (use, part, _, _), role in zip(rows, roles, strict=True):
        if use.parameter == parameter:
            return f"{part}.{role}"
    return parameter


def _roles(rows: list[tuple[Use, str, str, str]], counts: dict[str, int]) -> list[str]:
    """Roles by order in the part and by sharing an input; names only break ties."""
    roles: list[str] = []
    for use, part, _, fusion in rows:
        mine = [r for r in rows if r[1] == part]
        peers = [r for r in mine if r[3] == fusion]
        leaf = _leaf(use.parameter)
        hinted = next((role for role, known in HINTS.items() if leaf in known), None)
        last = mine[-1][0] is use and len(mine) > 1
        if part == "mlp":
            gated = hinted == "gate_up" or (hinted in ("gate", "up") and len(peers) > 1)
            routes = not counts[use.parameter] and any(
                counts[r[0].parameter] == use.output.shape[-1] for r in mine
            )
            role = "router" if routes else "down" if last else "up"
            role = hinted if gated and hinted and role == "up" else role
        elif last:
            role = "o"
        else:
            role = hinted or leaf
        roles.append(role)
    for i, (use, part, _, _) in enumerate(rows):
        if sum(r[1] == part and roles[j] == roles[i] for j, r in enumerate(rows)) > 1:
            roles[i] = _leaf(use.parameter) if roles[i] != _leaf(use.parameter) else roles[i]
    return _unique(rows, roles)


def _unique(rows: list[tuple[Use, str, str, str]], roles: list[str]) -> list[str]:
    seen: dict[tuple[str, str], int] = {}
    result = []
    for (_, part, _, _), role in zip(rows, roles, strict=True):
        count = seen[part, role] = seen.get((part, role), 0) + 1
        result.append(role if count == 1 else f"{role}{count}")
    return result


def _leaf(parameter: str) -> str:
    head, _, tail = parameter.rpartition(".")
    return head.rpartition(".")[2] if tail in ("weight", "") else tail
