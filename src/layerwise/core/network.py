"""An opened network: its module, its stacks, and where the weights live."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from layerwise.core.adapters import Adapter, adapted
from layerwise.core.checkpoint import Checkpoint
from layerwise.core.errors import LayerwiseError
from layerwise.core.hollow import hollow_parameter, is_hollow
from layerwise.core.source import Source
from layerwise.core.stack import Layer, Stack, Visit
from layerwise.core.task import Task

if TYPE_CHECKING:
    from layerwise.core.sites import At, Cache, Edits


@dataclass(frozen=True, repr=False)
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
    #: path of every layer of a rewired stack -> the visit that it is
    visits: Mapping[str, Visit] = field(default_factory=dict)
    #: path of a layer -> what this visit has of its own beside the tensors that it shares;
    #: `unrolled`, it is put into the tensors, which then are shared no more
    adapters: Mapping[str, Adapter] = field(default_factory=dict)
    unrolled: bool = False
    #: where tokenizer and configuration lie, of a network that was opened from a folder
    folder: Path | None = None
    #: the network that this one is another order of, without what lies outside of its layers
    before: "Network | None" = None

    def __repr__(self) -> str:
        stacks = ", ".join(f"{s.name} of {len(s.wiring)} layers" for s in self.stacks)
        kind, dtype = type(self.module).__name__, str(self.dtype).removeprefix("torch.")
        where = f" of {self.folder}" if self.folder else ""
        return f"<Network {kind}{where}: {stacks}; {self.task}, {dtype} on {self.device}>"

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
        own = self.adapters.get(layer.path, {}) if self.unrolled else {}
        return adapted(self.fetch_shared(layer), own)

    def fetch_shared(self, layer: Layer) -> dict[str, Tensor]:
        """The layer's tensors as stored, without what a visit has of its own."""
        visit = self.visits.get(layer.path)
        if visit is None or visit.mix is None:
            return self._read(self.origins.get(layer.path, layer.path))
        return mixed((self.fetch_other(layer, index), share) for index, share in visit.mix)

    def fetch_other(self, layer: Layer, index: int) -> dict[str, Tensor]:
        """The tensors as stored of another layer of the checkpoint, by its number in the stack."""
        origin = self.origins.get(layer.path, layer.path)
        first = self.stored_layers.index(origin) - self.visits[layer.path].layer
        return self._read(self.stored_layers[first + index])

    def _read(self, path: str) -> dict[str, Tensor]:
        loaded = self.stored.load(f"{path}.")
        return {name.removeprefix(f"{path}."): tensor for name, tensor in loaded.items()}

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
        """Put the layer's real weights in place; those of the next one are read meanwhile."""
        if self.source is not None:
            fill(layer.module, self.fetch(layer), self.device)
            layers = next(s.layers for s in self.stacks if s.name == layer.stack)
            for behind in layers[layer.index + 1 : layer.index + 2]:
                self.source.announce(f"{self.origins.get(behind.path, behind.path)}.")

    def drop(self, layer: Layer) -> None:
        """Make a streamed layer hollow again."""
        if self.source is None:
            return
        freed = 0
        for module in layer.module.modules():
            for name, p in module._parameters.items():
                if p is not None:
                    freed += p.untyped_storage().nbytes()
                    module._parameters[name] = hollow_parameter(p.shape, p.dtype, self.device)
        self.source.forget(freed)

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
            >>> import layerwise
            >>> from layerwise.intervene import At, ablate
            >>> ids = torch.arange(8)[None]
            >>> output = layerwise.open("demo").run({"input_ids": ids}, [ablate(At(3, "mlp"))])
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

    def generate(self, prompts: Any, **wanted: Any) -> Any:
        """Texts that go on from prompts; `layerwise.jobs.generate` says what it takes.

        Args:
            prompts: a text, or several, or token ids `[batch, seq]`.
            wanted: fields of `layerwise.jobs.generate.Sampling`, `speculate`, and `tell`.
        """
        from layerwise.jobs.generate import generate

        return generate(self, prompts, **wanted)

    def load(self) -> "Network":
        """Fill in every layer, so that the network can be run many times.

        Visits of one layer share its parameters unless they are copies.
        """
        first: dict[Any, Layer] = {}
        for layer in self.layers():
            origin = self.origins.get(layer.path, layer.path)
            visit = self.visits.get(layer.path)
            own = layer.path if self.unrolled and layer.path in self.adapters else ""
            owner = first.setdefault((origin, visit and visit.mix, own), layer)
            if owner is layer or (visit is not None and visit.copy):
                if self.source is not None:
                    self.source.forget()  # tensors at hand belong to another visit
                self.bring(layer)
            else:
                share(owner.module, layer.module, lambda n, o=origin: self._is_stored(f"{o}.{n}"))
        return replace(self, source=None, origins={}, orders=(), stored_layers=())

    def original_key(self, layer: Layer) -> str:
        """The key that a layer has in the order of the checkpoint."""
        visit = self.visits.get(layer.path)
        return layer.key if visit is None else f"{layer.stack}/{visit.layer}"

    def _is_stored(self, name: str) -> bool:
        return self.source is None or self.source.is_stored(name)

    @property
    def resident(self) -> bool:
        """Whether all layers hold their weights."""
        held = (p for layer in self.layers() for p in layer.module.parameters())
        return self.source is None or not any(map(is_hollow, held))


def mixed(layers: Iterable[tuple[Mapping[str, Tensor], float]]) -> dict[str, Tensor]:
    """A layer whose tensors are `sum_i share_i theta_i`, in float32 and rounded once.

    What holds no floating-point numbers is the first one's.

    Example:
        >>> one, two = {"w": torch.tensor([1.0])}, {"w": torch.tensor([4.0])}
        >>> mixed([(one, 0.5), (two, 0.5)])
        {'w': tensor([2.5000])}
    """
    total: dict[str, Tensor] = {}
    kinds: dict[str, torch.dtype] = {}
    for tensors, share in layers:
        for name, tensor in tensors.items():
            kinds[name] = tensor.dtype
            if not tensor.is_floating_point():
                total.setdefault(name, tensor)
            elif name in total:
                total[name].add_(tensor.float(), alpha=share)
            else:
                total[name] = share * tensor.float()
    return {name: tensor.to(kinds[name]) for name, tensor in total.items()}


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


def share(owner: nn.Module, module: nn.Module, which: Callable[[str], bool]) -> None:
    """Let a module have some of another's parameters and buffers, by their names."""
    for path, own in module.named_modules():
        theirs = owner.get_submodule(path)
        kinds = (own._parameters, theirs._parameters), (own._buffers, theirs._buffers)
        for mine, others in kinds:
            for name in mine:
                if which(f"{path}.{name}" if path else name):
                    mine[name] = others[name]  # type: ignore[assignment]
