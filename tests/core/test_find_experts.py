"""Experts are found by trying, and a network without some is the stock one of fewer."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, DeepseekV3Config

from layerwise.core.errors import LayerwiseError
from layerwise.core.find_experts import find_experts, least_experts, without_experts
from layerwise.core.network import Network
from layerwise.core.open import open_network

IDS = torch.arange(24)[None]


@pytest.fixture(scope="module")
def grouped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight experts in two groups, of which a token runs two of one; the first layer is dense."""
    sizes = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "head_dim": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "num_hidden_layers": 3}
    ranks = dict.fromkeys(("q_lora_rank", "kv_lora_rank", "v_head_dim"), 16)
    ranks |= dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim"), 16)
    experts = {"n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1}
    experts |= {"first_k_dense_replace": 1, "moe_intermediate_size": 48, "n_shared_experts": 1}
    folder = tmp_path_factory.mktemp("grouped")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = DeepseekV3Config(**sizes | heads | ranks | experts, initializer_range=0.1)
        model = AutoModelForCausalLM.from_config(config)
        for name, buffer in model.named_buffers():
            if name.endswith("correction_bias"):
                buffer.normal_(std=0.05)
        for name, parameter in model.named_parameters():
            if name.endswith("gate.weight"):
                torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    return folder


def test_the_experts_of_an_architecture(tiny: Callable[..., Path], grouped: Path) -> None:
    for kind, field in (("mixtral", "num_local_experts"), ("dbrx", "ffn_config.moe_num_experts")):
        network = open_network(tiny(kind))
        (width,) = find_experts(network)
        assert (width.fields, width.units, width.spans) == ({field: 4}, 4, 1)
        assert len(width.places[0].cuts) == {"mixtral": 3, "dbrx": 4}[kind]
        assert least_experts(network, width) == 2
    network = open_network(grouped)
    (width,) = find_experts(network)
    assert (width.name, width.units, width.spans) == ("n_routed_experts", 8, 2)
    assert "mlp.gate.e_score_correction_bias" in width.places[0].cuts
    assert least_experts(network, width) == 4
    assert find_experts(open_network(tiny("llama"))) == []


def logits(network: Network) -> torch.Tensor:
    with torch.no_grad():
        return network.load().module(input_ids=IDS).logits


def test_it_computes_what_the_stock_model_of_fewer_does(grouped: Path) -> None:
    kept = {"decoder/1": [0, 2, 3, 4, 5, 7], "decoder/2": [1, 2, 3, 5, 6, 7]}
    stock = AutoModelForCausalLM.from_pretrained(grouped)
    state = dict(stock.state_dict())
    for name in state:
        if ".mlp.experts." in name or ".mlp.gate." in name:
            layer = name.split(".")[2]
            state[name] = state[name][kept[f"decoder/{layer}"]]
    stock.config.n_routed_experts = 6
    fewer = type(stock)(stock.config).eval()
    fewer.load_state_dict(state)
    with torch.no_grad():
        wanted, whole = fewer(IDS).logits, stock.eval()(IDS).logits
    found = logits(without_experts(open_network(grouped), {"n_routed_experts": kept}))
    assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    assert (found - whole).abs().max() > 1e-3


def test_all_of_them_change_nothing(tiny: Callable[..., Path]) -> None:
    network = open_network(tiny("dbrx"))
    every = {"ffn_config.moe_num_experts": {f"decoder/{i}": [0, 1, 2, 3] for i in range(3)}}
    assert torch.equal(logits(without_experts(network, every)), logits(open_network(tiny("dbrx"))))


def test_layers_in_another_order_keep_their_own(tiny: Callable[..., Path]) -> None:
    kept = {"decoder/0": [0, 1], "decoder/1": [1, 2], "decoder/2": [2, 3]}
    network = open_network(tiny("mixtral"), wiring={"decoder": [0, 2]})
    short = {key: numbers for key, numbers in kept.items() if key != "decoder/1"}
    found = without_experts(network, {"num_local_experts": short})
    stored = open_network(tiny("mixtral")).layers()[2]
    whole = open_network(tiny("mixtral")).fetch(stored)["mlp.gate.weight"]
    assert torch.equal(found.fetch(found.layers()[1])["mlp.gate.weight"], whole[2:])


@pytest.mark.parametrize(
    ("units", "said"),
    [
        ({"num_experts": {}}, "allowed is num_local_experts"),
        ({"num_local_experts": {"decoder/0": [0, 1], "decoder/1": [0, 1]}}, "at decoder/2.*none"),
        ({"num_local_experts": {f"decoder/{i}": [0, 1, 2][i:] for i in range(3)}}, "as many"),
        ({"num_local_experts": {f"decoder/{i}": [0, 4] for i in range(3)}}, "from 0 to 3"),
        ({"num_local_experts": {f"decoder/{i}": [1, 1] for i in range(3)}}, "each once"),
        ({"num_local_experts": {f"decoder/{i}": [1] for i in range(3)}}, "as a token runs"),
        ({"num_local_experts": {f"decoder/{i}": [1, 2] for i in range(4)}}, "of no other"),
    ],
)
def test_experts_that_cannot_be(units: Any, said: str, tiny: Callable[..., Path]) -> None:
    with pytest.raises(LayerwiseError, match=said):
        without_experts(open_network(tiny("mixtral")), units)


def test_groups_lose_as_many(grouped: Path) -> None:
    kept = {f"decoder/{i}": [0, 1, 2, 3, 4, 5] for i in (1, 2)}
    with pytest.raises(LayerwiseError, match="as many of each 4"):
        without_experts(open_network(grouped), {"n_routed_experts": kept})
