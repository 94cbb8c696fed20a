"""Leaving layers out for earlier tokens, and layers that stand in for others."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import layerwise
from layerwise.core.method import find
from layerwise.core.network import Network
from layerwise.core.stats import Figures, Stats, observe
from layerwise.describe.effects import places_of
from layerwise.describe.erase import path_attribution
from layerwise.jobs.rerun import Rerun

IDS = torch.randint(3, 128, (4, 1, 24), generator=torch.Generator().manual_seed(0))
BATCHES = [{"input_ids": ids, "labels": ids.roll(-1, 1)} for ids in IDS]


@pytest.fixture
def network(tiny) -> Network:
    return layerwise.open(tiny("llama")).load()


def quiet(network: Network, layer: int, *roles: str) -> None:
    """Let some matrices of a layer give zeros."""
    parameters = dict(network.layers()[layer].module.named_parameters())
    for matrix in network.layers()[layer].matrices:
        if matrix.role in roles:
            parameters[matrix.parameter].data.zero_()


def described(name: str, network: Network, **options: Any) -> Figures:
    rerun = Rerun(network, BATCHES)
    needed = {n: find(n, "measure").function() for n in find(name).needs}
    stats = observe(network, BATCHES, needed) if needed else Stats({})
    with torch.no_grad():
        return find(name).bind(options, rerun=rerun)(network.stack, stats)


def test_running_again_changes_nothing_but_what_is_replaced(network: Network) -> None:
    rerun = Rerun(network, BATCHES)
    with torch.no_grad():
        plain = network.module(BATCHES[1]["input_ids"]).logits
        assert torch.equal(rerun(1).logits, plain)
        assert torch.equal(rerun(1, {"decoder/2": lambda x, y: y.clone()}).logits, plain)
        once = rerun(1, {"decoder/2": lambda x, y: x})
        assert torch.equal(once.after["decoder/2"], once.before["decoder/2"])
        assert not torch.equal(once.logits, plain)
        assert torch.equal(network.module(BATCHES[1]["input_ids"]).logits, plain)


def test_a_layer_that_adds_nothing_can_be_skipped(network: Network) -> None:
    quiet(network, 1, "o", "down")
    found = described("skip_effect", network)
    assert found.values["decoder/1"] == {"output": 0, "later": 0}
    assert found.values["decoder/0"]["later"] > 0.01 < found.values["decoder/0"]["output"]
    assert torch.equal(found.maps["effect"].tril(), torch.zeros(4, 4).double())


def test_layers_that_do_not_mix_leave_the_future_alone(network: Network) -> None:
    for layer in range(4):
        quiet(network, layer, "o")
    assert described("skip_effect", network).maps["effect"].abs().max() == 0


def test_the_largest_effect_by_hand(network: Network) -> None:
    def run(replaced: bool) -> list[Tensor]:
        """Updates of layer 3 with layer 1 skipped at positions 1 to 7."""
        kept: list[Tensor] = []
        one, three = network.layers()[1].module, network.layers()[3].module
        swap = lambda m, args, out: torch.cat([out[:, :1], args[0][:, 1:8], out[:, 8:]], 1)  # noqa: E731
        hooks = [three.register_forward_hook(lambda m, args, out: kept.append(out - args[0]))]
        hooks += [one.register_forward_hook(swap)] if replaced else []
        with torch.no_grad():
            network.module(BATCHES[0]["input_ids"])
        for hook in hooks:
            hook.remove()
        return kept

    clean, changed = run(False)[0][0, 8:], run(True)[0][0, 8:]
    slow = ((clean - changed).norm(dim=1) / clean.norm(dim=1)).max()
    found = described("skip_effect", network, prompts=1, places=1).maps["effect"]
    assert found[1, 3].item() == pytest.approx(slow.item(), rel=1e-5)
    assert places_of(24, 1) == [8]


def test_skipping_everywhere_also_changes_the_layer_itself(network: Network) -> None:
    found = described("skip_effect", network, places=0, prompts=1)
    assert found.maps["effect"].diagonal().tolist() == pytest.approx([1] * 4)
    with torch.no_grad():
        plain = network.module(BATCHES[0]["input_ids"]).logits.softmax(-1)
        layer = network.layers()[2].module
        hook = layer.register_forward_hook(lambda m, args, out: args[0])
        without = network.module(BATCHES[0]["input_ids"]).logits.softmax(-1)
        hook.remove()
    slow = (plain - without).norm(dim=-1).max()
    assert found.values["decoder/2"]["output"] == pytest.approx(slow.item(), rel=1e-4)


def test_a_part_that_adds_nothing_can_be_left_out_and_another_cannot(network: Network) -> None:
    quiet(network, 1, "down")
    silent = described("skip_effect", network, part="mlp", prompts=1)
    assert silent.values["decoder/1"] == {"output": 0, "later": 0}
    assert silent.values["decoder/2"]["later"] > 0
    assert (
        described("skip_effect", network, part="attention", prompts=1).values["decoder/1"]["later"]
        > 0
    )
    whole = described("skip_effect", network, prompts=1)  # the other part is all of this layer
    attention = described("skip_effect", network, prompts=1, part="attention")
    rows = [f.maps["effect"][1] for f in (whole, attention)]
    torch.testing.assert_close(*rows, rtol=1e-4, atol=1e-6)


def test_a_direct_effect_by_hand(network: Network) -> None:
    """Layer 3 alone is run again on its input without what layer 1 added at positions 1 to 7."""
    table = described("skip_effect", network, prompts=1, places=1, direct=True).maps["effect"]
    kept: dict[int, Any] = {}
    for i, layer in enumerate(network.layers()):
        layer.module.register_forward_hook(
            lambda m, args, kwargs, out, i=i: (kept.update({i: (m, args, kwargs, out)}), None)[1],
            with_kwargs=True,
        )
    with torch.no_grad():
        network.module(BATCHES[0]["input_ids"], use_cache=False)
        gift = kept[1][3] - kept[1][1][0]
        missing = torch.cat([gift[:, :1] * 0, gift[:, 1:8], gift[:, 8:] * 0], 1)
        module, args, kwargs, out = kept[3]
        assert len(kept) == 4
        changed = module(args[0] - missing, **kwargs) - (args[0] - missing)
    clean = out - args[0]
    slow = ((clean - changed)[0, 8:].norm(dim=1) / clean[0, 8:].norm(dim=1)).max()
    assert table[1, 3].item() == pytest.approx(slow.item(), rel=1e-4)
    assert torch.equal(table.tril(), torch.zeros(4, 4).double())


def test_an_erased_state_by_hand(network: Network) -> None:
    found = described("erasure", network, prompts=1, places=2)
    assert found.values["decoder/3"] == {"largest": 0, "mean": 0}
    layer = network.layers()[1].module

    def swap(module: nn.Module, args: Any, out: Tensor) -> Tensor:
        out = out.clone()
        out[:, 8] = out.mean((0, 1))
        return out

    with torch.no_grad():
        ids = BATCHES[0]["input_ids"]
        plain = network.module(ids).logits.softmax(-1)
        hook = layer.register_forward_hook(swap)
        gap = network.module(ids).logits.softmax(-1) - plain
        hook.remove()
    slow = gap[:, 16:].norm(dim=-1).max().item()
    assert found.maps["effect"][1, 1].item() == pytest.approx(slow, rel=1e-4)
    for layer in range(4):
        quiet(network, layer, "o")
    assert described("erasure", network, prompts=1).maps["effect"].max() == 0


def test_integrated_gradients_add_up_and_end_at_the_last_position(network: Network) -> None:
    found = described("integrated_gradients", network, steps=24)
    for row in found.values.values():
        assert abs(row["gap"]) < 0.03 * abs(row["total"]) + 1e-3
    assert found.values["decoder/3"]["last"] == pytest.approx(1)
    assert found.values["decoder/3"]["back"] == pytest.approx(0)
    assert 0 < found.values["decoder/0"]["last"] < 1
    weight = torch.arange(6.0).reshape(2, 3)
    x, start = torch.ones(2, 3), torch.full((2, 3), 0.5)
    linear = path_attribution(lambda h: (h * weight).sum(), x, start, 1)
    torch.testing.assert_close(linear, 0.5 * weight.sum(1))


def test_a_token_wise_layer_can_be_replaced_by_its_map(network: Network) -> None:
    """Layer 1 adds nothing, so its map is the identity and the answer stays; layer 2's does not."""
    quiet(network, 1, "o", "down")
    found = described("fit_effect", network, prompts=1).values
    assert found["decoder/1"]["kl"] == pytest.approx(0, abs=1e-6)
    assert found["decoder/2"]["kl"] > 1e-4
    assert -1 <= found["decoder/2"]["spearman"] <= 1
    assert -1 <= found["decoder"]["spearman"] <= 1


def test_a_layer_stands_in_for_itself_and_training_lowers_the_loss(network: Network) -> None:
    still = described("task_match", network, steps=0, at=2)
    whole = still.values["decoder"]["loss"]
    assert still.values["decoder/2"]["loss"] == pytest.approx(whole, rel=1e-6)
    assert still.values["decoder/0"]["loss"] != pytest.approx(whole, rel=1e-3)
    ids = IDS[0].repeat(1, 1)
    rerun = Rerun(network, [{"input_ids": ids, "labels": ids.roll(-1, 1)}] * 2)
    with torch.no_grad():
        trained = find("task_match").bind({"steps": 12, "at": 2}, rerun=rerun)(
            network.stack, Stats({})
        )
        before = find("task_match").bind({"steps": 0, "at": 2}, rerun=rerun)(
            network.stack, Stats({})
        )
    assert trained.values["decoder/0"]["loss"] < before.values["decoder/0"]["loss"] - 0.1
    assert all(p.grad is None for p in network.module.parameters())
