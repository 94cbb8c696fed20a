"""Stages of depth: layers left out, repeated and copied, and drafts by an early exit."""

import shutil
from collections.abc import Iterator
from itertools import chain, islice

import torch
from subject import StockFails, Subject, told
from torch import nn

from layerwise.core.errors import LayerwiseError
from layerwise.core.network import Network
from layerwise.core.open import open_network
from layerwise.core.sites import At, Intervention
from layerwise.core.stack import Stack
from layerwise.core.task import answer
from layerwise.jobs.apply import apply_plan
from layerwise.jobs.checks import rebuild_check, reload_checks
from layerwise.jobs.measure import agrees_cached, generates
from layerwise.jobs.pays import PLAIN, exit_draft
from layerwise.jobs.speculate import Sampling, Tally, speculated
from layerwise.jobs.stock import answers_of, load_stock

#: tokens that are decoded in an order or with a draft, and the layers that draft
FEW, EXIT = 4, 2


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
    apply_plan(subject.folder / "model", plan, out, dtype="float32", check=False)
    subject.dropped = load_stock(out, "float32", torch.device("cpu"))
    found = [
        *reload_checks(out, subject.dropped),
        *rebuild_check(subject.stock, network, plan, subject.dropped, subject.inputs),
    ]
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
        assert subject.dropped is not None, "no layer was left out"
        _decodes_alike(subject, subject.dropped, 8)


def loop(subject: Subject) -> None:
    """A middle layer runs twice: as if it were given once more what it gave, and decoding with a
    cache gives the tokens that it gives without."""
    _first_that_works(subject, False)


def copy(subject: Subject) -> None:
    """The same with a copy of that layer in the second place, whose weights are its own."""
    _first_that_works(subject, True)


def _first_that_works(subject: Subject, own: bool) -> None:
    """Repeat what `drop` leaves out, of the decoder first; three other choices may fail."""
    tried = []
    for stack, again in islice(_blocks(subject.network), 4):
        try:
            return _repeated(subject, stack, again, own)
        except Exception as error:
            tried.append(error)
    raise tried[0] if tried else AssertionError("no layer that can be repeated")


def _blocks(network: Network) -> Iterator[tuple[Stack, list[int]]]:
    """A layer of every stack, and pairs where layers alternate."""
    found = [s for s in network.stacks if len(s.wiring) == len(s.layers) > 1]
    found.sort(key=lambda s: (s.name.startswith("encoder"), -len(s.layers)))
    gone = {s.name: [sorted({*range(len(s.layers))} - {*k}) for k in _choices(s)] for s in found}
    yield from ((s, gone[s.name][0]) for s in found if gone[s.name])
    yield from ((s, pair) for s in found for pair in gone[s.name] if len(pair) == 2)


def _repeated(subject: Subject, stack: Stack, again: list[int], own: bool) -> None:
    ahead, behind = list(range(again[-1] + 1)), list(range(again[-1] + 1, len(stack.layers)))
    middle = [{"layer": i, "copy": True} for i in again] if own else again
    wiring = {stack.name: [*ahead, *middle, *behind]}
    network = open_network(subject.folder / "model", wiring=wiring, dtype="float32").load()
    parameters = sum(1 for _ in network.module.parameters())
    assert (parameters > sum(1 for _ in subject.stock.parameters())) == own, "weights are shared"
    enters, leaves = At(f"{stack.name}/{again[0]}", "in"), At(f"{stack.name}/{again[-1]}")
    state = subject.loaded.cache(subject.inputs, [leaves])[leaves]
    twice = subject.loaded.run(subject.inputs, [Intervention(enters, lambda x: state)])
    with torch.no_grad():
        got = answers_of(network.module)(subject.inputs)
    torch.testing.assert_close(
        got, answer(twice, subject.inputs), rtol=1e-4, atol=1e-4, msg="the logits are not close"
    )
    if subject.entry.task in ("causal", "seq2seq") and generates(network.module):
        _decodes_alike(subject, network.module, FEW)


def _decodes_alike(subject: Subject, module: nn.Module, count: int) -> None:
    """With and without a cache, where the original does."""
    ids = subject.inputs["input_ids"][:1]
    try:
        same, total = agrees_cached(module, ids, count)
        failed = AssertionError(f"{same} of {total} tokens") if same < total else None
    except Exception as error:
        failed = error
    if failed is not None:
        _stock_decodes_alike(subject, count)
        raise failed


def _stock_decodes_alike(subject: Subject, count: int) -> None:
    try:
        same, total = agrees_cached(subject.stock, subject.inputs["input_ids"][:1], count)
    except Exception as error:
        raise StockFails(told(error)) from error
    if same < total:
        raise StockFails(f"cached and uncached decoding differ after {same} of {total} tokens")


def drafts(subject: Subject) -> None:
    """What an exit after half of the layers drafts and the rest verifies is the plain text."""
    network, prompt = subject.loaded, subject.inputs["input_ids"][0].tolist()
    try:
        texts = [
            list(chain(*speculated(network, prompt, Sampling(FEW), draft, set(), Tally())))
            for draft in (PLAIN, exit_draft(network, EXIT, 2))
        ]
    except Exception:
        _stock_decodes_alike(subject, FEW)
        raise
    assert texts[0] == texts[1], f"{texts[1]}, not {texts[0]}"


def stock_exit(subject: Subject) -> None:
    """Stock `generate` with `assistant_early_exit`: fewer layers draft, and the text is the same."""
    ids = subject.inputs["input_ids"][:1]
    how = {"max_new_tokens": FEW, "min_new_tokens": FEW, "do_sample": False, "pad_token_id": 0}
    plain = subject.stock.generate(ids, **how)  # type: ignore[operator]
    calls: dict[int, int] = {}
    layers = [subject.stock.get_submodule(la.path) for la in subject.network.stack.layers]
    for number, module in enumerate(layers):
        module.register_forward_hook(lambda *_, n=number: calls.__setitem__(n, calls.get(n, 0) + 1))
    found = subject.stock.generate(ids, assistant_early_exit=EXIT, **how)  # type: ignore[operator]
    assert torch.equal(found, plain), "another text"
    assert calls[0] > calls[len(layers) - 1], "ignored: all layers draft"
