"""Recording what a forward calls: which module, with what, in which order, and what came out."""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from transformers import Cache


class Call(NamedTuple):
    """One call of a module: what went in and came out; tensors are kept alive."""

    path: str
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any
    began: int
    ended: int


def tensors_in(tree: Any) -> list[Tensor]:
    """All tensors of a nest of tuples, lists and dictionaries."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def snapshot(tree: Any) -> Any:
    """Arguments as they are now: what a call changes beside its tensors is copied."""
    return tree_map(lambda leaf: copy.deepcopy(leaf) if isinstance(leaf, Cache) else leaf, tree)


def record_calls(modules: dict[str, nn.Module], run: Callable[[], Any]) -> list[Call]:
    """Run something and note every call of the given modules, in the order they begin."""
    calls: list[Call] = []
    clock = iter(range(1 << 60))
    open_calls: list[tuple[str, nn.Module, tuple, dict, int]] = []

    def enter(path: str) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            open_calls.append((path, module, *snapshot((args, kwargs)), next(clock)))

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
