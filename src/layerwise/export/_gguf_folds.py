"""What a configuration multiplies with and a GGUF file has no place for: its weights hold it."""

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from layerwise.core.fold import Fold, joined
from layerwise.core.network import Network
from layerwise.core.open import refolded
from layerwise.export._gguf_models import text_config, text_of


class Factor(NamedTuple):
    """What multiplies the rows of all tensors whose names hold a part: a number or one for each."""

    part: str
    value: float | Tensor


_ONE: dict[str, Any] = {
    **{f"{x}_multiplier": 1.0 for x in ("embedding", "lm_head", "key", "attention_in")},
    **{f"{x}_multiplier": 1.0 for x in ("attention_out", "ssm_in", "ssm_out")},
    "mlp_multipliers": [1.0] * 2,
    "ssm_multipliers": [1.0] * 5,
}


def _falcon_h1(config: Any, head: bool) -> Iterator[Factor]:
    """Those of a network whose layers mix by attention and by a recurrence side by side.

    The head is multiplied by way of the norm in front of it, so that it may be the embedding.
    """
    gate, down = config.mlp_multipliers
    inner, states = (
        config.mamba_n_heads * config.mamba_d_head,
        config.mamba_n_groups * config.mamba_d_state,
    )
    rows = torch.tensor([inner, inner, states, states, config.mamba_n_heads])
    parts = torch.tensor(config.ssm_multipliers).repeat_interleave(rows)
    tied = config.embedding_multiplier if config.tie_word_embeddings else 1.0
    yield Factor("embed_tokens.weight", config.embedding_multiplier)
    if head:
        yield Factor("final_layernorm.weight", config.lm_head_multiplier / tied)
    for matrix in ("q_proj", "k_proj", "v_proj"):
        yield Factor(f"self_attn.{matrix}.weight", config.attention_in_multiplier)
    yield Factor("self_attn.k_proj.", config.key_multiplier)
    yield Factor("self_attn.o_proj.", config.attention_out_multiplier)
    yield Factor("mamba.in_proj.weight", config.ssm_in_multiplier)
    yield Factor("mamba.in_proj.", parts)
    yield Factor("mamba.out_proj.", config.ssm_out_multiplier)
    yield Factor("feed_forward.gate_proj.", gate)
    yield Factor("feed_forward.down_proj.", down)


#: type of a configuration -> what it does to weights, with or without a head, and the fields that
#: then do nothing more
FACTORS: dict[str, tuple[Callable[[Any, bool], Iterator[Factor]], Mapping[str, Any]]] = {
    "falcon_h1": (_falcon_h1, _ONE),
}


def folded(network: Network) -> Network:
    """The same network whose weights hold what of its configuration GGUF has no place for."""
    config = text_config(network)
    if config.model_type not in FACTORS:
        return network
    multiplied, neutral = FACTORS[config.model_type]
    names = network.stored.model.state_dict()
    folds = joined(
        *(
            {n: (Fold(0, torch.as_tensor(f.value).reshape(-1)),) for n in names if f.part in n}
            for f in multiplied(config, network.task != "embed")
        )
    )
    without = copy.deepcopy(network.model.config)
    for field, value in neutral.items():
        setattr(text_of(without), field, value)
    return refolded(network, folds, config=without)
