"""Finding the stack by following the data: no table of architectures, one hollow forward.

A stack is a chain of calls in which a tensor that one call returns is a tensor that the next one
receives. What the modules inside a layer are for is read off how they behave.
"""

import copy
import math
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from transformers import Cache

from layerwise.core.errors import LayerwiseError
from layerwise.core.hollow import ShortCircuit
from layerwise.core.stack import Layer, Matrix, Part, Stack, plain_wiring

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


class Call(NamedTuple):
    """One call of a module: what went in and came out; tensors are kept alive."""

    path: str
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any
    began: int
    ended: int


class Use(NamedTuple):
    """One use of a weight: its parameter's path in the layer, input, output, orientation."""

    parameter: str
    x: Tensor
    output: Tensor
    consumed_transposed: bool
    conv: bool = False


def tensors_in(tree: Any) -> list[Tensor]:
    """All tensors of a nest of tuples, lists and dictionaries."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _snapshot(tree: Any) -> Any:
    """Arguments as they are now: what a call changes beside its tensors is copied."""
    return tree_map(lambda leaf: copy.deepcopy(leaf) if isinstance(leaf, Cache) else leaf, tree)


def record_calls(modules: dict[str, nn.Module], run: Callable[[], Any]) -> list[Call]:
    """Run something and note every call of the given modules, in the order they begin."""
    calls: list[Call] = []
    clock = iter(range(1 << 60))
    open_calls: list[tuple[str, nn.Module, tuple, dict, int]] = []

    def enter(path: str) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            open_calls.append((path, module, *_snapshot((args, kwargs)), next(clock)))

        return hook

    def leave(module: nn.Module, args: tuple, output: Any) -> None:
        path, module, args, kwargs, began = open_calls.pop()
        calls.append(Call(path, module, args, kwargs, output, began, next(clock)))

    handles = []
    unique: dict[int, str] = {}
    for path, module in modules.items():
        if unique.setdefault(id(module), path) == path:
            handles.append(module.register_forward_pre_hook(enter(path), with_kwargs=True))
            handles.append(module.register_forward_hook(leave))
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return sorted(calls, key=lambda call: call.began)


def find_chains(calls: list[Call]) -> list[list[Call]]:
    """Chains of calls of one container, each fed by a tensor that the last one returned."""
    chains: list[list[Call]] = []
    by_container: dict[str, list[Call]] = {}
    for call in calls:
        by_container.setdefault(call.path.rpartition(".")[0], []).append(call)
    for members in by_container.values():
        chain: list[Call] = []
        for call in members:
            feeding = {id(t) for t in tensors_in(chain[-1].output)} if chain else set()
            if chain and not feeding & {id(t) for t in tensors_in((call.args, call.kwargs))}:
                chains.append(chain)
                chain = []
            chain.append(call)
        chains.append(chain)
    return chains


def choose_stacks(chains: list[list[Call]]) -> list[list[Call]]:
    """The chains that are not inside a link of a chain at least as long; the longest first."""

    def inside(chain: list[Call], other: list[Call]) -> bool:
        first, last = chain[0].began, chain[-1].ended
        return any(link.began < first and last < link.ended for link in other)

    weighty = [c for c in chains if any(True for _ in c[0].module.parameters())]
    longest = sorted(weighty, key=lambda c: (-len(c), c[0].began))
    chosen: list[list[Call]] = []
    for chain in longest:
        if not any(inside(chain, other) or inside(other, chain) for other in chosen):
            chosen.append(chain)
    longest_length = len(chosen[0]) if chosen else 0
    return [c for c in chosen if len(c) > 1 or longest_length == 1]


def find_stacks(
    model: nn.Module, run: Callable[[], Any], containers: Collection[str] = ()
) -> list[Stack]:
    """Find the stacks of a hollow model, or those of known containers, by a trial forward.

    A stack whose layers let no position see a later one is a `decoder`, any other an `encoder`;
    the second of a name is `decoder2`. They come in the order in which they run.

    Raises:
        LayerwiseError: no container's members feed one another.
    """
    children = {
        f"{path}.{key}" if path else key: child
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList | nn.Sequential)
        for key, child in module.named_children()
    }
    with torch.no_grad(), ShortCircuit():
        found = find_chains(record_calls(children, run))
    known = [chain for chain in found if _container(chain) in containers]
    chains = sorted(known or choose_stacks(found), key=lambda chain: chain[0].began)
    if not chains:
        raise LayerwiseError(
            type(model).__name__,
            allowed="a network with a ModuleList or Sequential whose members feed one another",
            found=f"no such chain among {len(children)} modules",
            fix="give the network's stack of layers as an nn.Sequential",
        )
    anatomies: dict[Any, tuple[tuple[Part, ...], list[Matrix]]] = {}
    stacks: list[Stack] = []
    for title, chain in zip(_titles(chains), chains, strict=True):
        layers: dict[int, Layer] = {}
        visits = []
        for call in chain:
            if id(call.module) not in layers:
                layers[id(call.module)] = _layer(title, len(layers), call, anatomies)
            visits.append(layers[id(call.module)].index)
        wiring = plain_wiring(len(layers)) if len(layers) == len(chain) else _wiring(visits)
        stacks.append(Stack(title, _container(chain), tuple(layers.values()), wiring))
    return stacks


def _container(chain: list[Call]) -> str:
    return chain[0].path.rpartition(".")[0]


def _titles(chains: list[list[Call]]) -> list[str]:
    titles: list[str] = []
    for chain in chains:
        name = "encoder" if _sees_ahead(chain[0]) else "decoder"
        count = sum(title.rstrip("0123456789") == name for title in titles)
        titles.append(f"{name}{count + 1}" if count else name)
    return titles


def _wiring(visits: list[int]) -> Any:
    from layerwise.core.stack import Visit

    return tuple(Visit(i) for i in visits)


def _layer(stack: str, index: int, call: Call, anatomies: dict) -> Layer:
    signature = (
        type(call.module),
        tuple((n, p.shape) for n, p in call.module.named_parameters()),
    )
    if signature not in anatomies:
        anatomies[signature] = dissect(call)
    parts, found = anatomies[signature]
    key = f"{stack}/{index}"
    matrices = tuple(
        Matrix(
            layer=key,
            part=m.part,
            role=m.role,
            parameter=m.parameter,
            expert=m.expert,
            shape=m.shape,
            transposed=m.transposed,
            inputs=f"{key}/{m.inputs}",
            fusion=f"{key}/{m.fusion}",
        )
        for m in found
    )
    alone = isinstance(call.output, Tensor)
    return Layer(stack, index, call.path, call.module, parts, matrices, _keeps_shape(call), alone)


def _keeps_shape(call: Call) -> bool:
    """Whether a layer returns a hidden state of the shape that it received."""
    received = [t for t in tensors_in((call.args, call.kwargs)) if t.is_floating_point()]
    returned = [t for t in tensors_in(call.output) if t.is_floating_point()]
    return bool(received and returned) and received[0].shape == returned[0].shape


def dissect(call: Call) -> tuple[tuple[Part, ...], list[Matrix]]:
    """Parts and matrices of one layer, by replaying its call on the hollow model."""
    layer = call.module
    where = {p.untyped_storage().data_ptr(): n for n, p in layer.named_parameters() if p.ndim > 1}
    shapes = {n: p.shape for n, p in layer.named_parameters()}
    uses: list[Use] = []

    def seen(x: Tensor, weight: Tensor, transposed: bool, output: Tensor, conv: bool) -> None:
        name = where.get(weight.untyped_storage().data_ptr())
        if name is not None and all(u.parameter != name for u in uses):
            uses.append(Use(name, x, output, transposed, conv))

    with torch.no_grad(), ShortCircuit(seen):
        children = dict(layer.named_children())
        args, kwargs = _snapshot((call.args, call.kwargs))
        calls = record_calls(children, lambda: layer(*args, **kwargs))
    mixing = {c.path: _mixes(c, call) for c in calls}
    names = _part_names(children, mixing, uses)
    parts = tuple(
        Part(part, mixing.get(members[0], False), tuple(members))
        for part, members in _inverse(names).items()
    )
    return parts, _matrices(uses, names, shapes)


def _part_names(children: dict, mixing: dict[str, bool], uses: list[Use]) -> dict[str, str]:
    """Direct child -> name of its part; only children that hold matrices belong to one."""
    holding = [c for c in children if any(u.parameter.split(".")[0] == c for u in uses)]
    names: dict[str, str] = {}
    for child in holding:
        if mixing.get(child, False):
            leaves = {_leaf(u.parameter) for u in uses if u.parameter.split(".")[0] == child}
            attends = leaves & {n for role in ("q", "k", "v", "qkv") for n in HINTS[role]}
            title = "attention" if attends or "attn" in child or "attention" in child else "mixer"
            names[child] = title if title not in names.values() else f"cross_{title}"
        else:
            names[child] = "mlp"
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
    return x is not None and x.is_floating_point() and _depends(child, x, position=-1) is True


def _sees_ahead(layer: Call) -> bool:
    """Whether the first position of a layer's output depends on later ones; so do images."""
    inputs = [t for t in tensors_in((layer.args, layer.kwargs)) if t.is_floating_point()]
    if not inputs or inputs[0].ndim != 3:
        return True
    return _depends(layer, inputs[0], position=0) is True


def _depends(child: Call, x: Tensor, position: int) -> bool | None:
    """Whether one position of the output depends on the others of `x`; None if it cannot run."""
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(x.shape, generator=generator).to(x.dtype)
    second = torch.randn(x.shape, generator=generator).to(x.dtype)
    second[:, position] = first[:, position]
    kept = []
    for value in (first, second):
        swapped = tree_map(
            lambda t, v=value: v.clone() if t is x else t, _snapshot((child.args, child.kwargs))
        )
        try:
            with torch.no_grad(), ShortCircuit():
                out = child.module(*swapped[0], **swapped[1])
        except (RuntimeError, TypeError, ValueError, IndexError, AttributeError):
            return None
        found = [t for t in tensors_in(out) if t.ndim == 3 and t.shape[:2] == x.shape[:2]]
        if not found:
            return None
        kept.append(found[0][:, position].float())
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
        part = names.get(use.parameter.split(".")[0], "other")
        rows.append((use, part, alike[0].parameter, (fused or [use])[0].parameter))
    roles = _roles(rows, shapes)
    matrices = []
    for (use, part, inputs, fusion), role in zip(rows, roles, strict=True):
        shape = shapes[use.parameter]
        stacked = len(shape) == 3 and not use.conv
        experts = range(shape[0]) if stacked else [None]
        tail = shape[1:] if stacked else shape
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


def _roles(rows: list[tuple[Use, str, str, str]], shapes: dict) -> list[str]:
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
            routes = len(shapes[use.parameter]) == 2 and any(
                len(shapes[r[0].parameter]) == 3
                and shapes[r[0].parameter][0] == use.output.shape[-1]
                for r in mine
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
