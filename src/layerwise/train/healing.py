"""Healing: an edited network learns what its original answers, by low-rank additions."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
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

#: name of a parameter -> what is added to it is the product of the two
Additions = Mapping[str, tuple[Tensor, Tensor]]


class Healed(NamedTuple):
    """The healed parameters by name, and the KL of the select part after so many steps."""

    tensors: dict[str, Tensor]
    history: list[tuple[int, float]]


def additions(network: Network, rank: int, seed: int) -> dict[str, tuple[Tensor, Tensor]]:
    """`B = 0` and a random `A` for every matrix: `W + B A`; what is zero, such as the output of a
    part that is left out, stays zero and gets none.

    Example:
        >>> import layerwise
        >>> found = additions(layerwise.open("demo").load(), 2, 0)
        >>> sorted({b.shape[1] for b, _ in found.values()})
        [2]
    """
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, tuple[Tensor, Tensor]] = {}
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


def added(module: nn.Module, found: Additions) -> dict[str, Tensor]:
    """The parameters with what is added to them."""
    return {
        name: (p := module.get_parameter(name)) + (b @ a).reshape(p.shape)
        for name, (b, a) in found.items()
    }


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
    return how.rate * min(1.0, (step + 1) / warm) * (1 + math.cos(math.pi * after)) / 2


class Course:
    """Where a training stands: additions, moments, the best so far; kept in one file, whole."""

    def __init__(self, start: Additions, how: Heal, file: Path | None) -> None:
        self.file, self.how = file, how
        self.leaves = [t.requires_grad_() for pair in start.values() for t in pair]
        self.names = list(start)
        self.best = [leaf.detach().clone() for leaf in self.leaves]
        self.history: list[tuple[int, float]] = []
        self.optimizer = torch.optim.AdamW(self.leaves, lr=how.rate, weight_decay=0.0)
        if file is not None and file.exists():
            self._restore({n: read_tensor(info) for n, info in read_header(file).items()})

    @property
    def now(self) -> Additions:
        """The additions as they are."""
        return self._named(self.leaves)

    def _named(self, leaves: Sequence[Tensor]) -> Additions:
        return dict(zip(self.names, zip(leaves[::2], leaves[1::2], strict=True), strict=True))

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
    def result(self) -> Additions:
        """The additions that were best on the select part."""
        return self._named(self.best)


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
    """Train a network on what another one answers: `min KL(teacher || student)` over `W + B A`.

    With AdamW on low-rank additions to all matrices, at temperature 1 and without labels; the
    additions that were best on `held` are merged. No steps change nothing.

    Args:
        teacher: the original, loaded.
        student: the edited network, loaded; it is not changed.
        batches: to train on, in an order drawn anew for each round.
        held: to choose the best step on.
        how: steps, rank, rate and when to stop.
        seed: of the additions and the order.
        file: where the course is kept; a later call goes on from it and ends with the same bytes.
        progress: called with the steps that are done, and all of them.

    Reference: Muralidharan et al., 2024, arXiv:2407.14679 (distillation after pruning); Gromov et
    al., 2024, arXiv:2403.17887 (healing by low-rank additions, there on labels).
    """
    course = Course(additions(student, how.rank, seed), how, file)
    module, original = student.module, teacher.module
    if not course.history:
        course.note(0, divergence_of(original, module, {}, held))
    step = course.step
    while not course.finished:
        batch = batches[chosen(step, len(batches), seed)]
        for group in course.optimizer.param_groups:
            group["lr"] = rate_at(step, how)
        with torch.no_grad():
            wanted = answers(original, {}, batch)
        loss = divergence(wanted, answers(module, added(module, course.now), batch)).mean()
        course.optimizer.zero_grad()
        loss.backward()
        course.optimizer.step()
        step += 1
        progress(step, how.steps)
        if step % how.every == 0 or step == how.steps:
            with torch.no_grad():
                merged = added(module, course.now)
            course.note(step, divergence_of(original, module, merged, held))
    with torch.no_grad():
        return Healed(added(module, course.result), course.history)


def chosen(step: int, count: int, seed: int) -> int:
    """Which batch a step takes: each once a round."""
    turn, place = divmod(step, count)
    generator = torch.Generator().manual_seed(1_000_003 * seed + turn)
    return int(torch.randperm(count, generator=generator)[place])
