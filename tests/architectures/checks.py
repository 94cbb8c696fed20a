"""What must hold for an architecture, from the file to greedy decoding; stages in their order."""

import re
import shutil
import signal
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from build import Entry, build, example
from torch import Tensor, nn

from layerwise.core.checkpoint import Checkpoint
from layerwise.core.errors import LayerwiseError
from layerwise.core.lockstep import walk
from layerwise.core.network import Network
from layerwise.core.open import open_network
from layerwise.core.plan import DataSpec, Edit, Identity, Plan, Step
from layerwise.core.sites import At, Intervention, Runs
from layerwise.core.stack import Stack
from layerwise.core.task import answer, forward_arguments
from layerwise.intervene import patch
from layerwise.jobs.apply import apply_plan
from layerwise.jobs.checks import rebuild_check, reload_checks
from layerwise.jobs.measure import agrees_cached, generates
from layerwise.jobs.pays import PLAIN, decode, exit_draft
from layerwise.jobs.speculate import Sampling
from layerwise.jobs.stock import answers_of, load_stock

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
    "copy",
    "drafts",
)
#: what stock code does is put on record, and not asked again
RECORDED = (*STAGES, "stock_exit")
#: stages of networks that write word after word from one stack
CAUSAL = ("drafts", "stock_exit")
#: tokens that are decoded in an order or with a draft, and the layers that draft
FEW, EXIT = 5, 2


class StockFails(Exception):
    """The untouched model of stock transformers does not do this either."""


class Subject:
    """A saved tiny model and what was made of it so far."""

    def __init__(self, entry: Entry, model: nn.Module, folder: Path) -> None:
        self.entry, self.folder = entry, folder
        self.inputs = example(entry, model)
        model.save_pretrained(folder / "model")  # type: ignore[operator]
        self.stock = load_stock(folder / "model", "float32", torch.device("cpu"))

    @cached_property
    def network(self) -> Network:
        """The streamed network; a walk leaves it as it was."""
        return open_network(self.folder / "model", dtype="float32")

    @cached_property
    def loaded(self) -> Network:
        """The same with all its weights."""
        return open_network(self.folder / "model", dtype="float32").load()

    def plan(self, **fields: Any) -> Plan:
        held = Checkpoint(self.folder / "model")
        identity = Identity(held.structure, held.weights)
        return Plan(model=identity, data=DataSpec(samples=1, length=16), **fields)

    def sound(self, out: Path) -> nn.Module:
        """The written folder, loaded by stock transformers, after its own check."""
        edited = load_stock(out, "float32", torch.device("cpu"))
        for check in reload_checks(out, edited):
            assert check["ok"], check["found"]
        return edited


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
    apply_plan(subject.folder / "model", subject.plan(edits=edits), out, dtype="float32")
    edited = subject.sound(out)
    with torch.no_grad():
        got, plain = (answers_of(m)(subject.inputs) for m in (edited, subject.stock))
    assert not torch.equal(got, plain), "nothing changed"


def drop(subject: Subject) -> None:
    """A middle layer left out: the stock rebuild gives what the original gives without it."""
    network = subject.network
    stacks = [s for s in network.stacks if len(s.wiring) == len(s.layers) > 1]
    # a stock T5 takes the size of its cache from the depth of its encoder
    stacks.sort(key=lambda s: (s.name.startswith("encoder"), -len(s.layers)))
    wirings = [{s.name: kept} for s in stacks for kept in _choices(s)]
    assert wirings, "no layer that can be left out"
    tried = []
    for wiring in wirings:
        shutil.rmtree(subject.folder / "dropped", ignore_errors=True)
        try:
            tried.append(_dropped(subject, network, wiring))
        except LayerwiseError:
            continue
        if not tried[-1]:
            return
        if len(tried) == 4:
            break
    raise AssertionError(tried[0] if tried else "every way to leave a layer out is refused")


def _dropped(subject: Subject, network: Network, wiring: dict[str, list[int]]) -> str:
    """Write it, load it, compare; what is wrong, if anything."""
    plan, out = subject.plan(wiring=wiring), subject.folder / "dropped"
    apply_plan(subject.folder / "model", plan, out, dtype="float32")
    edited = subject.sound(out)
    found = rebuild_check(subject.stock, network, plan, edited, subject.inputs)
    return "".join(check["found"] for check in found if not check["ok"])


def _choices(stack: Stack) -> list[list[int]]:
    """What may be kept: without a middle layer that is not the only one of its kind, else
    without a pair, for architectures whose kinds have a rhythm."""
    depth = len(stack.layers)
    kinds = [[(m.parameter, m.shape) for m in layer.matrices] for layer in stack.layers]
    able = [la.index for la in stack.layers if la.keeps_shape and la.index > 0]
    peers = [i for i in able if kinds.count(kinds[i]) > 1] or able
    middle = sorted(peers, key=lambda i: abs(i - (depth - 1) / 2))
    pairs = [(i, i + 1) for i in able if i + 1 in able]
    return [
        [i for i in range(depth) if i not in gone] for gone in [*((i,) for i in middle), *pairs]
    ]


def decoding(subject: Subject) -> None:
    """After the drop, greedy decoding with a cache gives the tokens that it gives without."""
    if subject.entry.task in ("causal", "seq2seq") and generates(subject.stock):
        ids = subject.inputs["input_ids"][:1]
        try:
            same, total = agrees_cached(subject.stock, ids, 8)
        except Exception as error:
            raise StockFails(told(error)) from error
        if same < total:
            raise StockFails(f"cached and uncached decoding differ after {same} of {total} tokens")
        edited = load_stock(subject.folder / "dropped", "float32", torch.device("cpu"))
        same, total = agrees_cached(edited, ids, 8)
        assert same == total, f"{same} of {total} tokens"


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


def loop(subject: Subject) -> None:
    """A middle layer runs twice: as if its output were given to it once more, and decoding with a
    cache gives the tokens that it gives without."""
    network = _repeated(subject, lambda order, i: [*order[: i + 1], *order[i:]])
    if subject.entry.task in ("causal", "seq2seq") and generates(network.module):
        _decodes_alike(subject, network.module)


def copy(subject: Subject) -> None:
    """The same with a copy of that layer, whose weights are its own: changed, they change it."""
    again = lambda order, i: [*order[: i + 1], {"layer": i, "copy": True}, *order[i + 1 :]]  # noqa: E731
    network = _repeated(subject, again)
    before = answers_of(network.module)(subject.inputs)
    number, own = next((n, v) for n, v in enumerate(network.visits.values()) if v.copy)
    assert own.copy
    layers = [layer for layer in network.layers() if layer.path in network.visits]
    with torch.no_grad():
        layers[number - 1].module.apply(_zeroed)
    assert not torch.equal(answers_of(network.module)(subject.inputs), before)


def _zeroed(module: nn.Module) -> None:
    for p in module.parameters(recurse=False):
        p.zero_()


def _repeated(subject: Subject, again: Callable[[list[Any], int], list[Any]]) -> Network:
    """The network with its most ordinary layer twice, if it computes what it is to."""
    found = [s for s in subject.network.stacks if len(s.wiring) == len(s.layers) > 1]
    stack = max(found, key=lambda s: (not s.name.startswith("encoder"), len(s.layers)))
    depth = len(stack.layers)
    gone = next((set(range(depth)) - set(kept) for kept in _choices(stack)), {depth // 2})
    layer = min(gone)
    wiring = {stack.name: again(list(range(depth)), layer)}
    network = open_network(subject.folder / "model", wiring=wiring, dtype="float32").load()
    twice = subject.loaded.run(subject.inputs, [Runs(f"{stack.name}/{layer}", 2)])
    wanted = answer(twice, subject.inputs)
    with torch.no_grad():
        got = answers_of(network.module)(subject.inputs)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    return network


def _decodes_alike(subject: Subject, module: nn.Module) -> None:
    """With and without a cache, where the original does."""
    ids = subject.inputs["input_ids"][:1]
    try:
        same, total = agrees_cached(subject.stock, ids, FEW)
    except Exception as error:
        raise StockFails(told(error)) from error
    if same < total:
        raise StockFails(f"cached and uncached decoding differ after {same} of {total} tokens")
    same, total = agrees_cached(module, ids, FEW)
    assert same == total, f"{same} of {total} tokens"


def drafts(subject: Subject) -> None:
    """What an exit after half of the layers drafts and the rest verifies is the plain text."""
    prompt, sampling = subject.inputs["input_ids"][0].tolist(), Sampling(FEW)
    plain, _, _ = decode(subject.loaded, prompt, sampling, PLAIN)
    draft = exit_draft(subject.loaded, EXIT, 2)
    found, _, tally = decode(subject.loaded, prompt, sampling, draft)
    assert tally.drafted, "nothing was drafted"
    assert found == plain, f"{found}, not {plain}"


def stock_exit(subject: Subject) -> None:
    """Stock `generate` with `assistant_early_exit`: fewer layers draft, and the text is the same."""
    ids = subject.inputs["input_ids"][:1]
    how = {"max_new_tokens": FEW, "min_new_tokens": FEW, "do_sample": False, "pad_token_id": 0}
    plain = subject.stock.generate(ids, **how)  # type: ignore[operator]
    calls: dict[int, int] = {}
    layers = [subject.stock.get_submodule(la.path) for la in subject.network.stack.layers]
    for number, module in enumerate(layers):
        module.register_forward_hook(
            lambda *_, n=number: calls.__setitem__(n, calls.get(n, 0) + 1)
        )
    found = subject.stock.generate(ids, assistant_early_exit=EXIT, **how)  # type: ignore[operator]
    assert torch.equal(found, plain), "another text"
    assert calls[0] > calls[len(layers) - 1], "ignored: all layers draft"


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


def told(error: Exception) -> str:
    """An exception on one line, without what changes from run to run."""
    text = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {re.sub(r'/[^ ]*/(model|dropped|rounded)', '', text)}"[:160]
