"""Every measure: no split into batches changes it, and nothing changes because it looks."""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch.testing import assert_close
from torch.utils._pytree import tree_leaves

import layerwise
from layerwise.core.lockstep import walk
from layerwise.core.method import Method, methods
from layerwise.core.network import Network
from layerwise.core.stats import Gathering, Probe, Seen, observe
from layerwise.core.stream import Attention, measured

LENGTHS = [9, 4, 12, 7, 1, 12]
SPLITS = [[6], [1] * 6, [2, 4], [5, 1]]
every_measure = pytest.mark.parametrize("method", methods("measure"), ids=lambda m: m.name)


@pytest.fixture(scope="module")
def opened(tiny) -> Callable[[str], Network]:
    """A tiny network of a kind, in memory."""
    return cache(lambda kind: layerwise.open(tiny(kind)).load())


def documents() -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids of six documents, padded on the right, and their mask."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 128, (len(LENGTHS), max(LENGTHS)), generator=generator)
    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    return ids * mask, mask.long()


def experts(x: torch.Tensor, chosen: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
    """A module of two experts, the second of which gives three times its input."""
    return (gates * (1 + 2 * chosen)).sum(1, keepdim=True) * x


def shown(probe: Probe, start: int, stop: int) -> Seen:
    """What a probe of its kind would see of some of the documents."""
    generator = torch.Generator().manual_seed(1)
    mask = documents()[1]
    x, y, clean = torch.randn(3, *mask.shape, 10, generator=generator) + 0.2
    x, y, clean, mask = (t[start:stop] for t in (x, y, clean, mask))
    if probe.unit == "input":
        owners = torch.arange(len(mask))[:, None].expand(mask.shape)[mask.bool()]
        rows, others = x[mask.bool()], clean[mask.bool()]
        return Seen(rows, None, mask, others, {}, None, owners=owners)
    queries = torch.stack([x, 2 * x], 1)  # [batch, 2 heads, seq, dim]
    attention = Attention(queries, y[:, None], None, True, 0.5)
    added = {"attention": measured(x, y)}
    module, rows = torch.nn.Identity(), x.flatten(0, 1)
    module.forward = experts
    chosen, gates = (rows[:, :1] > 0).long(), rows[:, 1:2].abs()

    def replay() -> torch.Tensor:
        module(rows, chosen, gates)
        return y

    return Seen(x, y, mask, clean, {}, replay, added, [attention])


def gathered(probe: Probe, split: list[int]) -> Any:
    state, start = probe.init("decoder/0"), 0
    for size in split:
        state = probe.update(state, shown(probe, start, start + size))
        start += size
    return probe.finish(state)


@every_measure
@pytest.mark.parametrize("split", SPLITS[1:], ids=str)
def test_any_split_into_batches(method: Method, split: list[int]) -> None:
    probe = method.function()
    whole, found = gathered(probe, SPLITS[0]), gathered(probe, split)
    assert_close(found, whole, rtol=1e-5, atol=1e-6)
    assert sum(torch.as_tensor(leaf).double().abs().sum() for leaf in tree_leaves(whole)) > 0


@every_measure
def test_inputs_and_earlier_states_stay(method: Method) -> None:
    probe = method.function()
    seen, fresh = shown(probe, 0, 3), shown(probe, 0, 3)
    first = probe.update(probe.init("decoder/0"), seen)
    once = probe.finish(probe.update(first, shown(probe, 3, 6)))
    assert_close(probe.finish(probe.update(first, shown(probe, 3, 6))), once, rtol=0, atol=0)
    for mine, other in zip(tree_leaves(tuple(seen)), tree_leaves(tuple(fresh)), strict=True):
        if isinstance(mine, torch.Tensor):
            assert torch.equal(mine, other)


@every_measure
@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral"])
def test_the_network_computes_the_same_under_observation(opened, method: Method, kind: str) -> None:
    network = opened(kind)
    ids, mask = documents()
    batches = [{"input_ids": ids[a:b], "attention_mask": mask[a:b]} for a, b in ((0, 2), (2, 6))]
    with torch.no_grad():
        plain = [network.module(**batch, use_cache=False).logits for batch in batches]
    probe = method.function()
    gathering = Gathering({method.name: probe}, batches)
    outputs: list[tuple[int, torch.Tensor]] = []
    inside = "watch" if probe.unit == "input" else ""
    keep = lambda batch, clean, output: outputs.append((batch, output.logits))  # noqa: E731
    with gathering:
        for stop in walk(network, batches, matrices=inside, clean=probe.clean, finish=keep):
            gathering.look(stop)
    assert len(outputs) == 2 * (1 + probe.clean)
    assert all(torch.equal(logits, plain[batch]) for batch, logits in outputs)
    assert gathering.finish()[method.name]


@every_measure
def test_padding_counts_for_nothing(opened, method: Method) -> None:
    network = opened("mixtral" if method.name == "expert_use" else "llama")
    ids, mask = documents()
    padded = [{"input_ids": ids, "attention_mask": mask}]
    alone = [{"input_ids": row[None, :n]} for row, n in zip(ids, LENGTHS, strict=True)]
    probes = {method.name: method.function()}
    together, apart = observe(network, padded, probes), observe(network, alone, probes)
    assert together[method.name].keys() == apart[method.name].keys()
    for unit, value in together[method.name].items():
        for mine, other in zip(
            tree_leaves(value), tree_leaves(apart[method.name][unit]), strict=True
        ):
            largest = max(1.0, float(torch.as_tensor(mine).abs().max()))
            assert_close(mine, other, rtol=1e-4, atol=1e-5 * largest)


def test_the_last_token_is_the_last_that_is_not_masked() -> None:
    probe = layerwise.find("last_states").function()
    x = torch.arange(8.0).reshape(2, 4, 1)
    mask = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 1]])
    found = probe.finish(probe.update(probe.init(""), Seen(x, -x, mask, None, {}, None)))
    assert found[..., 0].tolist() == [[1, -1], [7, -7]]
