"""Leaving layers out for earlier tokens, and layers that stand in for others."""

import pytest
import torch
from torch import Tensor

import layerwise
from layerwise.core.method import find
from layerwise.core.network import Network
from layerwise.core.stats import Figures, Stats
from layerwise.describe.effects import places_of, skipped
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


def described(name: str, network: Network, **options: int) -> Figures:
    rerun = Rerun(network, BATCHES)
    with torch.no_grad():
        return find(name).bind(options, rerun=rerun)(network.stack, Stats({}))


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
    x, y = torch.zeros(1, 5, 1), torch.ones(1, 5, 1)
    assert skipped(3)(x, y)[0, :, 0].tolist() == [1, 0, 0, 1, 1]


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
