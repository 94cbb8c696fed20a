"""Lockstep computes what plain forwards compute, bit for bit, in both streams."""

import gc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from greenlet import greenlet
from transformers import AutoModelForCausalLM

from layerwise.core.lockstep import walk
from layerwise.core.network import Network
from layerwise.core.open import open_network
from layerwise.core.stats import Probe, observe

KINDS = ("llama", "gpt2", "mixtral", "dbrx", "opt", "falcon")


def batches() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(0, 100, (2, n), generator=generator)} for n in (9, 9, 6)]


def plain(module: torch.nn.Module) -> list[torch.Tensor]:
    with torch.no_grad():
        return [module(**batch, use_cache=False).logits for batch in batches()]


def rounded(weight: torch.Tensor) -> torch.Tensor:
    scale = weight.abs().amax(1, keepdim=True).clamp_min(1e-9) / 7
    return (weight / scale).round() * scale


def edited_walk(network: Network) -> tuple[dict, dict[str, torch.Tensor], int]:
    """Round every matrix as it is reached; logits per (batch, clean), matrices, layers brought."""
    logits, records, layers = {}, {}, 0
    stops = walk(
        network,
        batches(),
        matrices="pause",
        clean=True,
        finish=lambda i, clean, out: logits.__setitem__((i, clean), out.logits),
    )
    for stop in stops:
        layers += stop.kind == "leave"
        for rows in stop.rows:
            for matrix in rows.matrices:
                records[matrix.key] = rounded(stop.weight(matrix))
                stop.substitute(matrix, records[matrix.key])
    return logits, records, layers


@pytest.mark.parametrize("kind", KINDS)
def test_streamed_edited_and_clean(kind: str, tiny: Callable[..., Path]) -> None:
    folder = tiny(kind)
    module = AutoModelForCausalLM.from_pretrained(folder).eval()
    for parameter in module.parameters():  # how weights lie in a file shows in the last bit
        parameter.data = parameter.data.clone()
    before = plain(module)
    network = open_network(folder)
    logits, records, layers = edited_walk(network)
    assert layers == len(network.layers())
    assert set(records) == {m.key for m in network.stack.matrices()}
    for i, wanted in enumerate(before):
        assert torch.equal(logits[i, True], wanted)
    resident = open_network(module)
    for layer in resident.layers():
        parameters = dict(layer.module.named_parameters())
        for matrix in layer.matrices:
            view = matrix.view(parameters[matrix.parameter].data)
            view.copy_(records[matrix.key])
    for i, wanted in enumerate(plain(module)):
        assert torch.equal(logits[i, False], wanted)


def test_nothing_is_left_in_the_model(tiny: Callable[..., Path]) -> None:
    folder = tiny("llama")
    module = AutoModelForCausalLM.from_pretrained(folder).eval()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())
    edited_walk(open_network(module))
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
    after = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())
    assert after == hooks


def test_an_aborted_walk_leaves_nothing_suspended(tiny: Callable[..., Path]) -> None:
    network = open_network(tiny("llama"))
    gc.collect()
    before = sum(isinstance(o, greenlet) and bool(o) for o in gc.get_objects())
    for stop in walk(network, batches(), matrices="pause"):
        if stop.layer.index == 1:
            break
    del stop
    gc.collect()
    after = sum(isinstance(o, greenlet) and bool(o) for o in gc.get_objects())
    assert after <= before
    assert torch.is_grad_enabled()


def test_an_error_names_layer_and_batch(tiny: Callable[..., Path]) -> None:
    network = open_network(tiny("llama"))

    def boom(*args: object) -> None:
        raise RuntimeError("boom")

    network.layers()[1].module.register_forward_hook(boom)
    with pytest.raises(RuntimeError) as caught:
        list(walk(network, batches()))
    assert any("decoder/" in note for note in caught.value.__notes__)


def test_gradients_and_inference_state_survive(tiny: Callable[..., Path]) -> None:
    network = open_network(tiny("gpt2"))
    with torch.no_grad():
        list(walk(network, batches()))
        assert not torch.is_grad_enabled()
    assert torch.is_grad_enabled()


def test_one_pass_and_one_call_per_layer(tiny: Callable[..., Path]) -> None:
    """All probes together: every layer is called once per batch."""
    network = open_network(tiny("llama"))
    calls = []
    for layer in network.layers():
        layer.module.register_forward_hook(lambda m, a, o, k=layer.key: calls.append(k))
    from layerwise.measure import last_states, residual_cosine, second_moment, update_norm

    probes = {
        "a": residual_cosine(),
        "b": update_norm(),
        "c": last_states(),
        "d": second_moment(),
    }
    observe(network, batches(), probes)
    assert len(calls) == 3 * len(network.layers())


def test_a_probe_feeds_a_probe(tiny: Callable[..., Path]) -> None:
    """Token weights that a replay emits reach the second moment of the same layer."""
    from layerwise.measure import second_moment

    network = open_network(tiny("llama"))

    def look(state, seen):
        output = seen.replay()
        tensor = output if isinstance(output, torch.Tensor) else output[0]
        return torch.full(tensor.shape[:2], 4.0)

    twos = Probe("call", lambda key: None, look, lambda s: s, emit=lambda s: s)
    plainly = observe(network, batches(), {"h": second_moment()})
    weighed = observe(network, batches(), {"w": twos, "h": second_moment(weights="w")})
    for key, value in plainly["h"].items():
        assert torch.allclose(4 * value, weighed["h"][key], rtol=1e-4)


def test_clean_rows_stand_beside_the_edited(tiny: Callable[..., Path]) -> None:
    network = open_network(tiny("gpt2"))
    differ = 0
    for stop in walk(network, batches(), matrices="pause", clean=True):
        for rows in stop.rows:
            assert rows.clean.keys() == rows.edited.keys()
            same = all(torch.equal(rows.clean[i], rows.edited[i]) for i in rows.clean)
            differ += not same
            for matrix in rows.matrices:
                stop.substitute(matrix, rounded(stop.weight(matrix)))
    assert differ >= len(network.layers())
