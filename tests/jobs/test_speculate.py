"""Drafts change the speed, never the text; drawn text keeps its distribution."""

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor

import layerwise
from layerwise.core.errors import LayerwiseError
from layerwise.core.network import Network
from layerwise.jobs.costs import Costs, Rounds
from layerwise.jobs.decoding import Session
from layerwise.jobs.generate import generate
from layerwise.jobs.pays import (
    LENGTHS,
    PLAIN,
    SURE,
    Places,
    Setting,
    agreement,
    decode,
    forecast,
    median_interval,
    per_round,
)
from layerwise.jobs.speculate import Draft, Sampling
from layerwise.run import same_choices, speculative_sample

PROMPT = torch.arange(3, 15)[None]


def small(kind: str, **fields: Any) -> Network:
    """A network of a configuration, with weights that matter."""
    import transformers as t

    common = {"vocab_size": 128, "hidden_size": 64, "initializer_range": 0.1}
    common |= {"intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = getattr(t, f"{kind}Config")(**common | fields)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        module = t.AutoModelForCausalLM.from_config(config).eval()
    return layerwise.open(module, inputs={"input_ids": PROMPT})


SLIDING = {"num_key_value_heads": 2, "sliding_window": 6}
LINEAR = {"num_key_value_heads": 2, "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2}
LINEAR |= {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 32}
LINEAR |= {"linear_num_value_heads": 4, "linear_num_key_heads": 2}
LINEAR |= {"linear_key_head_dim": 16, "linear_value_head_dim": 16}
MADE: dict[str, Callable[[], Network]] = {
    "sliding": lambda: small("Mistral", **SLIDING),
    "both kinds": lambda: small(
        "Gemma2", **SLIDING, head_dim=16, layer_types=["sliding_attention", "full_attention"] * 2
    ),
    "linear": lambda: small("Qwen3Next", **LINEAR),
    "conv": lambda: small(
        "Lfm2", num_key_value_heads=2, layer_types=["conv", "full_attention"] * 2
    ),
    "mamba2": lambda: small(
        "Mamba2", num_heads=8, head_dim=16, n_groups=1, state_size=16, chunk_size=8
    ),
    "no cache": lambda: small("OpenAIGPT"),
}
KINDS = ("llama", "mixtral", "gpt2", "opt", "falcon", "neox", "mamba", *MADE)


@pytest.fixture(scope="module")
def opened(tiny: Callable[..., Any]) -> Callable[[str], Network]:
    made: dict[str, Network] = {}

    def make(kind: str) -> Network:
        if kind not in made:
            made[kind] = MADE[kind]() if kind in MADE else layerwise.open(tiny(kind)).load()
        return made[kind]

    return make


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [1, 3, 7])
@pytest.mark.parametrize("again", [False, True])
def test_a_draft_changes_no_token(opened, kind: str, length: int, again: bool) -> None:
    network = opened(kind)
    depth = len(network.stack.layers)
    plain = generate(network, PROMPT, max_tokens=20).tokens
    skip = (2,) if kind == "both kinds" else (1,)
    for left_out in [tuple(range(depth - 1, depth)), tuple(range(1, depth)), skip]:
        sure = 0.02 * (length == 7)  # of 128 tokens: a draft ends early at some places
        draft = Draft(left_out, length, sure=sure, again=again)
        found = generate(network, PROMPT, max_tokens=20, speculate=draft)
        assert found.tokens == plain
        assert found.tally is not None
        assert found.tally.written == len(plain[0]) - 1
        assert found.tally.kept <= found.tally.drafted
    assert not any("forward" in vars(la.module) for la in network.layers())


def test_a_draft_of_an_edited_order(tiny) -> None:
    order = [0, 1, 1, {"layer": 2, "parts": ["mlp"]}, {"parallel": [2, 3]}]
    network = layerwise.open(tiny("llama"), wiring={"decoder": order}).load()
    plain = generate(network, PROMPT, max_tokens=16).tokens
    found = generate(network, PROMPT, max_tokens=16, speculate=Draft((3, 4, 5), 3))
    assert found.tokens == plain


def test_a_perfect_draft_is_kept_whole(opened) -> None:
    network = opened("llama")
    last = network.stack.layers[-1].module
    kept = [p.clone() for p in last.parameters()]
    try:
        for p in last.parameters():
            p.data.zero_()  # a layer that adds nothing: leaving it out proposes the right tokens
        found = [
            generate(network, PROMPT, max_tokens=13, speculate=Draft((3,), 3, again=again)).tally
            for again in (False, True)
        ]
    finally:
        for p, own in zip(last.parameters(), kept, strict=True):
            p.data.copy_(own)
    # where all layers verify, they add a token to the three that stay
    assert [(t.rounds, t.drafted, t.kept) for t in found if t] == [(4, 12, 12), (3, 9, 9)]


def test_it_stops_where_plain_decoding_stops(opened) -> None:
    network = opened("gpt2")
    plain = generate(network, PROMPT, max_tokens=20).tokens[0]
    end = plain[7]
    network.model.generation_config.eos_token_id = end
    open_ended = network.folder
    try:
        network = layerwise.core.network.replace(network, folder=None)
        for speculate in (None, Draft((2,), 4)):
            found = generate(network, PROMPT, max_tokens=20, speculate=speculate)
            assert found.tokens[0] == plain[: plain.index(end) + 1]
    finally:
        network.model.generation_config.eos_token_id = None
        assert open_ended is not None


@pytest.mark.parametrize(
    ("kind", "at_once"), [("linear", True), ("conv", True), ("mamba2", True), ("mamba", False)]
)
def test_states_that_cannot_be_taken_back(opened, kind: str, at_once: bool) -> None:
    """A copy of the cache is put back, and the forecast knows what that costs."""
    network = opened(kind)
    session = Session(network, range(1, len(network.stack.layers)))
    with torch.inference_mode():
        session.start(PROMPT[0].tolist())
        assert (session.past.cuts, session.keeps, session.at_once) == (False, False, at_once)
        first = session.feed([4])
        with session.drafting():
            session.feed([5])
            session.feed([6])
        found = session.verify(5, [6, 7], len(PROMPT[0]) + 1)
        session.settle([5, 6], len(PROMPT[0]) + 1)
        after = session.feed([8])
        plain = Session(network, ())
        plain.start(PROMPT[0].tolist())
        wanted = torch.cat([plain.feed([token]) for token in (4, 5, 6, 8)])
    got = torch.cat([first, found[:2], after])
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-4)
    assert session.past.text == [*PROMPT[0].tolist(), 4, 5, 6, 8]
    costs = forecast(network, [PROMPT[0].tolist()], Sampling(8)).costs
    assert costs.copy is not None and not costs.keeps
    tally = decode(network, PROMPT[0].tolist(), Sampling(3), Draft((1,), 1))[2]
    assert tally.at_once == at_once


def test_the_first_of_a_kind_has_to_run(opened) -> None:
    with pytest.raises(LayerwiseError, match="step 1 left out, the first with a DynamicLayer"):
        generate(opened("both kinds"), PROMPT, speculate=Draft((1,), 2))


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"max_tokens": 0}, "--max-tokens: allowed is 1 or more"),
        ({"temperature": -1.0}, "--temperature"),
        ({"top_p": 0.0}, "--top-p"),
        ({"top_k": -1}, "--top-k"),
    ],
)
def test_one_clear_error(opened, options: dict[str, Any], found: str) -> None:
    with pytest.raises(LayerwiseError, match=found):
        generate(opened("llama"), PROMPT, **options)


def test_no_prompt(opened) -> None:
    for empty in ([], torch.empty(1, 0, dtype=torch.long)):
        with pytest.raises(LayerwiseError, match="at least one token"):
            generate(opened("gpt2"), empty)


def test_same_choices_against_a_loop() -> None:
    for drafted in product(range(3), repeat=2):
        for chosen in product(range(3), repeat=3):
            wanted = []
            for i, token in enumerate(chosen):
                wanted.append(token)
                if i == 2 or drafted[i] != token:
                    break
            assert same_choices(torch.tensor(drafted), torch.tensor(chosen)) == wanted


def test_sampled_tokens_have_the_right_distribution() -> None:
    generator = torch.Generator().manual_seed(0)
    p, q = torch.rand(3, 5, generator=generator), torch.rand(2, 5, generator=generator)
    q[0, 1] = 0.0  # what the draft never proposes has to come from the rest
    p[1, 2] = 0.0  # what the network never says has to be turned down
    p, q = p / p.sum(-1, keepdim=True), q / q.sum(-1, keepdim=True)
    seen = [torch.zeros(5) for _ in range(3)]
    for _ in range(6000):
        drafted = torch.multinomial(q, 1, generator=generator)[:, 0]
        for place, token in enumerate(speculative_sample(drafted, q, p, generator)):
            seen[place][token] += 1
    for counts, wanted in zip(seen, p, strict=True):
        good = wanted > 0
        assert not counts[~good].any()
        expected = counts.sum() * wanted[good]
        assert chisquare(counts[good].numpy(), expected.numpy(), sum_check=False).pvalue > 1e-3


def test_sampled_text_has_the_network_s_distribution() -> None:
    network = small("Llama", vocab_size=5, num_hidden_layers=3, eos_token_id=None)
    prompt, sampling = [1, 2, 3], Sampling(4, temperature=1.3, top_k=4)
    wanted = torch.zeros(5, 5)
    for first in range(5):
        batch = {"input_ids": torch.tensor([[*prompt, first]])}
        p = sampling.weights(network.run(batch).logits[0])
        one, two = p[2], p[3]
        wanted[first] = one[first] * two
    seen, runs = torch.zeros(5, 5), 800
    for seed in range(runs):
        some = (1, 2) if seed % 2 else (1,)
        draft = Draft(some, 2, sure=0.3 * (seed % 4 > 1), again=seed % 8 > 3)
        text, _, _ = decode(network, prompt, sampling._replace(seed=seed), draft)
        seen[text[0], text[1]] += 1
    good = wanted > 0
    assert not seen[~good].any()
    assert chisquare(seen[good].numpy(), runs * wanted[good].numpy(), sum_check=False).pvalue > 1e-3


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_forecast_counts_what_decoding_counts(opened, kind: str) -> None:
    """On the text that the network writes itself, acceptance is known before it is drafted."""
    network, sampling = opened(kind), Sampling(24)
    prompt = PROMPT[0].tolist()
    text, _, _ = decode(network, prompt, sampling, PLAIN)
    places = agreement(network, [(prompt, text)], sampling)
    depth = len(network.stack.layers)
    ways = product(range(1, depth), (2, 3), (0.0, 0.03), (False, True))
    for exit, length, sure, again in ways:
        draft = Draft(tuple(range(exit, depth)), length, sure=sure, again=again)
        found, _, tally = decode(network, prompt, sampling, draft)
        assert found == text
        text_alone = Places(*(t[1:] for t in places[exit][0]))
        foreseen = per_round([text_alone], length, sure, keeps=not again)
        assert foreseen.written == pytest.approx(tally.written / tally.rounds, abs=0.35)
        assert foreseen.drafted == pytest.approx(tally.drafted / tally.rounds, abs=0.35)


def test_exits_are_the_networks_that_end_there(opened, tiny) -> None:
    network, prompt = opened("llama"), PROMPT[0].tolist()
    text, _, _ = decode(network, prompt, Sampling(12), PLAIN)
    places = agreement(network, [(prompt, text)], Sampling(12))
    batch = {"input_ids": torch.tensor([[*prompt, *text[:-1]]])}
    for exit in places:
        short = layerwise.open(tiny("llama"), wiring={"decoder": list(range(exit))})
        early: Tensor = short.load().run(batch).logits[0, len(prompt) - 1 :].argmax(-1)
        assert torch.equal(places[exit][0].stays, early == torch.tensor(text))


def test_a_forecast_and_its_choice(opened) -> None:
    found = forecast(opened("llama"), [PROMPT[0].tolist()], Sampling(8))
    assert found.costs.call >= 0  # 0 where a busy machine blurs it
    assert list(found.costs.forward) == sorted(found.costs.forward) and found.costs.keeps
    setting, speed = found.best()
    settings = [Setting(*s) for s in product((1, 2, 3), LENGTHS, SURE, (False, True))]
    assert speed == max(median_interval(found.speeds(s))[0] for s in settings)
    assert median_interval(found.speeds(setting))[0] == speed
    assert 0 <= found.stays(setting) <= 1
    costs = Costs(call=1.0, depth=4, forward=(5.0,) * 6)
    two = Rounds(written=1.5, drafted=2, whole=0.25)
    assert costs.of_round(two, 1) == 2 * (1 + 1) + (1 + 3)  # two tokens by one layer, then three
    assert costs._replace(keeps=False).of_round(two, 1) == 2 * (1 + 1) + (1 + 4)
    assert costs.of_round(two, 1, again=True) == 2 * (1 + 1) + (1 + 4)
    copied = costs._replace(copy=1.0).of_round(two, 1, again=True)
    assert copied == 2 * (1 + 1) + (1 + 4) + 2 * 1.0 + 0.75 * 5  # what stays runs again


def test_median_interval_holds_the_median() -> None:
    middle, low, high = median_interval([1.0, 2.0, 4.0, 3.0, 9.0])
    assert low <= middle == 3.0 <= high


def test_a_session_cuts_what_it_is_told_to(opened) -> None:
    network = opened("llama")
    session = Session(network, [2, 3])
    with torch.no_grad():
        session.start([1, 2, 3])
        first = session.feed([4, 5])
        session.past.back(3)
        with session.drafting():
            session.feed([6])
        assert [s.get_seq_length() for s in session.past.slots] == [4, 4, 3, 3]
        session.past.back(3)
        torch.testing.assert_close(session.feed([4, 5]), first)


@pytest.mark.parametrize("kind", ["llama", "sliding"])
def test_a_verification_goes_on_from_the_states_of_the_draft(opened, kind: str) -> None:
    network, calls = opened(kind), []
    parts = [layer.module.get_submodule("mlp") for layer in network.stack.layers]
    session = Session(network, [2, 3])
    with torch.no_grad():
        session.start(list(range(3, 12)))
        with session.drafting():
            session.feed([4])
            session.feed([5])
        handles = [
            m.register_forward_hook(lambda *_, i=i: calls.append(i)) for i, m in enumerate(parts)
        ]
        found = session.verify(4, [5, 6], 9)
        for handle in handles:
            handle.remove()
        assert calls == [2, 3], "what was drafted by runs again"
        assert [s.get_seq_length() for s in session.past.slots] == [11] * 4
        session.past.back(9)
        torch.testing.assert_close(found, session.feed([4, 5]))
