"""Models without weights whose Python still runs on real values, and filling them in.

In a hollow model every parameter is a stride-0 view of one stored element. Calls that consume a
weight are short-circuited to a cheap result of the right shape: the mean of the input times a
ramp over the outputs, so that what depends on position still does.
"""

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig

from layerwise.core.checkpoint import Checkpoint
from layerwise.core.errors import refusing


def hollow_parameter(shape: torch.Size, dtype: torch.dtype) -> nn.Parameter:
    """A parameter of any shape that stores one element."""
    parameter = nn.Parameter(torch.ones(1, dtype=dtype).expand(shape), requires_grad=False)
    parameter._is_hf_initialized = True  # type: ignore[attr-defined]
    return parameter


def build_meta(
    kind: type[PreTrainedModel], config: PretrainedConfig, dtype: torch.dtype
) -> PreTrainedModel:
    """The module tree of a model, on the meta device, in evaluation mode."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
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
    uneven = 1 + torch.cos(torch.arange(width, dtype=torch.float32, device=x.device))
    steps = torch.linspace(-1, 1, size, dtype=torch.float32, device=x.device) + 0.1
    return ((x.float() @ uneven[:, None] / width) * steps).to(x.dtype)


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


class ShortCircuit(TorchFunctionMode):
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

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
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


class Source:
    """Reads a checkpoint into a model's own names, through transformers' conversion mapping."""

    def __init__(
        self,
        kind: type[PreTrainedModel],
        checkpoint: Checkpoint,
        config: PretrainedConfig,
        dtype: torch.dtype,
    ) -> None:
        self.checkpoint = checkpoint
        self.dtype = dtype
        self.model = build_meta(kind, config, dtype)
        self.mapping: list[Any] = get_model_conversion_mapping(self.model) or []
        known = self.model.state_dict()
        #: stored name -> (first) name in memory
        self.owner = {name: self._name_in_memory(name, known) for name in checkpoint.tensors}
        self.conversions = [c for c in self.mapping if c.was_used()]
        self._held = self._names_held()

    def _name_in_memory(self, name: str, known: dict[str, Tensor]) -> str:
        renamings = [m for m in self.mapping if isinstance(m, WeightRenaming)]
        converters = [m for m in self.mapping if isinstance(m, WeightConverter)]
        prefix = self.model.base_model_prefix
        renamed, _ = rename_source_key(name, renamings, converters, prefix, known)
        if renamed not in known and name in known:
            renamed, _ = rename_source_key(name, [], [], prefix, known)
        return renamed

    def _names_held(self) -> set[str]:
        """Every name in memory that comes from the checkpoint, itself or through a tie."""
        held = set(self.owner.values())
        for conversion in self.conversions:
            targets = conversion.target_patterns
            if isinstance(conversion, WeightConverter) and len(targets) > 1:
                first = [name for name in held if targets[0] in name]
                held |= {name.replace(targets[0], other) for name in first for other in targets}
        for name, origin in (self.model.all_tied_weights_keys or {}).items():
            if name in held or origin in held:
                held |= {name, origin}
        return held

    def is_stored(self, name: str) -> bool:
        """Whether a parameter of the model comes from the checkpoint (else it is computed)."""
        return name in self._held

    def unmatched(self) -> tuple[set[str], set[str]]:
        """Weights of the model that are not stored, and stored ones that it has no use for.

        By the rules of transformers, which knows what an architecture computes by itself.
        """
        known = self.model.state_dict().keys()
        info = SimpleNamespace(
            missing_keys=known - self._held, unexpected_keys=set(self.owner.values()) - known
        )
        self.model._adjust_missing_and_unexpected_keys(info)  # type: ignore[arg-type]
        return info.missing_keys, info.unexpected_keys

    def mismatched(self) -> list[tuple[str, tuple[int, ...], tuple[int, ...]]]:
        """Stored tensors that are taken as they are and have another shape than the model's."""
        known = self.model.state_dict()
        patterns = [m for m in self.conversions if isinstance(m, WeightConverter)]
        converted = {t for conversion in patterns for t in conversion.target_patterns}
        return [
            (stored, info.shape, tuple(known[name].shape))
            for stored, info in self.checkpoint.tensors.items()
            if (name := self.owner[stored]) in known
            and not any(target in name for target in converted)
            and info.shape != tuple(known[name].shape)
        ]

    def load(self, prefix: str, apart: tuple[str, ...] = ()) -> dict[str, Tensor]:
        """Tensors in memory whose name starts with `prefix` and with none of `apart`."""
        names = [
            stored
            for stored, name in self.owner.items()
            if name.startswith(prefix) and not name.startswith(apart)
        ]
        settings = LoadStateDictConfig(dtype=self.dtype, weight_mapping=self.mapping)
        with refusing(
            f"weights {prefix}* of {self.checkpoint.folder}",
            allowed=f"tensors that {type(self.model).__name__} can be filled with",
            fix="use the configuration that belongs to these weights",
        ):
            given = self.checkpoint.read(names)
            info, _ = convert_and_load_state_dict_in_model(self.model, given, settings)
            for wrong in (*info.mismatched_keys, *info.conversion_errors.items()):
                raise ValueError(" ".join(map(str, wrong)))
        return self._take(prefix, apart)

    def _take(self, prefix: str, apart: tuple[str, ...]) -> dict[str, Tensor]:
        """Everything that was just loaded, leaving the model on meta again."""
        taken: dict[str, Tensor] = {}
        for path, module in self.model.named_modules():
            for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
                if tensor is not None and tensor.device.type != "meta":
                    taken[f"{path}.{name}" if path else name] = tensor.data
                    empty = torch.empty_like(tensor, device="meta")
                    if name in module._parameters:
                        module._parameters[name] = nn.Parameter(empty, requires_grad=False)
                    else:
                        module._buffers[name] = empty
        return {n: t for n, t in taken.items() if n.startswith(prefix) and not n.startswith(apart)}
