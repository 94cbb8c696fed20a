"""Letting modules run something else than their own forward, or on other tensors, for a while."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map

from layerwise.core.stack import Layer


@contextmanager
def instead(
    layers: Iterable[Layer], forward: Callable[[Layer], Callable[..., Any]]
) -> Iterator[None]:
    """Let layers run something else than their own forward, until the block ends."""
    places: list[dict[str, Any]] = []
    kept: list[Any] = []
    try:
        for layer in layers:
            place: dict[str, Any] = vars(layer.module)
            new = forward(layer)
            kept.append(place.get("forward"))
            places.append(place)
            place["forward"] = new
        yield
    finally:
        for place, own in zip(reversed(places), reversed(kept), strict=True):
            place.pop("forward")
            place.update({} if own is None else {"forward": own})


def swapped(tree: Any, old: Tensor, new: Tensor) -> Any:
    """A nest with another tensor in the place of one of its own."""
    return tree if new is old else tree_map(lambda leaf: new if leaf is old else leaf, tree)


@contextmanager
def holding(module: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Let a module hold other tensors under its names, until the block ends."""
    places = [(*_place(module, name), new) for name, new in tensors.items()]
    kept = [held[leaf] for held, leaf, _ in places]
    try:
        for held, leaf, new in places:
            held[leaf] = new
        yield
    finally:
        for (held, leaf, _), before in zip(places, kept, strict=True):
            held[leaf] = before


def tensor_of(module: nn.Module, name: str) -> Tensor:
    """What a module holds under a name, at this moment."""
    held, leaf = _place(module, name)
    return held[leaf]


def _place(module: nn.Module, name: str) -> tuple[dict[str, Any], str]:
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    return owner._parameters if leaf in owner._parameters else owner._buffers, leaf
