"""What must hold for an architecture, from the file to greedy decoding; stages in their order."""

import signal
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from build import Entry, build, example
from depth import copy, decoding, drafts, drop, loop, stock_exit
from subject import Subject, told
from torch import Tensor

from layerwise.core.lockstep import walk
from layerwise.core.plan import Edit, Step
from layerwise.core.sites import At, Intervention
from layerwise.core.task import answer, forward_arguments
from layerwise.intervene import patch
from layerwise.jobs.apply import apply_plan
from layerwise.jobs.stock import answers_of

STAGES = (
    "stack",
    "streaming",
    "lockstep",
    "rounding",
    "drop",
    "decoding",
    "patching",
    "parts",
    "loop",
    "drafts",
)
#: beside these is put on record, and not asked again: copies, and what stock code does
RECORDED = (*STAGES, "copy", "stock_exit")
#: stages of networks that write word after word from one stack
CAUSAL = ("drafts", "stock_exit")


def stack(subject: Subject) -> None:
    """Stacks are found, and `output_hidden_states` counts as many layers as one of them."""
    network = subject.network
    assert all(layer.matrices for layer in network.stack.layers[:1]), "a layer without matrices"
    with torch.no_grad():
        given = forward_arguments(subject.stock, subject.inputs)
        output = subject.stock(**given, output_hidden_states=True)
    seen = [
        len(states)
        for key in ("hidden_states", "encoder_hidden_states", "decoder_hidden_states")
        if (states := output.get(key)) is not None
    ]
    visits = [len(found.wiring) for found in network.stacks]
    if seen and len(visits) < 4:
        assert any(count - visit in (0, 1, 2) for count in seen for visit in visits), (
            f"hidden states {seen}, visits {visits}"
        )


def streaming(subject: Subject) -> None:
    """What is brought in layer by layer equals what `from_pretrained` loads, bit for bit."""
    ours, theirs = subject.loaded.module.state_dict(), subject.stock.state_dict()
    assert set(ours) == set(theirs)
    different = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert not different, f"differ: {different[:3]}"


def lockstep(subject: Subject) -> None:
    """A streamed walk that pauses at every matrix gives the plain forward's output."""
    network, plain = subject.network, subject.loaded.module
    found: dict[int, Tensor] = {}
    keep = lambda number, clean, output: found.__setitem__(number, answer(output, subject.inputs))  # noqa: E731
    batches = [subject.inputs, {k: v.flip(0) for k, v in subject.inputs.items()}]
    for _ in walk(network, batches, matrices="pause", finish=keep):
        pass
    for number, batch in enumerate(batches):
        with torch.no_grad():
            assert torch.equal(found[number], answers_of(plain)(batch))


def rounding(subject: Subject) -> None:
    """One group rounded to 4 bits, saved, loaded by stock transformers."""
    network = subject.network
    group = network.stack.groups()[0]
    edits = tuple(Edit(m.key, (Step("rtn", {"bits": 4}),)) for m in group.matrices)
    out = subject.folder / "rounded"
    plan = subject.plan(edits=edits)
    apply_plan(subject.folder / "model", plan, out, dtype="float32", check=False)
    edited = subject.sound(out)
    with torch.no_grad():
        got, plain = (answers_of(m)(subject.inputs) for m in (edited, subject.stock))
    assert not torch.equal(got, plain), "nothing changed"


def patching(subject: Subject) -> None:
    """The stream before and after every layer put back in its place changes nothing, other states
    there do."""
    where = [At(step, side) for step in _steps(subject) for side in ("in", "out")]
    _put_back(subject, where)
    network, middle = subject.loaded, where[len(where) // 2]
    turned = network.run(subject.inputs, [Intervention(middle, lambda x: x.flip(-1))])
    plain = answer(network.run(subject.inputs), subject.inputs)
    assert not torch.equal(answer(turned, subject.inputs), plain), "other states change nothing"


def parts(subject: Subject) -> None:
    """What every part adds to the stream, put back in its place, changes nothing."""
    _put_back(subject, [At(s, name) for s, names in _steps(subject).items() for name in names])


def _steps(subject: Subject) -> dict[str, list[str]]:
    """Every step of every stack, and the parts of the layer that runs there."""
    return {
        f"{stack.name}/{i}": [part.name for part in stack.layers[visit.layer].parts]
        for stack in subject.loaded.stacks
        for i, visit in enumerate(stack.wiring)
    }


def _put_back(subject: Subject, where: list[At]) -> None:
    network = subject.loaded
    with torch.no_grad():
        plain = answers_of(network.module)(subject.inputs)
    kept = network.cache(subject.inputs, where)
    assert torch.equal(answer(kept.output, subject.inputs), plain), "looking changes the answer"
    patched = network.run(subject.inputs, [patch(at, kept) for at in where])
    assert torch.equal(answer(patched, subject.inputs), plain), "its own states change the answer"


CHECKS: dict[str, Callable[[Subject], None]] = {
    function.__name__: function
    for function in (
        stack,
        streaming,
        lockstep,
        rounding,
        drop,
        decoding,
        patching,
        parts,
        loop,
        copy,
        drafts,
        stock_exit,
    )
}


class TooSlow(Exception):
    """A stage took longer than a tiny model ever should."""


def run(entry: Entry, folder: Path, stages: Collection[str] = STAGES) -> dict[str, str]:
    """Stage -> "" where it passed, else the exception; `build` alone where it cannot be built."""
    results = {}
    with _limited(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model = build(entry)
            with torch.no_grad():
                model(**forward_arguments(model, example(entry, model)))
            subject = Subject(entry, model, folder)
            results["build"] = ""
        except Exception as error:
            return {"build": told(error)}
        for name in stages:
            if name in CAUSAL and entry.task != "causal":
                continue
            try:
                CHECKS[name](subject)
                results[name] = ""
            except Exception as error:
                results[name] = told(error)
    return results


@contextmanager
def _limited(seconds: float = 60.0) -> Iterator[None]:
    """Interrupt what takes more time of the processor, whatever else the machine does."""

    def ring(number: int, frame: object) -> None:
        raise TooSlow(f"more than {seconds:.0f} s")

    before = signal.signal(signal.SIGPROF, ring)
    signal.setitimer(signal.ITIMER_PROF, seconds, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
