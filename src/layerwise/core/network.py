"""An opened network: its module, its stacks, and where the weights live."""

import copy
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from layerwise.core.checkpoint import Checkpoint
from layerwise.core.config import model_class, read_config
from layerwise.core.errors import LayerwiseError, nearest, refusing
from layerwise.core.find import find_stacks
from layerwise.core.folder import find_folder
from layerwise.core.hollow import build_hollow, hollow_parameter
from layerwise.core.source import Source, check_stored
from layerwise.core.stack import Layer, Stack
from layerwise.core.task import Task, example_inputs, forward_arguments, task_of
from layerwise.core.wiring import edited_config, parse_wiring

if TYPE_CHECKING:
    from layerwise.core.sites import At, Cache, Edits


@dataclass(frozen=True)
class Network:
    """A network opened as stacks of layers.

    Resident networks hold their weights; streamed ones (`source` is given) bring a layer's
    weights in when the walk reaches it and drop them behind it.
    """

    module: nn.Module
    stacks: tuple[Stack, ...]
    device: torch.device
    dtype: torch.dtype
    task: Task
    source: Source | None = None
    origins: Mapping[str, str] = field(default_factory=dict)
    #: paths of all layers of the checkpoint, those that a wiring leaves out as well
    stored_layers: tuple[str, ...] = ()
    #: (depth in the checkpoint, layers in their new order) of every rewired stack
    orders: tuple[tuple[int, tuple[int, ...]], ...] = ()

    @property
    def stack(self) -> Stack:
        """The longest stack, the first of equals; most networks have one."""
        return max(self.stacks, key=lambda stack: len(stack.layers))

    @property
    def stored(self) -> Source:
        """Where the weights are read from.

        Raises:
            LayerwiseError: the network was opened from a module in memory.
        """
        if self.source is None:
            raise LayerwiseError(
                type(self.module).__name__,
                allowed="a network opened from a checkpoint folder",
                found="a module in memory",
                fix="save it with `save_pretrained` and open the folder",
            )
        return self.source

    @property
    def checkpoint(self) -> Checkpoint:
        """The folder that the network was opened from."""
        return self.stored.checkpoint

    @property
    def model(self) -> PreTrainedModel:
        """The module as the transformers model that it is."""
        assert isinstance(self.module, PreTrainedModel)
        return self.module

    def layers(self) -> list[Layer]:
        """The layers of all stacks."""
        return [layer for stack in self.stacks for layer in stack.layers]

    def fetch(self, layer: Layer) -> dict[str, Tensor]:
        """The layer's tensors as stored, by their name inside the layer."""
        if self.source is None:
            return dict(layer.module.state_dict())
        origin = self.origins.get(layer.path, layer.path) + "."
        loaded = self.source.load(origin)
        return {name.removeprefix(origin): tensor for name, tensor in loaded.items()}

    def fetch_outside(self) -> dict[str, Tensor]:
        """The tensors as stored that belong to no layer: embeddings, final norm, head."""
        loaded = self.stored.load_apart("", tuple(f"{path}." for path in self.stored_layers))
        wanted = self.module.state_dict(keep_vars=True)
        return {n: self._rearranged(n, t, wanted[n]) for n, t in loaded.items() if n in wanted}

    def _rearranged(self, name: str, tensor: Tensor, wanted: Tensor) -> Tensor:
        """A tensor outside of the layers that has a block per layer, its blocks in new order."""
        if tensor.shape == wanted.shape:
            return tensor
        for depth, order in self.orders:
            for axis, (old, new) in enumerate(zip(tensor.shape, wanted.shape, strict=False)):
                if old != new and old % depth == 0 and old // depth * len(order) == new:
                    blocks = tensor.chunk(depth, axis)
                    return torch.cat([blocks[i] for i in order], axis)
        raise LayerwiseError(
            f"{self.checkpoint.folder}, tensor {name!r}",
            allowed=f"shape {list(wanted.shape)}",
            found=list(tensor.shape),
            fix="this depth needs other tensors outside of the layers; keep the layers",
        )

    def bring(self, layer: Layer) -> None:
        """Put the layer's real weights in place."""
        if self.source is not None:
            fill(layer.module, self.fetch(layer), self.device)

    def drop(self, layer: Layer) -> None:
        """Make a streamed layer hollow again."""
        if self.source is None:
            return
        freed = 0
        for module in layer.module.modules():
            for name, p in module._parameters.items():
                if p is not None:
                    freed += p.untyped_storage().nbytes()
                    module._parameters[name] = hollow_parameter(p.shape, p.dtype)
        self.source.forget(freed)

    def widened(self) -> "Network":
        """The same network computing in float32."""
        source, kind = self.stored, type(self.model)
        module = build_hollow(kind, self.model.config, torch.float32, source.is_stored)
        stacks, task = _examine(module, containers=[stack.container for stack in self.stacks])
        kind = torch.float32
        wide = replace(self, module=module, stacks=stacks, dtype=kind, task=task)
        _bring_outside(wide)
        return wide

    def inspect(self, texts: Any = None, **wanted: Any) -> Any:
        """Every layer measured in one pass, as a table; `layerwise.inspect` says what it takes.

        Args:
            texts: a `layerwise.core.data.Texts`; the standard library without.
            wanted: fields of `layerwise.jobs.wanted.Wanted`, such as `measures`.
        """
        from layerwise.core.data import Texts
        from layerwise.jobs.against import inspect_models
        from layerwise.jobs.wanted import Wanted

        return inspect_models(self, "", texts or Texts(), Wanted(**wanted))

    def run(self, batch: Mapping[str, Tensor], edits: "Edits" = (), grad: bool = False) -> Any:
        """The output for a batch, with changes at some sites; see `layerwise.intervene`.

        Example:
            >>> from layerwise.intervene import At, ablate
            >>> ids = torch.arange(8)[None]
            >>> output = open_network("demo").run({"input_ids": ids}, [ablate(At(3, "mlp"))])
        """
        from layerwise.core.intervene import run

        return run(self, batch, edits, grad)

    def cache(
        self,
        batch: Mapping[str, Tensor],
        sites: "Sequence[At]" = (),
        edits: "Edits" = (),
        grad: bool = False,
    ) -> "Cache":
        """What is at some sites in a run, by default the stream after every layer."""
        from layerwise.core.intervene import cache

        return cache(self, batch, sites, edits, grad)

    def edited(self, edits: "Edits") -> "AbstractContextManager[Any]":
        """A block in which everything that runs the model runs with changes, `generate` too."""
        from layerwise.core.intervene import edited

        return edited(self, edits)

    def load(self) -> "Network":
        """Fill in every layer, so that the network can be run many times."""
        for layer in self.layers():
            self.bring(layer)
        return Network(self.module, self.stacks, self.device, self.dtype, self.task)


def fill(module: nn.Module, tensors: Mapping[str, Tensor], device: torch.device) -> None:
    """Put tensors into a module's parameters and buffers, in the dtype that the module has."""
    for name, tensor in tensors.items():
        path, _, leaf = name.rpartition(".")
        owner = module.get_submodule(path)
        held: dict[str, Any] = owner._parameters if leaf in owner._parameters else owner._buffers
        before = held[leaf]
        moved = tensor.to(device, before.dtype if before is not None else tensor.dtype)
        if moved.untyped_storage().nbytes() != moved.nbytes:
            moved = moved.clone()  # a slice of a fused tensor would keep all of it
        held[leaf] = (
            nn.Parameter(moved, requires_grad=False) if held is owner._parameters else moved
        )


def choose_device(name: str = "auto") -> torch.device:
    """`auto` is CUDA if present.

    Raises:
        LayerwiseError: this machine has no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    count = torch.cuda.device_count()
    here = ["cpu", *(["cuda"] if count else []), *(f"cuda:{i}" for i in range(count))]
    if name not in here:
        raise LayerwiseError(
            "device",
            allowed=f"auto, {', '.join(here)} on this machine",
            found=name,
            fix="choose one of these",
        )
    return torch.device(name)


#: in what may be computed
DTYPES = ("float64", "float32", "bfloat16", "float16")


def choose_dtype(name: str, stored: torch.dtype, device: torch.device) -> torch.dtype:
    """`auto` is the checkpoint's, but float16 becomes float32 on a CPU.

    Raises:
        LayerwiseError: it is none to compute in.
    """
    if name != "auto" and name not in DTYPES:
        raise LayerwiseError(
            "dtype",
            allowed=f"auto, {', '.join(DTYPES)}",
            found=name,
            fix=nearest(name, DTYPES, "choose one of these"),
        )
    if name != "auto":
        return getattr(torch, name)
    if str(stored).removeprefix("torch.") not in DTYPES:
        raise LayerwiseError(
            "dtype auto",
            allowed=f"weights stored in {', '.join(DTYPES)}",
            found=stored,
            fix="say in which to compute, such as --dtype float32",
        )
    if stored == torch.float16 and device.type == "cpu":
        return torch.float32
    return stored


def open_network(
    model: str | Path | nn.Module,
    *,
    inputs: Mapping[str, Tensor] | None = None,
    wiring: Mapping[str, Sequence[Any]] | None = None,
    device: str = "auto",
    dtype: str = "auto",
) -> Network:
    """Open a model folder, hub id or module as stacks of layers.

    Args:
        model: a folder, hub id, `demo`, or an `nn.Module`.
        inputs: example inputs of a module that is not a transformers language model.
        wiring: execution order per stack, as in a plan; the network is built with that depth.
        device: where to compute, `auto` for CUDA if present.
        dtype: in which type to compute, `auto` for the checkpoint's.

    Raises:
        LayerwiseError: the folder, its files or its architecture cannot be used.
    """
    where = choose_device(device)
    if isinstance(model, nn.Module):
        return _open_module(model, inputs, where)
    checkpoint = Checkpoint(find_folder(model))
    config = read_config(checkpoint.folder)
    kind = model_class(config)
    stored = _stored_dtype(checkpoint, config)
    kept = choose_dtype(dtype, stored, where)
    with refusing(
        f"{checkpoint.folder / 'config.json'}",
        allowed=f"a configuration that {kind.__name__} can be built with and run on a short input",
        fix="compare it with the original's; if it is the original's, this architecture cannot be "
        "opened yet",
    ):
        source = Source(kind, checkpoint, copy.deepcopy(config), stored)
        check_stored(source)
        module = build_hollow(kind, copy.deepcopy(config), kept, source.is_stored)
        stacks, task = _examine(module)
    network = Network(module, stacks, where, kept, task, source)
    paths = tuple(layer.path for stack in stacks for layer in stack.layers)
    network = replace(network, stored_layers=paths)
    if wiring:
        network = rewired(network, wiring)
    _bring_outside(network)
    return network


def rewired(network: Network, wiring: Mapping[str, Sequence[Any]]) -> Network:
    """The hollow network in another order of layers, built from its edited configuration.

    Lists of layer numbers in the configuration follow the layers if nothing else fits.

    Raises:
        LayerwiseError: the architecture cannot be built in that order.
    """
    kind, stacks = type(network.model), network.stacks
    chosen = stacks_named(stacks, wiring)
    orders = [parse_wiring(list(wiring[s.name]), len(s.layers), f"wiring {s.name}") for s in chosen]
    origins = {
        f"{stack.container}.{new}": stack.layers[visit.layer]
        for stack, order in zip(chosen, orders, strict=True)
        for new, visit in enumerate(order)
    }
    refused: LayerwiseError | None = None
    for renumber in (False, True):
        shape = copy.deepcopy(network.model.config)
        for stack, order in zip(chosen, orders, strict=True):
            shape = edited_config(kind, shape, stack, order, renumber)
        module = build_hollow(kind, shape, network.dtype, network.stored.is_stored)
        rebuilt, task = _examine(module, containers=[stack.container for stack in stacks])
        try:
            check_rebuilt(
                [s for s in rebuilt if s.container in {c.container for c in chosen}], origins
            )
        except LayerwiseError as error:
            refused = refused or error
            continue
        return replace(
            network,
            module=module,
            stacks=rebuilt,
            task=task,
            origins={path: layer.path for path, layer in origins.items()},
            orders=tuple(
                (len(stack.layers), tuple(visit.layer for visit in order))
                for stack, order in zip(chosen, orders, strict=True)
            ),
        )
    assert refused is not None
    raise refused


def stacks_named(stacks: Sequence[Stack], names: Iterable[str]) -> list[Stack]:
    """The stacks of these names.

    Raises:
        LayerwiseError: there is none of a name.
    """
    known = {stack.name: stack for stack in stacks}
    for name in names:
        if name not in known:
            raise LayerwiseError(
                f"wiring of {name!r}", allowed=", ".join(known), found=name, fix="name a stack"
            )
    return [known[name] for name in names]


def check_rebuilt(stacks: Sequence[Stack], origins: Mapping[str, Layer]) -> None:
    """A layer of the rebuilt network must hold the tensors of the one that it stands for.

    Raises:
        LayerwiseError: the architecture decides by the index what a layer is.
    """
    for layer in (layer for stack in stacks for layer in stack.layers):
        before = origins.get(layer.path)
        here, there = (
            {n: p.shape for n, p in la.module.named_parameters()} if la else {}
            for la in (layer, before)
        )
        if before is None or here != there:
            name = before.key if before else "no layer"
            raise LayerwiseError(
                f"wiring, layer {layer.key}",
                allowed="layers that are of the same kind at their new place",
                found=f"{name} has other tensors than the architecture wants at {layer.path}",
                fix="drop layers so that the kinds keep their rhythm, such as whole periods",
            )


def _stored_dtype(checkpoint: Checkpoint, config: Any) -> torch.dtype:
    """The dtype of the weights: what the configuration says, else that of the first of them."""
    floats = [i.dtype for i in checkpoint.tensors.values() if i.dtype.is_floating_point]
    if not floats:
        raise LayerwiseError(
            str(checkpoint.folder),
            allowed="weights that are floating-point numbers",
            found=f"{len(checkpoint.tensors)} tensors, none of them",
            fix="take another copy of the checkpoint",
        )
    return config.dtype if isinstance(config.dtype, torch.dtype) else floats[0]


def _examine(
    module: nn.Module,
    inputs: Mapping[str, Tensor] | None = None,
    containers: Collection[str] = (),
) -> tuple[tuple[Stack, ...], Task]:
    """The stacks and the task of a hollow model, by one trial forward."""
    given = forward_arguments(module, example_inputs(module) if inputs is None else inputs)
    outputs: list[Any] = []
    stacks = tuple(find_stacks(module, lambda: outputs.append(module(**given)), containers))
    return stacks, task_of(module, outputs[0], stacks[-1].name.startswith("encoder"))


def _bring_outside(network: Network) -> None:
    """Load what belongs to no layer: embeddings, final norm, head."""
    fill(network.model, network.fetch_outside(), network.device)
    network.model.tie_weights()
    for module in network.module.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(network.device)


def _open_module(
    module: nn.Module, inputs: Mapping[str, Tensor] | None, device: torch.device
) -> Network:
    """Open a module that is already in memory; a hollow twin is examined in its place."""
    memo: dict[int, Any] = {id(p): hollow_parameter(p.shape, p.dtype) for p in module.parameters()}
    twin = copy.deepcopy(module, memo).eval()
    found, task = _examine(twin, inputs)
    own = dict(module.named_modules())
    stacks = tuple(
        Stack(
            s.name,
            s.container,
            tuple(replace(la, module=own[la.path]) for la in s.layers),
            s.wiring,
        )
        for s in found
    )
    first = next(module.parameters())
    return Network(module.eval(), stacks, first.device, first.dtype, task)
