"""Stored weights under the names that a model has in memory, read through transformers' mapping."""

import copy
import ctypes
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
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
from layerwise.core.errors import LayerwiseError, first_few, notice, refusing
from layerwise.core.fold import Folds, folded
from layerwise.core.hollow import build_meta

#: calls of torch that building a model may take for each of its stored tensors
CALLS = 100
#: freed bytes after which memory is given back
OFTEN = 128_000_000


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
        self.model = build_meta(kind, config, dtype, CALLS * (len(checkpoint.tensors) + CALLS))
        self.mapping: list[Any] = get_model_conversion_mapping(self.model) or []
        known = self.model.state_dict()
        #: stored name -> (first) name in memory
        self.owner = {name: self._name_in_memory(name, known) for name in checkpoint.tensors}
        self.conversions = [c for c in self.mapping if c.was_used()]
        #: name in memory -> dtype, where all that is stored is renamed at most
        self._renames = self._only_renamed(known)
        self._held = self._names_held()
        self._freed = 0
        self._last: tuple[str, dict[str, Tensor]] = ("", {})
        self.folds: Folds = {}
        self.exact = False

    def _name_in_memory(self, name: str, known: dict[str, Tensor]) -> str:
        renamings = [m for m in self.mapping if isinstance(m, WeightRenaming)]
        converters = [m for m in self.mapping if isinstance(m, WeightConverter)]
        prefix = self.model.base_model_prefix
        renamed, _ = rename_source_key(name, renamings, converters, prefix, known)
        if renamed not in known and name in known:
            renamed, _ = rename_source_key(name, [], [], prefix, known)
        return renamed

    def _only_renamed(self, known: dict[str, Tensor]) -> dict[str, torch.dtype]:
        """Names in memory and dtypes; none if a tensor is converted or a module has two names."""
        own = {
            f"{path}.{name}" if path else name
            for path, module in self.model.named_modules()
            for name in (*module._parameters, *module._buffers)
        }
        found = {name: known[name].dtype for name in self.owner.values() if name in known}
        converted = any(isinstance(c, WeightConverter) for c in self.conversions)
        return {} if converted or not found.keys() <= own else found

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

    def tied_apart(self) -> list[tuple[str, str]]:
        """Pairs that the architecture ties, but that are stored twice with different values."""
        stored = {name: key for key, name in self.owner.items()}
        tied = (self.model.all_tied_weights_keys or {}).items()
        pairs = [(stored[a], stored[b]) for a, b in tied if a in stored and b in stored]
        return [pair for pair in pairs if pair[0] != pair[1] and not _equal(*map(self._one, pair))]

    def _one(self, name: str) -> Tensor:
        return self.checkpoint.read([name])[name]

    def with_folds(self, folds: Folds, exact: bool = False) -> "Source":
        """The same weights, some changed as they are read; not rounded again if `exact`."""
        found = copy.copy(self)
        found.folds, found.exact, found._last = folds, exact, ("", {})
        return found

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, with those that folds untie."""
        shapes = self.model.state_dict()
        untied = [shapes[n] for n in self.folds if n in (self.model.all_tied_weights_keys or {})]
        return self.checkpoint.nbytes + sum(t.numel() * self.dtype.itemsize for t in untied)

    def load(self, prefix: str) -> dict[str, Tensor]:
        """Tensors in memory whose name starts with `prefix`; the last ones are kept at hand."""
        if self._last[0] != prefix:
            self.forget()
            self._last = (prefix, self.load_apart(prefix, ()))
        return dict(self._last[1])

    def forget(self, freed: int = 0) -> None:
        """Let go of what was loaded last; now and then, what was freed goes back to the system."""
        self._last = ("", {})
        self._freed += freed
        if self._freed >= OFTEN:
            self._freed = 0
            give_back()

    def announce(self, prefix: str) -> None:
        """Say that `load` will be asked for a prefix next."""
        self.checkpoint.announce(self._stored(prefix, ()))

    def _stored(self, prefix: str, apart: tuple[str, ...]) -> list[str]:
        """Stored tensors by their name in memory: it starts with `prefix`, with none of `apart`."""
        return [
            stored
            for stored, name in self.owner.items()
            if name.startswith(prefix) and not name.startswith(apart)
        ]

    def load_apart(self, prefix: str, apart: tuple[str, ...]) -> dict[str, Tensor]:
        """Tensors in memory whose name starts with `prefix` and with none of `apart`."""
        names = self._stored(prefix, apart)
        with refusing(
            f"weights {prefix}* of {self.checkpoint.folder}",
            allowed=f"tensors that {type(self.model).__name__} can be filled with",
            fix="use the configuration that belongs to these weights",
        ):
            given = self.checkpoint.read(names)
            loaded = self._renamed(given) if self._renames else self._converted(given)
        wanted = {
            n: t for n, t in loaded.items() if n.startswith(prefix) and not n.startswith(apart)
        }
        tied = self.model.all_tied_weights_keys or {}
        for name in self.folds:  # what has folds of its own is no longer tied
            if tied.get(name) in wanted and name.startswith(prefix):
                wanted[name] = wanted[tied[name]]
        changed = {n: folded(t, self.folds.get(n, ())) for n, t in wanted.items()}
        return {n: t if self.exact else t.to(wanted[n].dtype) for n, t in changed.items()}

    def _renamed(self, given: dict[str, Tensor]) -> dict[str, Tensor]:
        """Stored tensors under their names in memory, in the dtypes that they have there."""
        named = {self.owner[name]: tensor for name, tensor in given.items()}
        return {n: t.to(self._renames[n]) for n, t in named.items() if n in self._renames}

    def _converted(self, given: dict[str, Tensor]) -> dict[str, Tensor]:
        """What transformers makes of stored tensors, leaving the model on meta again."""
        settings = LoadStateDictConfig(dtype=self.dtype, weight_mapping=self.mapping)
        info, _ = convert_and_load_state_dict_in_model(self.model, given, settings)
        for wrong in (*info.mismatched_keys, *info.conversion_errors.items()):
            raise ValueError(" ".join(map(str, wrong)))
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
        return taken


def give_back() -> None:
    """Return freed memory to the system; the allocator of glibc keeps what lies between blocks."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):
        return  # another C library


def _equal(one: Tensor, two: Tensor) -> bool:
    return one.shape == two.shape and torch.equal(one, two)


def check_stored(source: Source) -> None:
    """Every weight must be there and have its shape; one that is left over is told.

    Raises:
        LayerwiseError: one is missing or has another shape, so that it would be left random, or
            tied weights are stored with different values, so that one of them would be lost.
    """
    kind, folder = type(source.model).__name__, source.checkpoint.folder
    missing, unused = source.unmatched()
    if missing:
        raise LayerwiseError(
            str(folder),
            allowed=f"all weights of {kind}",
            found=f"{first_few(sorted(missing))} missing",
            fix="copy the missing files, or correct `architectures` and the sizes in config.json",
        )
    for name, found, wanted in source.mismatched():
        raise LayerwiseError(
            f"{source.checkpoint.tensors[name].file}, tensor {name!r}",
            allowed=f"shape {list(wanted)}, which config.json asks for",
            found=list(found),
            fix="use the configuration that belongs to these weights",
        )
    for one, two in source.tied_apart():
        raise LayerwiseError(
            f"{folder}, tensors {one!r} and {two!r}",
            allowed="equal values, for config.json ties them",
            found="different values",
            fix='write "tie_word_embeddings": false into config.json if both are meant',
        )
    if unused:
        notice(f"{folder}: {kind} does not use {first_few(sorted(unused))}")
