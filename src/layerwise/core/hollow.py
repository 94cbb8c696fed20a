"""Models without weights whose Python still runs on real values, and filling them in.

In a hollow model every parameter is a stride-0 view of one stored element. Calls that consume a
weight are short-circuited to a cheap result of the right shape: the mean of the input times a
ramp over the outputs, so that what depends on position still does.
"""

import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PretrainedConfig, PreTrainedModel

from layerwise.core.watching import Watching


def hollow_parameter(
    shape: torch.Size, dtype: torch.dtype, device: torch.device | None = None
) -> nn.Parameter:
    """A parameter of any shape that stores one element."""
    one = torch.ones(1, dtype=dtype, device=device)
    parameter = nn.Parameter(one.expand(shape), requires_grad=False)
    parameter._is_hf_initialized = True  # type: ignore[attr-defined]
    return parameter


#: what fills a new weight, which on the meta device takes time and does nothing
_FILLS = {getattr(nn.init, name) for name in dir(nn.init) if re.fullmatch(r"[a-z]\w*_", name)} | {
    Tensor.uniform_,
    Tensor.normal_,
}


class _AtMost(TorchFunctionMode):
    """Ends the building of a model whose configuration asks for absurdly many tensors.

    What would fill them is skipped.
    """

    def __init__(self, calls: int) -> None:
        super().__init__()
        self.left = calls

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.left -= 1
        if self.left < 0:
            raise ValueError("more layers or experts than the stored tensors could fill")
        if func in _FILLS:
            return args[0] if args else (kwargs or {})["tensor"]
        return func(*args, **(kwargs or {}))


def build_meta(
    kind: type[PreTrainedModel],
    config: PretrainedConfig,
    dtype: torch.dtype,
    most_calls: int = 10**9,
) -> PreTrainedModel:
    """The module tree of a model, on the meta device, in evaluation mode.

    Raises:
        ValueError: building it takes more than `most_calls` calls of torch.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"), _AtMost(most_calls):
            return kind(config).eval()
    finally:
        torch.set_default_dtype(before)


def build_hollow(
    kind: type[PreTrainedModel],
    config: PretrainedConfig,
    dtype: torch.dtype,
    stored: Callable[[str], bool] = lambda name: True,
) -> PreTrainedModel:
    """A hollow model: stored parameters stride-0, buffers and computed parameters real."""
    model = build_meta(kind, config, dtype)
    wide = model._get_dtype_plan(dtype)
    replaced: dict[int, nn.Parameter] = {}
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        for name, p in module._parameters.items():
            if p is None:
                continue
            if id(p) not in replaced:
                kept = torch.float32 if any(key in prefix + name for key in wide) else p.dtype
                real = nn.Parameter(torch.empty(p.shape, dtype=kept), requires_grad=False)
                replaced[id(p)] = hollow_parameter(p.shape, kept) if stored(prefix + name) else real
            module._parameters[name] = replaced[id(p)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.zeros(buffer.shape, dtype=buffer.dtype)
    model.initialize_weights()
    model.tie_weights()
    return model


def is_hollow(tensor: Tensor) -> bool:
    """Whether a tensor is a view of one stored element."""
    return tensor.ndim > 0 and tensor.numel() > 1 and not any(tensor.stride())


def ramp(x: Tensor, size: int) -> Tensor:
    """The short-circuited result: a mean over the last axis times a ramp from -1 to 1.

    The mean is an uneven one: a layer norm before the call makes the even one 0.
    """
    width = x.shape[-1]
    return ((x.float() @ _uneven(width, x.device) / width) * _steps(size, x.device)).to(x.dtype)


@lru_cache(16)
def _uneven(width: int, device: torch.device) -> Tensor:
    return 1 + torch.cos(torch.arange(width, dtype=torch.float32, device=device))[:, None]


@lru_cache(16)
def _steps(size: int, device: torch.device) -> Tensor:
    return torch.linspace(-1, 1, size, dtype=torch.float32, device=device) + 0.1


#: function -> (argument of the input, argument of the weight, whether the weight is [in, out])
CONSUMERS: dict[Any, tuple[int, int, bool]] = {
    F.linear: (0, 1, False),
    torch.matmul: (0, 1, True),
    Tensor.matmul: (0, 1, True),
    Tensor.__matmul__: (0, 1, True),
    torch.mm: (0, 1, True),
    Tensor.mm: (0, 1, True),
    torch.bmm: (0, 1, True),
    Tensor.bmm: (0, 1, True),
    torch.addmm: (1, 2, True),
    torch.baddbmm: (1, 2, True),
    torch._grouped_mm: (0, 1, True),
    F.conv1d: (0, 1, False),
    F.conv2d: (0, 1, False),
}
if "grouped_mm" in dir(F):
    CONSUMERS[F.grouped_mm] = (0, 1, True)


CONVOLUTIONS = (F.conv1d, F.conv2d)


def conv_rows(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """The patches `[positions, in * height * width]` that a convolution multiplies.

    Empty for a convolution in groups, whose outputs do not all see the same input.
    """
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    given: dict[str, Any] = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1}
    given |= dict(zip(names, args, strict=False)) | dict(kwargs)
    x, weight = given["input"], given["weight"]
    if given["groups"] != 1 or given["padding"] == "same":
        return x.new_zeros(0, weight[0].numel())
    options = {n: given[n] for n in ("stride", "padding", "dilation")}
    options["padding"] = 0 if options["padding"] == "valid" else options["padding"]
    if func is F.conv1d:
        first = {k: v if isinstance(v, int) else v[0] for k, v in options.items()}
        options = {k: (0 if k == "padding" else 1, v) for k, v in first.items()}
        x, weight = x.unsqueeze(-2), weight.unsqueeze(-2)
    patches = F.unfold(x, weight.shape[2:], **options)
    return patches.transpose(1, 2).reshape(-1, patches.shape[1])


def operands(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple | None:
    """Input, weight and orientation of a call that may consume a weight, else None."""
    where = CONSUMERS.get(func)
    if where is None:
        return None
    x_at, w_at, transposed = where
    names = ("input", "weight") if not transposed else ("input", "mat2")
    x = args[x_at] if len(args) > x_at else kwargs.get(names[0])
    w = args[w_at] if len(args) > w_at else kwargs.get(names[1])
    if not isinstance(x, Tensor) or not isinstance(w, Tensor):
        return None
    return x, w, transposed


_FLIPS = {
    Tensor.T.__get__,  # pyright: ignore[reportAttributeAccessIssue]
    Tensor.mT.__get__,  # pyright: ignore[reportAttributeAccessIssue]
    Tensor.t,
    Tensor.transpose,
    Tensor.permute,
    torch.t,
    torch.transpose,
    torch.permute,
}


class ShortCircuit(Watching):
    """Replaces calls on hollow weights, and tells `seen(input, weight, transposed, output, conv)`.

    Convolutions run as they are. `transposed` is about the stored parameter: whether it is
    `[in, out]`. Strides of 0 do not show a transposition, so the views that make one are followed.
    """

    def __init__(
        self, seen: Callable[[Tensor, Tensor, bool, Tensor, bool], None] | None = None
    ) -> None:
        super().__init__()
        self.seen = seen
        self._flipped: dict[int, Tensor] = {}

    def _call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func in _FLIPS and is_hollow(args[0]):
            view = func(*args, **kwargs)
            if id(args[0]) not in self._flipped:
                self._flipped[id(view)] = view
            return view
        if func is F.embedding and is_hollow(args[1]):
            phase = args[0].to(torch.float32)[..., None] * 0.37 + 1
            return torch.sin(phase * torch.arange(1, args[1].shape[-1] + 1)).to(args[1].dtype)
        found = operands(func, args, kwargs)
        if found is None or not is_hollow(found[1]):
            return func(*args, **kwargs)
        x, weight, transposed = found
        if func in CONVOLUTIONS:
            output = func(*args, **kwargs)
        else:
            output = ramp(x, weight.shape[-1] if transposed else weight.shape[0])
        if self.seen is not None:
            turned = transposed != (id(weight) in self._flipped)
            self.seen(x, weight, turned, output, func in CONVOLUTIONS)
        return output
