"""Opening a model folder, hub id or module: building it hollow, finding its stacks, rewiring it."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from layerwise.core.apart import tell_apart
from layerwise.core.arrange import adapters_of, arrange, check_rebuilt, stacks_named, stored_as
from layerwise.core.checkpoint import Checkpoint
from layerwise.core.config import model_class, read_config
from layerwise.core.errors import LayerwiseError, nearest, refusing
from layerwise.core.fold import Folds, joined
from layerwise.core.folder import find_folder
from layerwise.core.hollow import build_hollow
from layerwise.core.machine import has_bfloat16
from layerwise.core.module import examine, open_module
from layerwise.core.network import Network, fill
from layerwise.core.source import Source, check_stored
from layerwise.core.visits import check_alike, parse_wiring, read_folded
from layerwise.core.wiring import edited_config


def choose_device(name: str | torch.device = "auto") -> torch.device:
    """The device of a name, or itself; `auto` is CUDA if present.

    Raises:
        LayerwiseError: this machine has no such device.
    """
    name = str(name)
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


def choose_dtype(name: str | torch.dtype, stored: torch.dtype, device: torch.device) -> torch.dtype:
    """The type of a name, or itself.

    `stored` is the checkpoint's, but float16 becomes float32 on a CPU; `auto` is the same, but
    bfloat16 becomes float32 on a CPU that does not multiply in it.

    Raises:
        LayerwiseError: it is none to compute in.
    """
    name = str(name).removeprefix("torch.")
    if name in DTYPES:
        return getattr(torch, name)
    if name not in ("auto", "stored"):
        raise LayerwiseError(
            "dtype",
            allowed=f"auto, stored, {', '.join(DTYPES)}",
            found=name,
            fix=nearest(name, DTYPES, "choose one of these"),
        )
    if str(stored).removeprefix("torch.") not in DTYPES:
        raise LayerwiseError(
            f"dtype {name}",
            allowed=f"weights stored in {', '.join(DTYPES)}",
            found=stored,
            fix="say in which to compute, such as --dtype float32",
        )
    slow = stored == torch.bfloat16 and name == "auto" and not has_bfloat16()
    if device.type == "cpu" and (slow or stored == torch.float16):
        return torch.float32
    return stored


def open_network(
    model: str | Path | nn.Module,
    *,
    inputs: Mapping[str, Tensor] | None = None,
    wiring: Mapping[str, Sequence[Any]] | None = None,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
) -> Network:
    """Open a model folder, hub id or module as stacks of layers.

    Args:
        model: a folder, hub id, `demo`, or an `nn.Module`.
        inputs: example inputs of a module that is not a transformers language model.
        wiring: execution order per stack, as in a plan; else that of a `compact` folder.
        device: where to compute, `auto` for CUDA if present; a module stays where it is.
        dtype: in which type to compute; see `choose_dtype` for `auto` and `stored`. A module
            keeps its own.

    Raises:
        LayerwiseError: the folder, its files or its architecture cannot be used.
    """
    where = choose_device(device)
    if isinstance(model, nn.Module):
        return open_module(model, inputs, wiring)
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
        stacks, task = examine(module)
        stacks = tell_apart(stacks, source)
    network = Network(module, stacks, where, kept, task, source, folder=checkpoint.folder)
    paths = tuple(layer.path for stack in stacks for layer in stack.layers)
    network = replace(network, stored_layers=paths)
    chosen = wiring or read_folded(checkpoint.folder)
    if chosen:
        network = rewired(network, chosen)
    _bring_outside(network)
    return network


def widened(network: Network) -> Network:
    """The same network computing in float32, built as stock code builds it."""
    return _rebuilt(network, torch.float32, network.stored)


def refolded(
    network: Network, folds: Folds, exact: bool = False, config: PretrainedConfig | None = None
) -> Network:
    """The same network with more folds in its weights; if `exact`, in float32 and not rounded.

    With another configuration, of which these folds make up for the difference.
    """
    kind = torch.float32 if exact else network.dtype
    source = network.stored.with_folds(joined(network.stored.folds, folds), exact)
    return _rebuilt(network, kind, source, config)


def unrolled(network: Network) -> Network:
    """The same network whose visits share nothing: what each has of its own is in its tensors."""
    if not network.adapters:
        return network
    return _rebuilt(replace(network, unrolled=True), network.dtype, network.stored)


def _rebuilt(
    network: Network, kind: torch.dtype, source: Source, config: PretrainedConfig | None = None
) -> Network:
    shape = copy.deepcopy(config or network.model.config)
    if (source.model.all_tied_weights_keys or {}).keys() & source.folds.keys():
        shape.tie_word_embeddings = False
    network = replace(network, source=source, dtype=kind)
    module = build_hollow(type(network.model), shape, kind, stored_as(network))
    stacks, task = examine(module, known=network.stacks)
    found = replace(network, module=module, stacks=stacks, task=task)
    arrange(found)
    _bring_outside(found)
    return found


def rewired(network: Network, wiring: Mapping[str, Sequence[Any]]) -> Network:
    """The hollow network in another order of layers, built from its edited configuration.

    Lists of layer numbers in the configuration follow the layers if nothing else fits.

    Raises:
        LayerwiseError: the architecture cannot be built in that order.
    """
    kind, stacks = type(network.model), network.stacks
    chosen = stacks_named(stacks, wiring)
    orders = [parse_wiring(list(wiring[s.name]), len(s.layers), f"wiring {s.name}") for s in chosen]
    for stack, order in zip(chosen, orders, strict=True):
        check_alike(stack.layers, order)
    origins = {
        f"{stack.container}.{new}": stack.layers[visit.layer]
        for stack, order in zip(chosen, orders, strict=True)
        for new, visit in enumerate(order)
    }
    arranged = replace(
        network,
        before=network,
        origins={path: layer.path for path, layer in origins.items()},
        visits={
            f"{stack.container}.{new}": visit
            for stack, order in zip(chosen, orders, strict=True)
            for new, visit in enumerate(order)
        },
        orders=tuple(
            (len(stack.layers), tuple(visit.layer for visit in order))
            for stack, order in zip(chosen, orders, strict=True)
        ),
    )
    refused: LayerwiseError | None = None
    for renumber in (False, True):
        shape = copy.deepcopy(network.model.config)
        for stack, order in zip(chosen, orders, strict=True):
            shape = edited_config(kind, shape, stack, order, renumber)
        module = build_hollow(kind, shape, network.dtype, stored_as(arranged))
        rebuilt, task = examine(module, known=stacks)
        try:
            check_rebuilt(
                [s for s in rebuilt if s.container in {c.container for c in chosen}], origins
            )
        except LayerwiseError as error:
            refused = refused or error
            continue
        for path, layer in origins.items():
            _keep_numbers(module.get_submodule(path), layer.module)
        made = replace(arranged, module=module, stacks=rebuilt, task=task)
        made = replace(made, adapters=adapters_of(made))
        arrange(made)
        return made
    assert refused is not None
    raise refused


def _keep_numbers(module: nn.Module, origin: nn.Module) -> None:
    """Give a layer the fractions that its original was built with.

    Stock code computes some from the depth or from a layer's place, such as scales of the residual
    stream: a layer is what it was, wherever it runs. Whole numbers may be places that caches go
    by and stay as they are.
    """
    before = dict(origin.named_modules())
    for name, part in module.named_modules():
        for field, value in vars(before.get(name, part)).items():
            if type(value) is float and type(vars(part).get(field)) is float:
                setattr(part, field, value)


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


def _bring_outside(network: Network) -> None:
    """Load what belongs to no layer: embeddings, final norm, head; layers stay hollow there."""
    fill(network.model, network.fetch_outside(), network.device)
    network.model.tie_weights()
    for module in network.module.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(network.device)
    if network.device.type != "cpu":
        for layer in network.layers():
            network.drop(layer)
