"""Execution orders run as a slow, obvious reference does, on unlike kinds of networks."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import layerwise
from layerwise.core.absent import leave_out
from layerwise.core.errors import LayerwiseError
from layerwise.core.instead import instead, swapped
from layerwise.core.network import Network
from layerwise.core.open import open_network
from layerwise.core.stack import Layer, Visit
from layerwise.core.stops import hidden
from layerwise.core.task import answer
from layerwise.core.visits import entries_of, parse_wiring, read_wiring
from layerwise.intervene import At, ablate
from layerwise.jobs.checks import out_of_place
from layerwise.jobs.measure import agrees_cached
from layerwise.jobs.stock import streamed

BATCH = {"input_ids": torch.arange(3, 27).reshape(2, 12)}
KINDS = ("llama", "mixtral", "gpt2", "opt", "falcon", "neox")


def walked(network: Network, visits: Sequence[Visit]) -> Tensor:
    """The unedited network's own layers, called one after the other by hand, without a cache."""
    calls: dict[str, tuple[tuple, dict]] = {}
    name = network.stack.name

    def note(layer: Layer) -> Callable[..., Any]:
        own = layer.module.forward

        def run(*args: Any, **kwargs: Any) -> Any:
            calls[layer.key] = args, kwargs
            return own(*args, **kwargs)

        return run

    with instead(network.layers(), note):
        network.run(BATCH)

    def step(visit: Visit, x: Tensor) -> Tensor:
        layer = network.stack.layers[visit.layer]
        args, kwargs = calls[layer.key]
        gone = [
            p.name for p in layer.parts if visit.parts is not None and p.name not in visit.parts
        ]
        with torch.no_grad(), network.edited([ablate(At(layer.index, part)) for part in gone]):
            return hidden(layer.module(*swapped(args, hidden((args, kwargs)), x), **kwargs))

    x = hidden(calls[f"{name}/0"])
    done: set[int] = set()
    for visit in visits:
        if visit.parallel is None:
            x = step(visit, x)
        elif visit.parallel not in done:
            done.add(visit.parallel)
            members = [v for v in visits if v.parallel == visit.parallel]
            x = x + sum(step(v, x) - x for v in members)

    def end(layer: Layer) -> Callable[..., Any]:
        own = layer.module.forward

        def run(*args: Any, **kwargs: Any) -> Any:
            output = own(*args, **kwargs)
            return swapped(output, hidden(output), x)

        return run

    with instead([network.stack.layers[-1]], end):
        return network.run(BATCH).logits


ORDERS = {
    "dropped": [0, 2],
    "doubled": [0, 1, 1, 2],
    "looped": [0, 1, 2, 1, 2],
    "without attention": [0, {"layer": 1, "parts": ["mlp"]}, 2],
    "without the first attention": [{"layer": 0, "parts": ["mlp"]}, 1, 2],
    "without mlp": [0, {"layer": 1, "parts": ["attention"]}, {"layer": 2, "parts": ["attention"]}],
    "in parallel": [0, {"parallel": [1, 2]}],
    "all of it": [0, 0, {"parallel": [1, {"layer": 2, "parts": ["mlp"]}]}, 2],
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ORDERS)
def test_an_order_runs_like_the_reference(tiny, kind: str, name: str) -> None:
    order = {"decoder": ORDERS[name]}
    plain, edited = layerwise.open(tiny(kind)), layerwise.open(tiny(kind), wiring=order)
    with streamed(edited, [BATCH]) as answers:
        in_lockstep = answers(BATCH)
    resident = edited.load()
    got = resident.run(BATCH).logits
    depth = len(plain.stack.layers)
    wanted = walked(plain.load(), parse_wiring(ORDERS[name], depth, ""))
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    assert torch.equal(in_lockstep, answer(resident.run(BATCH), BATCH))
    same, total = agrees_cached(resident.module, BATCH["input_ids"], 12)
    assert same == total


def test_shared_visits_share_their_memory_and_copies_do_not(tiny) -> None:
    order = [0, 1, 1, {"layer": 1, "copy": True}, 2]
    network = layerwise.open(tiny("llama"), wiring={"decoder": order}).load()
    layers = [layer.module for layer in network.stack.layers]
    held = [{name: p.data_ptr() for name, p in m.named_parameters()} for m in layers]
    assert held[1] == held[2]
    assert not set(held[1].values()) & set(held[3].values())
    assert [m.self_attn.layer_idx for m in layers] == [0, 1, 2, 3, 4]
    plain = layerwise.open(tiny("llama"), wiring={"decoder": [0, 1, 1, 1, 2]}).load()
    assert torch.equal(network.run(BATCH).logits, plain.run(BATCH).logits)


def test_a_part_that_is_left_out_is_not_computed(tiny) -> None:
    order = [0, {"layer": 1, "parts": ["mlp"]}, 2]
    network = layerwise.open(tiny("llama"), wiring={"decoder": order}).load()
    attention = network.stack.layers[1].module.self_attn
    for p in attention.parameters():
        p.data.fill_(torch.nan)
    assert torch.isfinite(network.run(BATCH).logits).all()
    kept = network.model(**BATCH, use_cache=True).past_key_values
    assert [slot.keys.shape[1:] for slot in kept.layers][1] == (1, 12, 1)


@pytest.mark.parametrize(
    ("order", "found"),
    [
        ([0, 9], "layer numbers from 0 to 3.*found 9"),
        ([True], "found True"),
        ([], "at least one layer"),
        ([{"layer": 1, "times": 2}], "found {'layer': 1, 'times': 2}"),
        ([{"layer": 1, "adapter": 1}], "found {'layer': 1, 'adapter': 1}"),
        ([{"layer": 1, "parts": []}], "found {'layer': 1, 'parts': "),
        ([{"layer": 1, "parts": "mlp"}], "found {'layer': 1, 'parts': 'mlp'}"),
        ([{"layer": 1, "parts": ["mixer"]}], "parts of it: attention, mlp; found mixer"),
        ([{"parallel": [1]}], "found {'parallel': "),
        ([{"parallel": [1, {"parallel": [0, 2]}]}], "found {'parallel'"),
        ([{"parallel": 1}], "found {'parallel': 1}"),
        (["1"], "found 1"),
    ],
)
def test_one_clear_error(tiny, order: list[Any], found: str) -> None:
    with pytest.raises(LayerwiseError, match=found):
        layerwise.open(tiny("llama"), wiring={"decoder": order} if order else {"decoder": ()})


@pytest.mark.parametrize("text", ["", "a", "3-1", "1*0", "1,,x", "1/", "1+", "0-99999*9", "1//mlp"])
def test_typed_orders_that_are_none(text: str) -> None:
    with pytest.raises(LayerwiseError, match="--wiring"):
        read_wiring(text)


def test_typed_orders_are_those_of_a_plan() -> None:
    text = "0-1*2, 3/mlp*2,4+5"
    part = {"layer": 3, "parts": ["mlp"]}
    assert read_wiring(text) == [0, 1, 0, 1, part, part, {"parallel": [4, 5]}]
    again = parse_wiring(read_wiring(text), 6, "")
    assert parse_wiring(entries_of(again), 6, "") == again


def test_parts_that_cannot_be_taken_out(tiny) -> None:
    with pytest.raises(LayerwiseError, match="allowed is parts of it: mixer"):
        layerwise.open(tiny("mamba"), wiring={"decoder": [0, {"layer": 1, "parts": ["mlp"]}]})


def test_parts_of_a_layer_that_norms_behind_its_addition() -> None:
    """Post-norm layers hold norm and addition in the part: no stand-in gives what is left."""
    import transformers as t

    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = t.BertConfig(vocab_size=64, intermediate_size=48, **small)
    network = layerwise.open(t.BertForMaskedLM(config), inputs=BATCH)
    visits = [Visit(0, parts=("mlp",)), Visit(1)]
    with pytest.raises(LayerwiseError, match="encoder/0 without attention"):
        leave_out(network.module, network.stack.layers, visits)


def test_parts_that_others_need(tiny) -> None:
    """The first attention of a T5 makes the positions that all later ones read."""
    import transformers as t

    config = t.T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=3, num_heads=4)
    batch = {**BATCH, "decoder_input_ids": BATCH["input_ids"][:, :5]}
    network = layerwise.open(t.T5ForConditionalGeneration(config), inputs=batch)
    stack = network.stacks[0]
    for step, refused in ((0, True), (1, False)):
        parts = [tuple(part.name for part in la.parts) for la in stack.layers]
        parts[step] = ("mlp",)
        visits = [Visit(i, parts=names) for i, names in enumerate(parts)]
        if refused:
            with pytest.raises(LayerwiseError, match="is used elsewhere"):
                leave_out(network.module, stack.layers, visits)
        else:
            leave_out(network.module, stack.layers, visits)


@pytest.mark.parametrize("key", ["causal/bloom", "causal/gptj", "causal/gpt_oss"])
def test_modules_that_add_or_return_more(key: str, tmp_path: Any) -> None:
    """Modules that add to the stream themselves, return attention, or hold experts with biases."""
    from build import build, entries

    entry = next(entry for entry in entries() if entry.key == key)
    build(entry).save_pretrained(tmp_path)  # type: ignore[operator]
    order = [0, {"layer": 1, "parts": ["mlp"]}, {"layer": 2, "parts": ["attention"]}]
    plain = layerwise.open(tmp_path).load()
    edited = layerwise.open(tmp_path, wiring={"decoder": order}).load()
    wanted = walked(plain, parse_wiring(order, 4, ""))
    torch.testing.assert_close(edited.run(BATCH).logits, wanted, rtol=1e-4, atol=1e-5)
    same, total = agrees_cached(edited.module, BATCH["input_ids"], 8)
    assert same == total


class _Scaled(LlamaDecoderLayer):
    """A layer that computes with its place, and one number that was taken from the depth."""

    def __init__(self, config: LlamaConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.scale, self.place = 1 / config.num_hidden_layers, layer_idx

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        added = super().forward(hidden_states, *args, **kwargs)
        return added * self.scale + (self.place > 2)


def test_a_layer_keeps_the_numbers_it_was_built_with(tiny, monkeypatch) -> None:
    """What is 1 over the depth stays so; what is another layer in its new place is told."""
    monkeypatch.setattr(modeling_llama, "LlamaDecoderLayer", _Scaled)
    wiring = {"decoder": [0, 1, 2, 2, 3]}
    network = open_network(tiny("llama"), wiring=wiring, dtype="float32")
    assert {layer.module.scale for layer in network.layers()} == {0.25}
    assert out_of_place(network)[0].startswith("decoder/2 in place 3: stock code")
    assert out_of_place(open_network(tiny("llama"), wiring={"decoder": [0, 1, 1]})) == []
    assert out_of_place(open_network(tiny("llama"))) == []


class Grower(torch.nn.Module):
    """`x + tanh(W x)`, whose layers look alike."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        """One residual layer."""
        return x + self.linear(x).tanh()


def test_a_module_in_memory_in_another_order() -> None:
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(3, 6), *(Grower() for _ in range(4)))
    x = torch.randn(2, 3)
    name = layerwise.open(module, inputs={"input": x}).stack.name
    order = [0, 1, 2, 2, {"parallel": [3, 4]}, {"layer": 1, "copy": True}]
    made = layerwise.open(module, inputs={"input": x}, wiring={name: order})
    first, one, two, three, four = module
    h = two(two(one(first(x))))
    expected = one(h + (three(h) - h) + (four(h) - h))
    assert torch.allclose(made.module(x), expected, atol=1e-6)
    assert len(module) == 5
    made.module(x).sum().backward()
    expected.sum().backward()
    numbers = [n for n, _ in made.module.named_parameters()]
    assert len(numbers) == 2 * 6  # five layers and the copy
    copied: Any = made.module.get_submodule("6")
    assert copied.linear.weight.data_ptr() != one.linear.weight.data_ptr()
    assert copied.linear.weight.grad is not None


def test_a_stack_that_repeats_a_module_stays_beside_another_in_a_new_order() -> None:
    grower = Grower()
    first, second = torch.nn.Sequential(grower, grower, Grower()), [Grower() for _ in range(4)]
    module = torch.nn.Sequential()
    module.early, module.late = first, torch.nn.Sequential(*second)
    x = torch.randn(2, 6)
    names = [s.name for s in layerwise.open(module, inputs={"input": x}).stacks]
    made = layerwise.open(module, inputs={"input": x}, wiring={names[-1]: [3, 2, 1]})
    one, two, three = second[1:]
    assert torch.allclose(made.module(x), one(two(three(first(x)))), atol=1e-6)


@pytest.mark.parametrize(
    ("order", "match"),
    [
        ([0, {"layer": 1, "parts": ["mlp"]}], "save the model as a folder"),
        ([0, 9], "layer numbers from 0 to 2"),
        ([1, 2], "an order in which every layer can read"),
    ],
)
def test_orders_that_a_module_in_memory_cannot_have(order, match) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(3, 6), Grower(), Grower())
    with pytest.raises(LayerwiseError, match=match):
        layerwise.open(module, inputs={"input": torch.ones(1, 3)}, wiring={"encoder": order})


def test_a_transformers_model_in_memory_keeps_its_order() -> None:
    import transformers as t

    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = t.LlamaForCausalLM(t.LlamaConfig(vocab_size=64, intermediate_size=48, **small))
    with pytest.raises(LayerwiseError, match="save it with `save_pretrained`"):
        layerwise.open(model, inputs=BATCH, wiring={"decoder": [1, 0]})
