"""Healing: an edited network learns what its original answers."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from layerwise.core.checkpoint import read_header, read_tensor
from layerwise.core.network import Network
from layerwise.core.plan import Heal
from layerwise.core.quality import divergence
from layerwise.core.shards import write_safetensors
from layerwise.core.stops import Batch
from layerwise.core.task import answer, forward_arguments

#: share of the steps in which the rate rises, before it falls as a cosine does
WARM = 0.1

#: name of a parameter -> itself, or the two whose product is added to it
Leaves = Mapping[str, tuple[Tensor, ...]]


class Healed(NamedTuple):
    """The healed parameters by name, and what the select part said on the way, in rows."""

    tensors: dict[str, Tensor]
    rows: list[dict[str, Any]]


def wholes(path: str, module: nn.Module) -> dict[str, tuple[Tensor, ...]]:
    """Every parameter of a layer under its name in the network; what is zero stays zero.

    Example:
        >>> sorted(wholes("layers.3", nn.Linear(2, 2)))
        ['layers.3.bias', 'layers.3.weight']
    """
    held = module.named_parameters(path)
    return {n: (p.detach().clone(),) for n, p in held if p.is_floating_point() and p.any()}


def leaves_of(network: Network, how: Heal, seed: int) -> Leaves:
    """What is trained: additions, or the parameters of every layer, shared ones once."""
    if how.mode == "adapters":
        return additions(network, how.rank, seed)
    found, done = {}, set()
    for layer in network.layers():
        own = dict(layer.module.named_parameters(layer.path))
        whole = wholes(layer.path, layer.module)
        found |= {name: leaf for name, leaf in whole.items() if id(own[name]) not in done}
        done |= set(map(id, own.values()))
    return found


def additions(network: Network, rank: int, seed: int) -> dict[str, tuple[Tensor, ...]]:
    """`B = 0` and a random `A` for every matrix: `W + B A`; what is zero, such as the output of a
    part that is left out, stays zero and gets none.

    Example:
        >>> import layerwise
        >>> found = additions(layerwise.open("demo").load(), 2, 0)
        >>> sorted({b.shape[1] for b, _ in found.values()})
        [2]
    """
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, tuple[Tensor, ...]] = {}
    done: set[int] = set()
    for layer in network.layers():
        held = dict(layer.module.named_parameters(remove_duplicate=False))
        for matrix in layer.matrices:
            p = held[matrix.parameter]
            if id(p) in done or not p.any():
                continue
            done.add(id(p))
            rows = p if matrix.expert is not None else p.flatten(1)
            *lead, out, width = rows.shape
            inner = min(rank, out, width)
            a = torch.randn(*lead, inner, width, generator=generator) / math.sqrt(width)
            b = torch.zeros(*lead, out, inner)
            found[f"{layer.path}.{matrix.parameter}"] = b.to(p), a.to(p)
    return found


def grown(module: nn.Module, found: Leaves) -> dict[str, Tensor]:
    """The parameters that come of what is trained."""
    made = {}
    for name, (first, *second) in found.items():
        p = module.get_parameter(name)
        made[name] = p + (first @ second[0]).reshape(p.shape) if second else first
    return made


def answers(module: nn.Module, edits: Mapping[str, Tensor], batch: Batch) -> Tensor:
    """The logarithms of the probabilities `[rows, classes]` that a network answers."""
    device = next(module.parameters()).device
    arguments = forward_arguments(module, {k: v.to(device) for k, v in batch.items()})
    output = functional_call(module, dict(edits), (), arguments, strict=False)
    return answer(output, batch).float().log_softmax(-1)


def divergence_of(
    teacher: nn.Module, student: nn.Module, edits: Mapping[str, Tensor], batches: Sequence[Batch]
) -> float:
    """Mean KL(teacher || student) per token."""
    total, count = 0.0, 0
    with torch.no_grad():
        for batch in batches:
            found = divergence(answers(teacher, {}, batch), answers(student, edits, batch))
            total, count = total + found.double().sum().item(), count + len(found)
    return total / max(count, 1)


def rate_at(step: int, how: Heal) -> float:
    """The learning rate of a step: it rises over a tenth of the steps, then falls to zero.

    Example:
        >>> [round(rate_at(i, Heal(steps=10, rate=1.0)), 2) for i in (0, 1, 5, 9)]
        [1.0, 1.0, 0.59, 0.03]
    """
    warm = max(1, round(WARM * how.steps))
    after = max(0, step - warm) / max(1, how.steps - warm)
    return how.peak * min(1.0, (step + 1) / warm) * (1 + math.cos(math.pi * after)) / 2


class Course:
    """Where a training stands: leaves, moments, the best so far; kept in one file, whole."""

    def __init__(self, start: Leaves, how: Heal, file: Path | None = None) -> None:
        self.file, self.how = file, how
        self.leaves = [t.requires_grad_() for own in start.values() for t in own]
        self.counts = {name: len(own) for name, own in start.items()}
        self.best = [leaf.detach().clone() for leaf in self.leaves]
        self.history: list[tuple[int, float]] = []
        self.optimizer = torch.optim.AdamW(self.leaves, lr=how.peak, weight_decay=0.0)
        if file is not None and file.exists():
            self._restore({n: read_tensor(info) for n, info in read_header(file).items()})

    @property
    def now(self) -> Leaves:
        """The leaves as they are."""
        return self._named(self.leaves)

    def _named(self, leaves: Sequence[Tensor]) -> Leaves:
        left = iter(leaves)
        return {name: tuple(islice(left, count)) for name, count in self.counts.items()}

    @property
    def finished(self) -> bool:
        """Whether all steps are done, or the last few asked did not improve."""
        values = [value for _, value in self.history]
        waited = len(values) - 1 - values.index(min(values)) if values else 0
        return self.step >= self.how.steps or waited >= self.how.patience

    @property
    def step(self) -> int:
        """Steps that are done, as of the last time that it was kept."""
        return self.history[-1][0] if self.history else 0

    def note(self, step: int, value: float) -> None:
        """Keep what came of so many steps."""
        if not self.history or value < min(found for _, found in self.history):
            self.best = [leaf.detach().clone() for leaf in self.leaves]
        self.history.append((step, value))
        if self.file is not None:
            write_safetensors(self.file, dict(self._tensors()))

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        yield "history", torch.tensor(self.history, dtype=torch.float64)
        for number, (leaf, best) in enumerate(zip(self.leaves, self.best, strict=True)):
            yield f"{number}|now", leaf.detach()
            yield f"{number}|best", best
            for key, value in self.optimizer.state[leaf].items():
                yield f"{number}|{key}", value.reshape(-1) if value.ndim == 0 else value

    def _restore(self, held: Mapping[str, Tensor]) -> None:
        self.history = [(int(step), value) for step, value in held["history"].tolist()]
        for number, leaf in enumerate(self.leaves):
            leaf.data.copy_(held[f"{number}|now"])
            self.best[number].copy_(held[f"{number}|best"])
            if f"{number}|step" in held:
                state: dict[str, Any] = {"step": held[f"{number}|step"].reshape(())}
                for key in ("exp_avg", "exp_avg_sq"):
                    state[key] = held[f"{number}|{key}"].to(leaf)
                self.optimizer.state[leaf] = state

    @property
    def result(self) -> Leaves:
        """The leaves that were best on the select part."""
        return self._named(self.best)

    def run(
        self,
        count: int,
        loss: Callable[[int, Leaves], Tensor],
        held: Callable[[Leaves], float],
        seed: int,
        progress: Callable[[int, int], None],
    ) -> None:
        """Train to the end: `loss` on one of `count` batches a step, `held` on the select part."""
        if not self.history:
            self.note(0, held(self.now))
        step = self.step
        while not self.finished:
            for group in self.optimizer.param_groups:
                group["lr"] = rate_at(step, self.how)
            self.optimizer.zero_grad()
            loss(chosen(step, count, seed), self.now).backward()
            self.optimizer.step()
            step += 1
            progress(step, self.how.steps)
            if step % self.how.every == 0 or step == self.how.steps:
                self.note(step, held(self.now))


def heal(
    teacher: Network,
    student: Network,
    batches: Sequence[Batch],
    held: Sequence[Batch],
    how: Heal,
    *,
    seed: int = 0,
    file: Path | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Healed:
    """Train a network on what another one answers: `min KL(teacher || student)` over its layers.

    With AdamW, at temperature 1 and without labels, over `W + B A` for every matrix, or over every
    parameter of the layers; what was best on `held` is the result. No steps change nothing.

    Args:
        teacher: the original, loaded.
        student: the edited network, loaded; it is not changed.
        batches: to train on, in an order drawn anew for each round.
        held: to choose the best step on.
        how: what is trained, steps, rate and when to stop.
        seed: of the additions and the order.
        file: where the course is kept; a later call goes on from it and ends with the same bytes.
        progress: called with the steps that are done, and all of them.

    Reference: Muralidharan et al., 2024, arXiv:2407.14679 (distillation after pruning); Gromov et
    al., 2024, arXiv:2403.17887 (healing by low-rank additions, there on labels).
    """
    course = Course(leaves_of(student, how, seed), how, file)
    module, original = student.module, teacher.module

    def loss(number: int, leaves: Leaves) -> Tensor:
        with torch.no_grad():
            wanted = answers(original, {}, batches[number])
        return divergence(wanted, answers(module, grown(module, leaves), batches[number])).mean()

    def told(leaves: Leaves) -> float:
        with torch.no_grad():
            return divergence_of(original, module, grown(module, leaves), held)

    course.run(len(batches), loss, told, seed, progress)
    with torch.no_grad():
        rows = [{"step": step, "kl": value} for step, value in course.history]
        return Healed(grown(module, course.result), rows)


def chosen(step: int, count: int, seed: int) -> int:
    """Which batch a step takes: each once a round."""
    turn, place = divmod(step, count)
    generator = torch.Generator().manual_seed(1_000_003 * seed + turn)
    return int(torch.randperm(count, generator=generator)[place])
