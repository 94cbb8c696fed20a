"""Scores for a planner: the probes they need in one pass, and trial edits on the model."""

import copy
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from layerwise.core.absent import absent, silenced
from layerwise.core.chain import run_chain
from layerwise.core.data import Texts
from layerwise.core.fan import fan_out
from layerwise.core.machine import check_memory
from layerwise.core.method import find
from layerwise.core.network import Network
from layerwise.core.open import open_network, widened
from layerwise.core.plan import Step
from layerwise.core.quality import Quality, measure_quality
from layerwise.core.reader import samples_of, windows
from layerwise.core.stack import Layer, Visit
from layerwise.core.stats import Probe, Scores, Stats, observe
from layerwise.core.task import answer, forward_arguments, labels_of
from layerwise.jobs.forecast import memory_of_models
from layerwise.jobs.request import Request
from layerwise.jobs.session import Progress, load_reader, texts_of
from layerwise.jobs.stock import standing_in

#: what the kept outputs of the original's layers may take
KEPT_BYTES = 1_000_000_000


class Trial(NamedTuple):
    """What trials are made on; another process makes the same ones of it."""

    model: str
    device: str
    texts: Texts
    count: int = 8


class Trials:
    """Trial edits on the resident model, in float32: quality on documents of the select split.

    Layers before the first edited one give what they gave in the original model, without being
    computed again, where layers hand on a tensor and nothing else. Every thread works on a twin
    of the model that shares its weights; every process makes its own from the same `Trial`.
    """

    def __init__(self, trial: Trial) -> None:
        network = open_network(trial.model, device=trial.device)
        self.trial = trial
        self.dtype = network.stored.dtype
        check_memory(memory_of_models(network, 1))
        self.network = widened(network).load()
        texts = trial.texts._replace(length=256)
        self.batches = samples_of(load_reader(network), texts, "select", trial.count)
        self._twins = threading.local()
        self._original: list[Tensor] = []
        self._kept: list[list[Tensor]] = []
        self._remember()

    def __reduce__(self) -> tuple[Any, ...]:
        return make_trials, (self.trial,)

    @property
    def twin(self) -> tuple[nn.Module, list[Layer]]:
        """This thread's own model and its layers, with the weights that all threads share."""
        if "twin" not in vars(self._twins):
            memo: dict[int, Any] = {id(p): p for p in self.network.module.parameters()}
            memo |= {id(b): b for b in self.network.module.buffers()}
            module = copy.deepcopy(self.network.module, memo)
            layers = self.network.layers()
            own = [replace(la, module=module.get_submodule(la.path)) for la in layers]
            self._twins.twin = module, own
        return self._twins.twin

    @property
    def layers(self) -> list[Layer]:
        """The layers of this thread's twin."""
        return self.twin[1]

    def _remember(self) -> None:
        """Run the original once; keep its answers and, if it may be reused, what layers gave."""
        layers = self.layers
        plain = True
        for batch in self.batches:
            given: list[Tensor] = []

            def keep(module: nn.Module, args: tuple, output: Any, into: list = given) -> None:
                into.append(output)

            hooks = [layer.module.register_forward_hook(keep) for layer in layers]
            self._original.append(self.answer(batch, {}))
            for hook in hooks:
                hook.remove()
            plain &= len(given) == len(layers) and all(isinstance(x, Tensor) for x in given)
            nbytes = sum(x.nbytes for x in given) * len(self.batches) if plain else 0
            plain &= nbytes <= KEPT_BYTES
            self._kept.append(given if plain else [])
        if not plain or not self._reuse_is_exact():
            self._kept = []

    def _reuse_is_exact(self) -> bool:
        middle = len(self.layers) // 2
        with standing_in(self.layers, self._before(0, middle)):
            again = self.answer(self.batches[0], {})
        return torch.equal(again, self._original[0])

    def _before(self, batch: int, first: int) -> dict[str, Tensor | None]:
        """What the layers before `first` gave in the original, by their keys."""
        if not self._kept:
            return {}
        given = zip(self.layers[:first], self._kept[batch][:first], strict=True)
        return {layer.key: output for layer, output in given}

    def answer(self, batch: Any, edits: Mapping[str, Tensor]) -> Tensor:
        """The answer with some parameters replaced for this call only."""
        module, _ = self.twin
        inputs = {k: v.to(self.network.device) for k, v in batch.items()}
        arguments = forward_arguments(module, inputs)
        with torch.no_grad():
            output = functional_call(module, dict(edits), (), arguments, strict=False)
        return answer(output, batch)

    def quality(
        self, edits: Mapping[str, Tensor], first: int, gone: Collection[str] = ()
    ) -> Quality:
        """Quality with some parameters replaced and some layers left out, none before `first`."""
        numbers = {id(batch): i for i, batch in enumerate(self.batches)}

        def edited(batch: Any) -> Tensor:
            standing = self._before(numbers[id(batch)], first) | dict.fromkeys(gone)
            with standing_in(self.layers, standing):
                return self.answer(batch, edits)

        original = lambda batch: self._original[numbers[id(batch)]]  # noqa: E731
        return measure_quality(self.batches, original, edited)[1]

    def chains(
        self, chains: Mapping[str, tuple[Step, ...]], gone: Collection[str] = ()
    ) -> tuple[float, float]:
        """KL and relative squared error of trial chains, by fusion group or matrix.

        Layers that are `gone` hand their input on, parts add nothing to it.
        """
        found, error = self._tried(chains, gone)
        return found.estimate("kl").value, error

    def loss(self, chains: Mapping[str, tuple[Step, ...]]) -> float:
        """Loss in nats per token under trial chains, by fusion group."""
        return self._tried(chains)[0].estimate("loss").value

    def _tried(
        self, chains: Mapping[str, tuple[Step, ...]], gone: Collection[str] = ()
    ) -> tuple[Quality, float]:
        edits: dict[str, Tensor] = {}
        above = below = 0.0
        first = len(self.network.layers())
        for number, layer in enumerate(self.network.layers()):
            parameters = dict(layer.module.named_parameters(remove_duplicate=False))
            quiet, out = _quiet(layer, gone)
            edits |= quiet
            first = min(first, number) if layer.key in gone or out else first
            for matrix in layer.matrices:
                chain = chains.get(matrix.key, chains.get(matrix.fusion))
                if chain is None or layer.key in gone or matrix.key in out:
                    continue
                first = min(first, number)
                name = f"{layer.path}.{matrix.parameter}"
                original = parameters[matrix.parameter].detach()
                value = edits.setdefault(name, original.clone())
                weight = matrix.view(original)
                stored = weight.to(self.dtype).contiguous()
                dense = run_chain(stored, {}, chain).dense()
                above += (dense.float() - weight.float()).square().sum().item()
                below += weight.float().square().sum().item()
                matrix.view(value).copy_(dense)
        return self.quality(edits, first, gone), above / max(below, 1e-300)

    def squares(self, progress: Callable[[int, int], None]) -> dict[str, Tensor]:
        """`T g^2` of every matrix, the mean over documents of `T` tokens; `g` is of their mean."""
        parameters = dict(self.network.module.named_parameters(remove_duplicate=False))
        places = [(la, m, f"{la.path}.{m.parameter}") for la in self.layers for m in la.matrices]
        leaves = {name: parameters[name].detach().requires_grad_() for _, _, name in places}
        total = {name: torch.zeros_like(leaf, requires_grad=False) for name, leaf in leaves.items()}
        for number, batch in enumerate(self.batches, 1):
            inputs = {k: v.to(self.network.device) for k, v in batch.items()}
            arguments = forward_arguments(self.twin[0], inputs)
            rows = answer(functional_call(self.twin[0], leaves, (), arguments, strict=False), batch)
            wanted = labels_of(batch)
            wanted = rows.argmax(-1) if wanted is None else wanted.to(rows.device)
            loss = torch.nn.functional.cross_entropy(rows.float(), wanted)
            found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
            for name, gradient in zip(leaves, found, strict=True):
                if gradient is not None:
                    total[name].add_(gradient.square(), alpha=len(rows) / len(self.batches))
            progress(number, len(self.batches))
        return {matrix.key: matrix.view(total[name].cpu()) for _, matrix, name in places}

    def without(self, gone: Collection[str]) -> float:
        """Loss in nats per token without some layers, which hand their input on, or some parts."""
        edits: dict[str, Tensor] = {}
        numbers = []
        for number, layer in enumerate(self.layers):
            quiet, out = _quiet(layer, gone)
            edits |= quiet
            numbers += [number] if layer.key in gone or out else []
        return self.quality(edits, min(numbers, default=0), gone).estimate("loss").value


def _quiet(layer: Layer, gone: Collection[str]) -> tuple[dict[str, Tensor], set[str]]:
    """Zeros for what the parts of a layer that are gone write, and the keys of their matrices."""
    kept = tuple(p.name for p in layer.parts if f"{layer.key}/{p.name}" not in gone)
    if len(kept) == len(layer.parts):
        return {}, set()
    visit = Visit(layer.index, parts=kept)
    held = layer.module.named_parameters(remove_duplicate=False)
    own: dict[str, Tensor] = {name: p.detach() for name, p in held}
    zeros = silenced(layer, visit, own)
    changed = {f"{layer.path}.{n}": t for n, t in zeros.items() if t is not own[n]}
    return changed, {matrix.key for matrix in absent(layer, visit)}


@lru_cache(1)
def make_trials(trial: Trial) -> Trials:
    """The trials of this process."""
    return Trials(trial)


def trials_for(request: Request, network: Network) -> Trials:
    """The trials that a request's scores and searches are measured by."""
    folder = str(network.checkpoint.folder)
    return make_trials(Trial(folder, str(network.device), texts_of(request.data)))


def counting(progress: Progress, what: str, total: int) -> Callable[[], None]:
    """Called once for each thing that is done."""
    count = iter(range(1, 1 << 60))
    return lambda: progress(what, next(count), total)


def stats_for(
    request: Request, network: Network, needs: Sequence[str], progress: Progress
) -> Stats:
    """What probes find in one pass over the calibration text."""
    probes: dict[str, Probe] = {n: find(n, "measure").bind(request.options(n))() for n in needs}
    if not probes:
        return Stats({})
    batches = windows(load_reader(network), texts_of(request.data), "calibrate")
    return observe(network, batches, probes, partial(progress, "measuring layers"))


def make_scores(request: Request, network: Network, name: str, progress: Progress) -> Scores:
    """Run the probes that a score needs, in one pass, and the score."""
    method = find(name, "score")
    stats = stats_for(request, network, method.needs, progress)
    given: dict[str, Any] = {}
    if {"evaluate", "losses", "without", "squares"} & set(method.given):
        trials = trials_for(request, network)

        def evaluate(edits: Sequence[Mapping[str, tuple[Step, ...]]]) -> list[tuple[float, float]]:
            tick = counting(progress, "trial edits", len(edits))
            return fan_out(trials.chains, edits, request.engine, tick)

        def losses(edits: Sequence[Mapping[str, tuple[Step, ...]]]) -> list[float]:
            tick = counting(progress, "trial edits", len(edits))
            return fan_out(trials.loss, edits, request.engine, tick)

        def without(gone: Sequence[tuple[str, ...]]) -> list[float]:
            tick = counting(progress, "leaving layers out", len(gone))
            return fan_out(trials.without, gone, request.engine, tick)

        squares = partial(trials.squares, partial(progress, "gradients"))
        given = {"evaluate": evaluate, "losses": losses, "without": without, "squares": squares}
    layers = {layer.key: layer for layer in network.layers()}

    def fetch(key: str) -> dict[str, Tensor]:
        tensors = network.fetch(layers[key])
        return {m.key: m.view(tensors[m.parameter]) for m in layers[key].matrices}

    def tried(weight: Tensor, found: Mapping[str, Tensor], chain: tuple[Step, ...]) -> Tensor:
        return run_chain(weight.contiguous(), found, chain).dense()

    score = method.bind(request.options(method.name), fetch=fetch, tried=tried, **given)
    return merged([score(stack, stats) for stack in network.stacks])


def merged(found: Sequence[Scores]) -> Scores:
    """The scores of all stacks together."""
    values = {key: value for scores in found for key, value in scores.values.items()}
    trial = {key: value for scores in found for key, value in scores.trial.items()}
    return replace(found[0], values=values, trial=trial)
