"""Lenses: at the last layer the network's own answer, bit for bit; known answers elsewhere."""

import copy
import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

import layerwise
from layerwise.core.errors import LayerwiseError
from layerwise.core.lockstep import walk
from layerwise.core.method import find
from layerwise.core.network import Network
from layerwise.core.stats import Stats, observe
from layerwise.core.stops import hidden
from layerwise.core.tokens import Sample
from layerwise.describe.lens import active_layers, answer_of, compared, translator
from layerwise.jobs.tail import Tail

BATCH = {"input_ids": torch.randint(3, 60, (3, 12), generator=torch.Generator().manual_seed(0))}


def configured(kind: str) -> Any:
    """Tiny networks whose ends differ: soft caps, scales, projections, transforms, no norm."""
    import transformers as t

    c = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
    heads = {"num_key_value_heads": 2, "intermediate_size": 48}
    return {
        "gemma2": lambda: t.Gemma2ForCausalLM(t.Gemma2Config(**c, **heads, head_dim=8, final_logit_softcapping=3.0)),
        "cohere": lambda: t.CohereForCausalLM(t.CohereConfig(**c, **heads, logit_scale=0.3, eos_token_id=1)),
        "granite": lambda: t.GraniteForCausalLM(t.GraniteConfig(**c, **heads, logits_scaling=4.0)),
        "opt": lambda: t.OPTForCausalLM(t.OPTConfig(**c, ffn_dim=48, word_embed_proj_dim=16, do_layer_norm_before=False)),
        "bert": lambda: t.BertForMaskedLM(t.BertConfig(**c, intermediate_size=48)),
        "gpt2": lambda: t.GPT2LMHeadModel(t.GPT2Config(vocab_size=64, n_embd=32, n_layer=3, n_head=4, n_positions=64)),
        "mamba": lambda: t.MambaForCausalLM(t.MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=3, state_size=4)),
        "bart": lambda: t.BartForConditionalGeneration(
            t.BartConfig(vocab_size=64, d_model=32, encoder_layers=2, decoder_layers=3, encoder_attention_heads=4,
                         decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48)
        ),
    }[kind]()  # fmt: skip


def opened(kind: str) -> Network:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return layerwise.open(configured(kind))


def inputs(kind: str) -> dict[str, Tensor]:
    return BATCH | {"decoder_input_ids": BATCH["input_ids"][:, :9]} if kind == "bart" else BATCH


@pytest.mark.parametrize(
    "kind", ["gemma2", "cohere", "granite", "opt", "bert", "gpt2", "mamba", "bart"]
)
def test_the_end_of_the_network_says_what_the_network_says(kind: str) -> None:
    network, batch = opened(kind), inputs(kind)
    tail, states = Tail(network, batch), []
    with torch.no_grad():
        logits = network.module(**batch)["logits"]
    for stop in walk(network, [batch]):
        if stop.kind == "leave" and stop.layer.key == network.stacks[-1].layers[-1].key:
            states.append(hidden(stop.lanes[0].output))
    with torch.no_grad():
        assert torch.equal(tail(states[0]), logits)
        assert not torch.equal(tail(states[0] * 1.5 + 1), logits)
        assert torch.equal(network.module(**batch)["logits"], logits)  # nothing was left behind


def test_a_streamed_network_has_the_same_end(tiny) -> None:
    states = torch.randn(2, 7, 64, generator=torch.Generator().manual_seed(0))
    ends = [
        Tail(network, BATCH)(states)
        for network in (layerwise.open(tiny("llama")), layerwise.open(tiny("llama")).load())
    ]
    assert torch.equal(*ends)


def test_images_have_no_lens() -> None:
    network = opened("gpt2")
    with pytest.raises(LayerwiseError, match="a word per position"):
        Tail(copy.copy(network).__class__(**(vars(network) | {"task": "classify"})), BATCH)


def slow_comparison(final: Tensor, early: Tensor) -> list[float]:
    p, q = final.softmax(-1).tolist(), early.softmax(-1).tolist()
    kl = sum(b * math.log(b / a) for a, b in zip(p, q, strict=True))
    entropy = -sum(b * math.log(b) for b in q)
    top = lambda x: {i for i, _ in sorted(enumerate(x), key=lambda pair: -pair[1])[:5]}  # noqa: E731
    choice = max(range(len(p)), key=p.__getitem__)
    rank = 1 + sum(b > q[choice] for b in q)
    return [kl, len(top(p) & top(q)) / 5, entropy, rank, float(max(q) == q[choice])]


def test_what_a_lens_reports() -> None:
    final, early = torch.randn(2, 4, 20, generator=torch.Generator().manual_seed(0))
    expected = torch.tensor([slow_comparison(a, b) for a, b in zip(final, early, strict=True)])
    torch.testing.assert_close(
        compared(answer_of(final), early).float(), expected, rtol=1e-5, atol=1e-5
    )


def described(name: str, network: Network, probe: dict[str, Any] = {}, **options: Any) -> Any:
    stats = observe(network, [BATCH], {"token_sample": find("token_sample").bind(probe)()})
    return find(name, "describe").bind(options, tail=Tail(network, BATCH), prompt=0)(
        network.stack, stats
    )


def test_the_last_layer_agrees_with_itself_and_layers_that_add_nothing_with_each_other(
    tiny,
) -> None:
    network = layerwise.open(tiny("llama")).load()
    for layer in network.layers()[2:]:
        for matrix in layer.matrices:
            if matrix.role in ("o", "down"):
                dict(layer.module.named_parameters())[matrix.parameter].data.zero_()
    found = described("lens", network)
    rows = [tuple(row.values()) for row in found.values.values()]
    assert found.values["decoder/3"]["kl"] == pytest.approx(0, abs=1e-9)
    assert (found.values["decoder/3"]["overlap"], found.values["decoder/3"]["agree"]) == (1, 1)
    assert rows[1] == rows[2] == rows[3]
    assert found.values["decoder/0"]["kl"] > 0.01
    assert found.maps["kl"].shape == (5, 36)


def test_a_normed_lens_is_blind_to_scale(tiny) -> None:
    network = layerwise.open(tiny("llama")).load()
    tail, x = Tail(network, BATCH), torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(tail(7 * x), tail(x), rtol=1e-4, atol=1e-4)


def test_an_untrained_tuned_lens_is_the_logit_lens_and_a_trained_one_undoes_a_turn(tiny) -> None:
    network = layerwise.open(tiny("llama")).load()
    tail = Tail(network, BATCH)
    last = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    turn = torch.linalg.qr(torch.randn(64, 64, generator=torch.Generator().manual_seed(1))).Q
    x = last @ (torch.eye(64) + 0.3 * turn)
    assert torch.equal(translator(x, last, tail, 0, 0.1)(x), x)
    before, after = (
        compared(answer_of(tail(last)), tail(translator(x, last, tail, steps, 0.1)(x)).detach())[
            :, 0
        ].mean()
        for steps in (0, 80)
    )
    assert after < 0.35 * before
    assert all(p.grad is None for p in network.module.parameters())


def test_tuned_lens_on_held_out_documents(tiny) -> None:
    found = described("tuned_lens", layerwise.open(tiny("llama")).load(), steps=20)
    assert found.values["decoder/3"] == {}
    assert found.values["decoder/0"]["kl"] < found.values["decoder/0"]["kl_plain"]


def test_voids_by_the_range_so_far_and_by_a_fall() -> None:
    growth = torch.tensor([[3.0, -1.0], [1.0, 0.0], [-1.0, 2.0], [2.0, 0.5]])
    assert active_layers(growth, 0.8, "range").tolist() == [
        [True, False],
        [True, True],
        [False, True],
        [False, False],
    ]
    assert active_layers(growth, 0.8, "fall").tolist() == [
        [True, False],
        [True, True],
        [False, True],
        [True, True],
    ]


def test_a_token_is_read_out_where_it_was_last_active(tiny) -> None:
    """Norms 1, 4, 5, 4, 6 as in the worked example; the third layer's state is the answer."""
    network = layerwise.open(tiny("llama")).load()
    unit = torch.nn.functional.normalize(
        torch.randn(3, 64, generator=torch.Generator().manual_seed(0)), dim=1
    )
    states = [s * unit for s in (1.0, 4.0, 5.0, 4.0, 6.0)]
    where = torch.tensor([[0, 0], [0, 1], [0, 2]])
    keys = [layer.key for layer in network.layers()]
    samples = {k: Sample(where, *pair) for k, pair in zip(keys, pairwise(states), strict=True)}
    seen: list[Tensor] = []

    def tail(x: Tensor) -> Tensor:
        seen.append(x)
        return x

    method = find("voids", "describe").bind({}, tail=tail, prompt=1)
    found = method(network.stack, Stats({"token_sample": samples}))
    assert [found.values[k]["active"] for k in keys] == [1, 1, 0, 0]
    assert torch.equal(seen[1], states[2]) and torch.equal(seen[0], states[4])
    assert found.values["decoder"]["used"] == 0.5
    assert found.values["decoder/0"]["active_response"] == 1
