"""What the matrices of a layer receive, seen and changed at the operations that consume them."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from layerwise.core.hollow import operands
from layerwise.core.sites import Intervention
from layerwise.core.stack import Layer
from layerwise.core.watching import Watching

SOFTMAX = (F.softmax, torch.softmax, Tensor.softmax)


class MatrixInputs(Watching):
    """Hands what the matrices of a layer are about to receive to their interventions.

    Heads are counted where attention is computed, for the matrix that comes next: a call of scaled
    dot-product attention, or a softmax over scores `[batch, head, seq, keys]`.
    """

    def __init__(
        self,
        layer: Layer,
        todo: Mapping[str, Sequence[Intervention]],
        apply: Callable[[Iterable[Intervention], Tensor, int], Tensor],
        shape: torch.Size,
    ) -> None:
        super().__init__()
        parameters = dict(layer.module.named_parameters(remove_duplicate=False))
        self.todo = {
            parameters[m.parameter].untyped_storage().data_ptr(): todo.get(m.parameter, ())
            for m in layer.matrices
        }
        self.apply, self.shape, self.heads = apply, shape, 0

    def _call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func is F.scaled_dot_product_attention or func in SOFTMAX:
            self.heads = self._heads(args[0] if args else next(iter(kwargs.values())))
        found = operands(func, args, kwargs)
        if found is not None:
            x, weight, _ = found
            wanted = self.todo.get(weight.untyped_storage().data_ptr())
            if wanted is not None:
                new = self._changed(wanted, x)
                self.heads = 0
                args = tuple(new if a is x else a for a in args)
                kwargs = {k: new if v is x else v for k, v in kwargs.items()}
        return func(*args, **kwargs)

    def _heads(self, x: Tensor) -> int:
        """The heads of queries or scores `[batch, head, seq, any]`; the first two may be one."""
        batch, seq = self.shape[:2]
        if x.ndim not in (3, 4) or x.shape[-2] != seq:
            return self.heads
        heads, rest = divmod(x.shape[:-2].numel(), batch)
        return heads if not rest and (x.ndim == 3 or x.shape[0] == batch) else self.heads

    def _changed(self, wanted: Sequence[Intervention], x: Tensor) -> Tensor:
        tokens = self.shape[0] * self.shape[1] == x.shape[:-1].numel()
        rows = x.reshape(*self.shape[:2], -1) if tokens and x.ndim == 2 else x
        new = self.apply(wanted, rows, self.heads)
        return x if new is rows else new.reshape(x.shape)
