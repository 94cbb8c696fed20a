"""What a target can hold, and what that costs in bytes."""

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from layerwise.core.hollow import ShortCircuit, build_hollow, ramp
from layerwise.core.network import Network
from layerwise.core.plan import Step
from layerwise.core.stack import Layer, Matrix
from layerwise.core.task import example_inputs, forward_arguments
from layerwise.core.weight import Dense, Weight


class Target(NamedTuple):
    """An export format as a planner sees it.

    `refuses` says why a matrix cannot take a chain there, or nothing; `nbytes` is the exact size
    of a matrix under a chain; `by_bits` tells whether fewer bits are fewer bytes; `bare` tells
    whether stock transformers loads what was edited as modules without a `weight`.

    `fused` tells whether matrices of a fusion group must share their option; `alike` gives what the
    chains of some matrices must have in common over the whole network, where these share one, and
    nothing for others. `method` edits matrices where nobody names another one; without it a plan
    leaves layers out instead. `types` are what a menu offers in place of bits and groups. `outside`
    gives, of a network and the plan's options of the export, what is written of tensors that belong
    to no layer, by their name in memory, and `rest` the bytes of all that is no matrix of a layer;
    `limits` says why the network does not let a matrix take a chain that its own shape takes;
    `accepts` refuses networks that the format does not know, and machines that lack what writes it.
    `folded` is a network whose weights hold what the format has no place for beside them. `rounds`
    tells whether readers round what an edit left of a matrix to the dtype of the weights, in
    whichever they compute. `engine` runs what was written: transformers, llama.cpp, or layerwise
    itself.
    """

    name: str
    by_bits: bool
    refuses: Callable[[Matrix, nn.Module, Sequence[Step]], str | None]
    nbytes: Callable[[Matrix, Sequence[Step], int], int]
    bare: bool = False
    fused: bool = True
    alike: Callable[[Matrix, Sequence[Step]], Hashable] = lambda *_: None
    method: str = "gptq"
    types: tuple[str, ...] = ()
    engine: Literal["transformers", "llama.cpp", "layerwise"] = "transformers"
    limits: Callable[[Network, Matrix, Sequence[Step]], str | None] = lambda *_: None
    accepts: Callable[[Network], None] = lambda network: None
    folded: Callable[[Network], Network] = lambda network: network
    rounds: Callable[[Matrix, Weight], bool] = lambda *_: False
    rest: Callable[[Network, Mapping[str, Any]], int] | None = None
    outside: Callable[[Network, Mapping[str, Any]], dict[str, Weight]] = lambda network, options: {}

    @property
    def once(self) -> bool:
        """Whether a layer that runs several times is written once."""
        return self.engine == "layerwise"


def stored_dense(dtype: torch.dtype, records: Mapping[str, Weight]) -> dict[str, Weight]:
    """Records as a dense target stores them: in one dtype."""
    return {key: Dense(record.dense().to(dtype)) for key, record in records.items()}


def as_read(
    target: Target, dtype: torch.dtype, layer: Layer, records: Mapping[str, Weight]
) -> dict[str, Weight]:
    """What readers of a target make of the records of a layer, whose weights have a dtype."""
    held = [matrix for matrix in layer.matrices if matrix.key in records]
    rounded = {m.key: records[m.key] for m in held if target.rounds(m, records[m.key])}
    return {**records, **stored_dense(dtype, rounded)}


#: why a matrix cannot take a chain, or nothing
Refuses = Callable[[Matrix, Sequence[Step]], str | None]


def refusals(target: Target, network: Network) -> Refuses:
    """What a target cannot hold of a network, because of its format or of the model's own code."""
    layers = {layer.key: layer for layer in network.layers()}
    read = weights_read(network) if target.bare else frozenset()
    early = target.bare and network.task == "seq2seq"

    def refuses(matrix: Matrix, chain: Sequence[Step]) -> str | None:
        layer, path = layers[matrix.layer], matrix.parameter.rpartition(".")[0]
        origin = f"{network.origins.get(layer.path, layer.path)}.{path}".rstrip(".")
        if chain and early:
            return "stock `generate` calls the encoder before its weights are unpacked"
        if chain and f"{layer.path}.{path}" in read:
            return f"stock {type(network.module).__name__} looks for its dense weight"
        module = network.stored.model.get_submodule(origin)
        return target.refuses(matrix, module, chain) or target.limits(network, matrix, chain)

    return refuses


def weights_read(network: Network) -> frozenset[str]:
    """Paths of linear modules whose weight is read by other code than their own forward.

    A hollow twin is set up and run as stock transformers does it.
    """
    found: set[int] = set()
    source, kind = network.stored, type(network.model)
    twin = build_hollow(kind, network.model.config, network.dtype, source.is_stored)
    linears = [m for m in twin.modules() if isinstance(m, nn.Linear)]
    with torch.no_grad(), ShortCircuit(), _watched(linears, found):
        for module in twin.modules():
            if not isinstance(module, nn.Linear):
                twin._init_weights(module)
        twin(**forward_arguments(twin, example_inputs(twin)))
    return frozenset(path for path, module in twin.named_modules() if id(module) in found)


@contextmanager
def _watched(modules: Sequence[nn.Linear], found: set[int]) -> Iterator[None]:
    """Note which modules are asked for their weight; their own forward does without."""
    kinds = [type(module) for module in modules]
    try:
        for module, kind in zip(modules, kinds, strict=True):
            size = module.out_features
            vars(module)["forward"] = lambda x, size=size: ramp(x, size)
            module.__class__ = _asking(kind, found)
        yield
    finally:
        for module, kind in zip(modules, kinds, strict=True):
            module.__class__ = kind
            vars(module).pop("forward", None)


def _asking(kind: type[nn.Linear], found: set[int]) -> Any:
    def look(self: nn.Linear, name: str) -> Any:
        if name == "weight":
            found.add(id(self))
        return kind.__getattr__(self, name)

    return type(kind.__name__, (kind,), {"__getattr__": look})
