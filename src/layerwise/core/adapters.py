"""What makes a visit of a shared layer differ: tensors of its own, and additions of low rank.

An adapter is by the name of a tensor inside the layer: a `Dense` takes its place, a `Product` is
added to it. Linear modules compute a product in its factors, `y = x W^T + (x A^T) B^T`; whatever
else holds the tensor is given the sum while the layer runs. So the shared tensors stay shared.
Under the name of a feed-forward module a `Routed` says which of its neurons a token runs.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layerwise.core.checkpoint import is_finite, read_header, read_tensor
from layerwise.core.errors import LayerwiseError
from layerwise.core.index import ADAPTERS
from layerwise.core.instead import holding, tensor_of
from layerwise.core.routing import Routed, route
from layerwise.core.shards import write_safetensors
from layerwise.core.stack import Layer
from layerwise.core.weight import Dense, Product, flatten

Own = Dense | Product | Routed
#: by the name of a tensor or a module inside a layer
Adapter = Mapping[str, Own]
Tensors = Mapping[str, Tensor]


def low_rank(own: Tensors, shared: Tensors, rank: int) -> dict[str, Own]:
    """The adapter that brings shared tensors closest to a layer's own, with products of a rank.

    `B A = U_r S_r V_r^T` of the singular values of `W - W'`, for every matrix (of every expert);
    vectors are the layer's own. So is a matrix whose factors would take no fewer bytes: the full
    rank is exact. What is equal needs nothing.

    Args:
        own: the tensors of the layer, by their names inside it.
        shared: those that it is to share.
        rank: of the products; 0 for vectors alone.

    Example:
        >>> own, shared = {"w": torch.diag(torch.tensor([3.0, 1.0, 1.0]))}, {"w": torch.eye(3)}
        >>> adapted(shared, low_rank(own, shared, 1))["w"].diag()
        tensor([3., 1., 1.])

    Reference: Bae et al., 2024, arXiv:2410.20672.
    """
    found: dict[str, Own] = {}
    for name, tensor in own.items():
        if not tensor.is_floating_point() or torch.equal(tensor, shared[name]):
            continue
        rows = tensor.flatten(1) if tensor.ndim > 3 else tensor
        out, width = rows.shape[-2:] if rows.ndim > 1 else (1, 1)
        if rows.ndim < 2 or rank * (out + width) >= out * width:
            found[name] = Dense(tensor)
        elif rank:
            wide = torch.promote_types(tensor.dtype, torch.float32)
            residual = rows.to(wide) - shared[name].reshape(rows.shape).to(wide)
            found[name] = _as(truncated(residual, rank), tensor)
    return found


def truncated(matrix: Tensor, rank: int) -> Product:
    """The nearest matrix of a rank, `U_r S_r` times `V_r^T`; of every expert."""
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    b = u[..., :rank] * s[..., None, :rank]
    return Product(Dense(b.contiguous()), Dense(v[..., :rank, :].contiguous()))


def _as(record: Own, like: Tensor) -> Own:
    """A record in the dtype and on the device of another tensor."""
    if isinstance(record, Routed):
        return Routed(record.router.to(like), record.bias.to(like), record.active)
    if isinstance(record, Dense):
        return Dense(record.value.to(like))
    return Product(Dense(record.a.dense().to(like)), Dense(record.b.dense().to(like)))


def adapted(shared: Tensors, adapter: Adapter) -> dict[str, Tensor]:
    """A layer's tensors with an adapter, as dense ones; summed in float32 and rounded once.

    Raises:
        LayerwiseError: a part is routed, which no dense tensor says.
    """
    for name, own in adapter.items():
        if isinstance(own, Routed):
            raise LayerwiseError(
                f"{name} of {len(own.router)} experts",
                allowed="target compact, which layerwise itself runs",
                found="a target that stock engines run",
                fix="keep the folder as it is",
            )
    return {**shared, **{name: _put(shared[name], own) for name, own in adapter.items()}}


def _put(shared: Tensor, own: Own) -> Tensor:
    if isinstance(own, Dense):
        return own.value.to(shared)
    assert isinstance(own, Product)
    wide = torch.promote_types(shared.dtype, torch.float32)
    added = own.a.dense().to(wide) @ own.b.dense().to(wide)
    return (shared.to(wide) + added.reshape(shared.shape)).to(shared.dtype)


@dataclass
class Factored:
    """A linear module with a product added to its matrix: `y = x W^T + b + (x A^T) B^T`."""

    forward: Callable[..., Tensor]
    b: Tensor
    a: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """The module's output."""
        return self.forward(x) + F.linear(F.linear(x, self.a), self.b)


@dataclass
class Adapted:
    """A layer that computes with some tensors of its own; they take their places while it runs."""

    module: nn.Module
    forward: Callable[..., Any]
    adapter: Adapter

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """One visit of the layer."""
        shared = {name: tensor_of(self.module, name) for name in self.adapter}
        with holding(self.module, adapted(shared, self.adapter)):
            return self.forward(*args, **kwargs)


def adapt(layer: Layer, adapter: Adapter, device: torch.device) -> None:
    """Let a layer run with an adapter; a module that is left out stays so.

    Raises:
        LayerwiseError: the layer has no such tensor, or one of another shape.
    """
    known = {**dict(layer.module.named_parameters()), **dict(layer.module.named_buffers())}
    first = next(layer.module.parameters(), torch.empty(0))
    rest: dict[str, Own] = {}
    for name, own in adapter.items():
        own = _as(own, torch.empty(0, dtype=known.get(name, first).dtype, device=device))
        if isinstance(own, Routed):
            route(layer, own)
            continue
        _check_fits(layer, name, own, known)
        owner = layer.module.get_submodule(name.rpartition(".")[0])
        if isinstance(own, Product) and type(owner) is nn.Linear:
            place: dict[str, Any] = vars(owner)
            if "forward" not in place:
                place["forward"] = Factored(owner.forward, own.a.dense(), own.b.dense())
        else:
            rest[name] = own
    if rest:
        forward = layer.module.forward
        vars(layer.module)["forward"] = Adapted(layer.module, forward, rest)


def _check_fits(layer: Layer, name: str, own: Dense | Product, known: Tensors) -> None:
    wanted = list(known[name].shape) if name in known else None
    if isinstance(own, Dense):
        shape, fits = list(own.value.shape), wanted == list(own.value.shape)
    else:
        a, b = own.a.dense(), own.b.dense()
        shape = [*a.shape[:-1], b.shape[-1]]
        flat = wanted and [wanted[0], known[name][0].numel()]
        fits = a.shape[-1:] == b.shape[-2:-1] and shape in (wanted, flat)
    if not fits:
        raise LayerwiseError(
            f"adapter of {layer.key}",
            allowed=f"tensors of it: {', '.join(known)}" if wanted is None else str(wanted),
            found=name if wanted is None else f"{shape} for {name}",
            fix="apply the plan again",
        )


def nbytes_of(adapter: Adapter) -> int:
    """Bytes of an adapter."""
    return sum(t.nbytes for own in adapter.values() for t in _tensors(own).values())


def _tensors(own: Own, prefix: str = "") -> dict[str, Tensor]:
    held = own.tensors() if isinstance(own, Routed) else flatten(own)[1]
    return {f"{prefix}{field}": tensor for field, tensor in held.items()}


def save_adapters(folder: Path, adapters: Mapping[str, Adapter]) -> int:
    """Keep adapters, by stack and visit, beside the layers that they are for; gives their bytes."""
    tensors: dict[str, Tensor] = {}
    for key, adapter in adapters.items():
        for name, own in (adapter or {"": Dense(torch.empty(0))}).items():
            tensors |= _tensors(own, f"{key}|{name}|")
    if tensors:
        write_safetensors(folder / ADAPTERS, tensors)
    return sum(tensor.nbytes for tensor in tensors.values())


def load_adapters(folder: Path) -> dict[str, dict[str, Own]]:
    """The adapters that lie in a folder, by stack and visit; none where there is no such file.

    Raises:
        LayerwiseError: a tensor is none of an adapter, or no finite number.
    """
    path = folder / ADAPTERS
    found: dict[str, dict[str, dict[str, Tensor]]] = {}
    for key, info in (read_header(path) if path.exists() else {}).items():
        tensor, words = read_tensor(info), key.split("|")
        if len(words) != 3:
            raise _broken(path, "names of a visit, a tensor and a factor", key)
        if not is_finite(tensor):
            raise _broken(path, "finite numbers", f"others in {key}")
        found.setdefault(words[0], {}).setdefault(words[1], {})[words[2]] = tensor
    return {k: {n: _record(path, t) for n, t in own.items() if n} for k, own in found.items()}


def _record(path: Path, held: Tensors) -> Own:
    if held.keys() == {"value"}:
        return Dense(held["value"])
    if held.keys() == {"a.value", "b.value"}:
        return Product(Dense(held["a.value"]), Dense(held["b.value"]))
    shapes = {field: tensor.ndim for field, tensor in held.items()}
    if shapes == {"router": 2, "bias": 1, "active": 1} and len(held["active"]) == 1:
        return Routed(held["router"], held["bias"], int(held["active"]))
    raise _broken(path, "a tensor, both factors of a product, or a router", ", ".join(held))


def _broken(path: Path, allowed: str, found: str) -> LayerwiseError:
    return LayerwiseError(str(path), allowed=allowed, found=found, fix="apply the plan again")
