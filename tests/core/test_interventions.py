"""Interventions change exactly what they must, on unlike kinds of networks, and leave no trace."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import layerwise
from layerwise.core.errors import LayerwiseError
from layerwise.core.network import Network
from layerwise.intervene import (
    At,
    Intervention,
    ablate,
    add,
    keeping,
    patch,
    repeat,
    replace,
    scale,
    sites,
    skip,
    stop,
)
from layerwise.jobs.stock import standing_in
from layerwise.jobs.tail import Tail

IDS = torch.arange(3, 27).reshape(2, 12)
KINDS = ("llama", "mixtral", "gpt2", "falcon", "neox", "mamba", "t5", "bart", "vit")


def _module(kind: str) -> nn.Module:
    import transformers as t

    words = {"vocab_size": 128, "d_model": 64, "decoder_start_token_id": 0}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 2}
    widths = {"encoder_ffn_dim": 96, "decoder_ffn_dim": 96}
    depths = {"encoder_layers": 2, "decoder_layers": 3}
    small = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 96}
    makers: dict[str, Callable[[], nn.Module]] = {
        "t5": lambda: t.T5ForConditionalGeneration(
            t.T5Config(**words, d_kv=16, d_ff=96, num_layers=2, num_heads=4)
        ),
        "bart": lambda: t.BartForConditionalGeneration(
            t.BartConfig(**words, **heads, **widths, **depths)
        ),
        "vit": lambda: t.ViTForImageClassification(
            t.ViTConfig(**small, num_hidden_layers=3, image_size=32, patch_size=8)
        ),
    }
    makers["xglm"] = lambda: t.XGLMForCausalLM(
        t.XGLMConfig(
            vocab_size=128, d_model=64, ffn_dim=96, num_layers=2, attention_heads=4, init_std=0.1
        )
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return makers[kind]()


def batch_for(kind: str) -> dict[str, Tensor]:
    if kind == "vit":
        return {"pixel_values": torch.sin(torch.arange(2 * 3 * 32 * 32.0)).reshape(2, 3, 32, 32)}
    return {"input_ids": IDS} | (
        {"decoder_input_ids": IDS[:, :5]} if kind in ("t5", "bart") else {}
    )


@pytest.fixture(scope="module")
def opened(tiny: Callable[..., Any]) -> Callable[[str], tuple[Network, dict[str, Tensor]]]:
    made: dict[str, Network] = {}

    def make(kind: str) -> tuple[Network, dict[str, Tensor]]:
        batch = batch_for(kind)
        if kind not in made:
            own = kind in ("t5", "bart", "vit", "xglm")
            network = layerwise.open(_module(kind), inputs=batch) if own else None
            made[kind] = network or layerwise.open(tiny(kind)).load()
        return made[kind], batch

    return make


def logits(network: Network, batch: dict[str, Tensor], edits: Any = ()) -> Tensor:
    return network.run(batch, edits).logits


def everywhere(network: Network) -> list[At]:
    """The stream, what every part adds, and what the last matrix of every layer receives."""
    found = []
    for stack in network.stacks:
        for part in ("in", "out"):
            found += sites(network, part, stack=stack.name)
        for layer in stack.layers:
            dense = [m for m in layer.matrices if m.expert is None]
            found += [At(layer.key, part.name) for part in layer.parts]
            found.append(At(layer.key, f"{dense[-1].part}.{dense[-1].role}"))
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_patching_with_its_own_activations_changes_nothing(opened, kind: str) -> None:
    network, batch = opened(kind)
    before = logits(network, batch)
    cached = network.cache(batch, everywhere(network))
    assert torch.equal(cached.output.logits, before)
    assert set(cached) == set(everywhere(network))
    for at in cached:
        assert torch.equal(logits(network, batch, [patch(at, cached)]), before), at.label
        assert torch.equal(logits(network, batch, [scale(at, 1)]), before), at.label
        assert not torch.equal(logits(network, batch, [scale(at, 3)]), before), at.label
    all_of_it = [patch(at, cached) for at in cached]
    assert torch.equal(logits(network, batch, all_of_it), before)
    places = [vars(module) for module in network.module.modules()]
    assert not any("forward" in place for place in places)
    assert not network.module._forward_pre_hooks


@pytest.mark.parametrize("kind", ["llama", "gpt2", "falcon", "neox", "mixtral"])
def test_the_stream_is_the_sum_of_what_parts_add(opened, kind: str) -> None:
    network, batch = opened(kind)
    found = network.cache(batch, sites(network, "in", "attention", "mlp", "out"))
    for i in range(len(network.stack.layers)):
        parts = found[At(i, "attention")] + found[At(i, "mlp")]
        torch.testing.assert_close(found[At(i, "in")] + parts, found[At(i)], rtol=1e-4, atol=1e-5)
    hidden = network.model(**batch, output_hidden_states=True).hidden_states
    assert torch.equal(found[At(1)], hidden[2])


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bart", "vit", "xglm"])
def test_heads_are_slices_of_what_the_projection_receives(opened, kind: str) -> None:
    """Reference: the columns of the output projection set to zero."""
    network, batch = opened(kind)
    layer = network.stack.layers[1]
    found = network.cache(batch, [At(1, "attention", heads=range(2)), At(1, "attention.o")])
    heads, whole = found.values.values()
    width = heads.shape[-1]
    assert torch.equal(heads.flatten(2), whole[..., : 2 * width])
    one = At(1 - len(network.stack.layers), "attention", positions=-1, heads=1)
    assert torch.equal(found[one], heads[:, -1:, 1:])
    with pytest.raises(LayerwiseError, match=r"1 attention, head 0-1; 1 attention\.o"):
        found[At(1, "attention", heads=2)]
    got = logits(network, batch, [ablate(At(1, "attention", heads=1))])
    matrix = [m for m in layer.matrices if m.part == "attention"][-1]
    parameter = dict(layer.module.named_parameters())[matrix.parameter]
    kept = parameter.data.clone()
    matrix.view(parameter.data)[:, width : 2 * width] = 0
    wanted = logits(network, batch)
    parameter.data.copy_(kept)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(got, logits(network, batch))


@pytest.mark.parametrize("kind", KINDS)
def test_skip_is_what_stand_ins_do(opened, kind: str) -> None:
    network, batch = opened(kind)
    layers = network.stack.layers
    got = logits(network, batch, [skip(1)])
    with torch.no_grad(), standing_in(layers, {layers[1].key: None}):
        wanted = network.run(batch).logits
    assert torch.equal(got, wanted)
    assert torch.equal(logits(network, batch, [repeat(1, 1)]), logits(network, batch))


def test_repeat_is_a_wiring(tiny) -> None:
    wired = layerwise.open(tiny("llama"), wiring={"decoder": [0, 1, 1, 2, 3]}).load()
    network = layerwise.open(tiny("llama")).load()
    batch = {"input_ids": IDS}
    assert torch.equal(logits(network, batch, [repeat(1)]), logits(wired, batch))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
def test_stopping_is_the_lens(opened, kind: str) -> None:
    network, batch = opened(kind)
    tail = Tail(network, batch)
    name = network.stacks[-1].name
    for at, state in network.cache(batch, sites(network, stack=name)).values.items():
        with torch.no_grad():
            wanted = tail(state)
        got = logits(network, batch, stop(network, at.layer))
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "falcon", "mamba", "t5"])
@pytest.mark.parametrize("site", [At(1), At(1, positions=range(5, 13)), At(0, positions=(2, 10))])
def test_generating_with_a_cache_is_generating_without(opened, kind: str, site: At) -> None:
    network, _ = opened(kind)
    name = network.stacks[-1].name
    site = site._replace(layer=f"{name}/{site.layer}")
    prompt, steps = (
        {"input_ids": IDS[:1, :8]},
        {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False},
    )
    vector = torch.sin(torch.arange(64.0))
    out: list[Tensor] = []
    for cached in (True, False):
        with network.edited([add(site, vector, 5)]):
            out.append(network.model.generate(**prompt, **steps, use_cache=cached))
    assert torch.equal(*out)
    if site.positions is None:
        plain = network.model.generate(**prompt, **steps)
        assert not torch.equal(out[0], plain)


def test_capturing_while_generating(opened) -> None:
    network, _ = opened("llama")
    kept: dict[At, list[Tensor]] = {}
    with network.edited([keeping(At(2), kept)]):
        ids = network.model.generate(IDS[:1], max_new_tokens=4, min_new_tokens=4, do_sample=False)
    whole = network.cache({"input_ids": ids})[At(2)]
    torch.testing.assert_close(torch.cat(kept[At(2)], 1), whole[:, :-1])


def test_repeat_refuses_a_cache_and_skip_takes_it(opened) -> None:
    network, _ = opened("llama")
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    with pytest.raises(LayerwiseError, match="use_cache=False"), network.edited([repeat(1)]):
        network.model.generate(IDS[:1], **options)
    out = []
    for cached in (True, False):
        with network.edited([skip(0), skip(2)]):
            out.append(network.model.generate(IDS[:1], **options, use_cache=cached))
    assert torch.equal(*out)


def test_gradients_reach_every_site(opened) -> None:
    network, batch = opened("llama")
    where = [*sites(network, "in", "attention", "mlp", "out"), At(2, "attention", heads=(0, 3))]
    found = network.cache(batch, where, grad=True)
    assert torch.equal(found.output.logits, logits(network, batch))
    gradients = torch.autograd.grad(found.output.logits[:, -1].sum(), list(found.values.values()))
    assert all(g.abs().sum() > 0 for g in gradients)
    with pytest.raises(RuntimeError, match="does not require grad"):
        network.run(batch).logits.sum().backward()


def test_streamed_networks_bring_their_layers(tiny) -> None:
    edits = [scale(At(1, "mlp"), 0.5), skip(2)]
    streamed, loaded = layerwise.open(tiny("llama")), layerwise.open(tiny("llama")).load()
    batch = {"input_ids": IDS}
    assert torch.equal(logits(streamed, batch, edits), logits(loaded, batch, edits))
    assert all(
        p.stride() == (0, 0) for p in streamed.stack.layers[0].module.parameters() if p.ndim == 2
    )


@pytest.mark.parametrize(
    ("edit", "found"),
    [
        (scale(At(9), 1), "-4 to 3"),
        (scale(At("decode/1"), 1), "did you mean decoder/1"),
        (scale(At(1, "mixer"), 1), "additions of attention, mlp"),
        (scale(At(1, "mlp.x"), 1), "attention.o"),
        (scale(At(1, positions=40), 1), "positions 0 to 11"),
        (scale(At(1, "mlp", heads=0), 1), "no attention before"),
        (replace(At(1), torch.zeros(7)), r"\[2, 12, 64\]"),
    ],
)
def test_one_clear_error(opened, edit: Intervention, found: str) -> None:
    network, batch = opened("llama")
    with pytest.raises(LayerwiseError, match=found):
        network.run(batch, [edit])
    assert not any("forward" in vars(m) for m in network.module.modules())


def test_heads_that_cannot_be_seen(opened) -> None:
    network, batch = opened("mamba")
    with pytest.raises(LayerwiseError, match="no attention before"):
        network.run(batch, [ablate(At(0, "mixer", heads=0))])
    network, batch = opened("mixtral")
    with pytest.raises(LayerwiseError, match="one matrix per expert"):
        network.run(batch, [ablate(At(0, "mlp.down"))])
