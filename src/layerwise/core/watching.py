"""Function modes that also see what torch's own attention does inside."""

from types import FunctionType
from typing import Any

import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

#: torch's attention, which does not ask the modes that are open for the whole of it
_OPENED: Any = FunctionType(
    F.multi_head_attention_forward.__code__,
    F.__dict__ | {"has_torch_function": lambda tensors: False},
    argdefs=F.multi_head_attention_forward.__defaults__,
)


class Watching(TorchFunctionMode):
    """A mode whose `_call` is given every function, those inside of `nn.MultiheadAttention` too."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.multi_head_attention_forward:
            with self:
                return _OPENED(*args, **kwargs)
        return self._call(func, args, kwargs)

    def _call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What to do in the place of one function."""
        return func(*args, **kwargs)
