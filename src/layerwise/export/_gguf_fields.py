"""Which hyper-parameters of a GGUF file are which fields of a configuration."""

from collections.abc import Callable
from typing import Any, NamedTuple

#: key of GGUF -> fields of a configuration, of which the first that is there counts
WHOLE = {
    "context_length": ("max_position_embeddings",),
    "embedding_length": ("hidden_size",),
    "attention.head_count": ("num_attention_heads",),
    "attention.head_count_kv": ("num_key_value_heads",),
    "vocab_size": ("vocab_size",),
    "expert_count": ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"),
    "expert_used_count": (
        "num_experts_per_tok",
        "moe_topk",
        "moe_k",
        "top_k_experts",
        "moe_top_k",
    ),
    "expert_shared_count": ("n_shared_experts", "moe_num_shared_experts", "num_shared_experts"),
    "leading_dense_block_count": (
        "first_k_dense_replace",
        "moe_layer_start_index",
        "num_dense_layers",
    ),
    "interleave_moe_layer_step": ("moe_layer_interval", "interleave_moe_layer_step"),
    "expert_group_count": ("n_group",),
    "expert_group_used_count": ("topk_group",),
    "attention.q_lora_rank": ("q_lora_rank",),
    "attention.kv_lora_rank": ("kv_lora_rank",),
    "attention.shared_kv_layers": ("num_kv_shared_layers",),
    "attention.indexer.head_count": ("index_n_heads",),
    "attention.indexer.key_length": ("index_head_dim",),
    "attention.indexer.top_k": ("index_topk",),
    "attention.relative_buckets_count": ("relative_attention_num_buckets",),
    "decoder_start_token_id": ("decoder_start_token_id",),
    "embedding_length_per_layer_input": ("hidden_size_per_layer_input",),
    "shortconv.l_cache": ("conv_L_cache",),
    "ssm.conv_kernel": ("conv_kernel", "linear_conv_kernel_dim", "mamba_d_conv"),
    "ssm.state_size": ("state_size", "linear_key_head_dim", "mamba_d_state", "ssm_state_size"),
    "ssm.time_step_rank": (
        "num_heads",
        "mamba_num_heads",
        "mamba_n_heads",
        "linear_num_value_heads",
        "mamba_dt_rank",
        "time_step_rank",
    ),
    "ssm.group_count": ("n_groups", "linear_num_key_heads", "mamba_n_groups"),
}
#: the same, of one type only
OWN = {
    "kimi_linear": {
        "kda.head_dim": ("linear_head_dim",),
        "rope.dimension_count": ("qk_rope_head_dim",),
    },
}
REAL = {
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps", "norm_eps", "layer_norm_epsilon"),
    "attention.layer_norm_epsilon": (
        "layer_norm_epsilon",
        "layer_norm_eps",
        "norm_epsilon",
        "norm_eps",
        "layer_norm_rms_eps",
    ),
    "attn_logit_softcapping": ("attn_logit_softcapping",),
    "final_logit_softcapping": ("final_logit_softcapping",),
    "attention.scale": ("attention_multiplier",),
    "attention.value_scale": ("attention_value_scale",),
    "embedding_scale": ("embedding_multiplier",),
    "residual_scale": ("residual_multiplier",),
    "logit_scale": ("logits_scaling", "logit_scale"),
    "attention.clamp_kqv": ("clip_qkv",),
    "attention.max_alibi_bias": ("alibi_bias_max",),
    "expert_weights_scale": (
        "routed_scaling_factor",
        "route_scale",
        "router_scaling_factor",
        "moe_routed_scaling_factor",
    ),
}
TRUTH = {
    "use_parallel_residual": ("use_parallel_residual",),
    "expert_weights_norm": ("norm_topk_prob", "route_norm"),
}
#: how experts are weighed, by number
SCORES = {"softmax": 1, "sigmoid": 2}
CHOSEN = {"expert_gating_func": ("expert_selection_fn",)}
#: field of rotary parameters -> key of GGUF
YARN = {
    "beta_fast": "rope.scaling.yarn_beta_fast",
    "beta_slow": "rope.scaling.yarn_beta_slow",
    "mscale_all_dim": "rope.scaling.yarn_log_multiplier",
    "llama_4_scaling_beta": "attention.temperature_scale",
}
#: experts are weighed by a sigmoid of what the router says
_SIGMOID = {"expert_gating_func": SCORES["sigmoid"]}
#: there are no experts where llama.cpp looks for them
_DENSE = {"expert_feed_forward_length": 0, "expert_shared_count": 0}
_DENSE |= {"leading_dense_block_count": 2**16}
#: what is a constant of a model's code
CONSTANT: dict[str, dict[str, Any]] = {
    "afmoe": _SIGMOID,
    "aria_text": dict.fromkeys(("embedding_scale", "logit_scale", "residual_scale"), 1.0),
    "dbrx": {"attention.layer_norm_epsilon": 1e-5},
    "deepseek_v2": {"expert_gating_func": SCORES["softmax"]},
    "deepseek_v3": _SIGMOID,
    "deepseek_v32": _SIGMOID,
    "distilbert": {"attention.layer_norm_epsilon": 1e-12},
    "dots1": _SIGMOID,
    "exaone_moe": _SIGMOID,
    "falcon_mamba": {"ssm.dt_b_c_rms": True},
    "gemma4_unified_text": {"embedding_length_per_layer_input": 0},
    "glm4_moe": _SIGMOID,
    "glm4_moe_lite": _SIGMOID,
    "glm4v_moe_text": _SIGMOID,
    "glm_moe_dsa": _SIGMOID,
    "hy_v3": _SIGMOID | {"expert_weights_norm": True},
    "kimi_linear": _SIGMOID,
    "laguna": _SIGMOID | {"expert_weights_norm": True},
    "lfm2_moe": _SIGMOID,
    "minimax_m2": _SIGMOID,
    "mistral4": {"expert_gating_func": SCORES["softmax"]},
    "mpt": {"attention.layer_norm_epsilon": 1e-5},
    "olmo": {"attention.layer_norm_epsilon": 1e-5},
    "qwen3_5_moe_text": {"rope.dimension_sections": [11, 11, 10, 0]},
    "qwen3_5_text": {"rope.dimension_sections": [11, 11, 10, 0]},
    "solar_open": _SIGMOID,
    "youtu": _DENSE,
}


class Limit(NamedTuple):
    """What a field must say, because llama.cpp computes nothing else."""

    field: str
    allowed: str
    holds: Callable[[Any], bool]


def _is(field: str, *values: Any) -> Limit:
    """A field that has one of some values."""
    return Limit(field, " or ".join(map(str, values)), lambda config: vars(config)[field] in values)


#: layers whose gates are thinned out, by how much, and layers that have keys of their own
_THINNED, _THIN, _KEYED = 10, 0.95, 20
_T5 = (
    _is("relative_attention_max_distance", 128),
    _is("feed_forward_proj", "relu", "gated-gelu"),
    Limit(
        "num_decoder_layers",
        "at most as many as num_layers",
        lambda config: config.num_decoder_layers <= config.num_layers,
    ),
)
LIMITS: dict[str, tuple[Limit, ...]] = {
    **dict.fromkeys(("mt5", "t5", "umt5"), _T5),
    "cohere_compass_text": (
        Limit(
            "rope_parameters",
            "nothing for full_attention",
            lambda config: config.rope_parameters.get("full_attention") is None,
        ),
    ),
    "dbrx": (
        Limit(
            "attn_config",
            "clip_qkv that is a number",
            lambda config: config.attn_config.clip_qkv is not None,
        ),
        Limit(
            "ffn_config",
            "moe_normalize_expert_weights of 1 and ffn_act_fn silu",
            lambda config: (
                config.ffn_config.moe_normalize_expert_weights == 1
                and config.ffn_config.ffn_act_fn["name"] == "silu"
            ),
        ),
    ),
    "falcon_h1": (
        _is("hidden_act", "silu"),
        _is("time_step_limit", (0.0, float("inf"))),
        Limit(
            "mamba_norm_before_gate",
            "False where there is a norm",
            lambda config: not config.mamba_norm_before_gate or not config.mamba_rms_norm,
        ),
    ),
    "gemma3n_text": (
        _is("hidden_activation", "gelu_pytorch_tanh"),
        _is("altup_num_inputs", 4),
        _is("altup_active_idx", 0),
        _is("altup_correct_scale", True),
        _is("final_logit_softcapping", 30.0),
        _is("hidden_size_per_layer_input", 256),
        _is("laurel_rank", 64),
        Limit(
            "activation_sparsity_pattern",
            f"{_THIN} in the first {_THINNED} layers and 0 in all others",
            lambda config: all(
                share == (_THIN if i < _THINNED else 0)
                for i, share in enumerate(config.activation_sparsity_pattern)
            ),
        ),
        Limit(
            "num_kv_shared_layers",
            f"all layers but the first {_KEYED}",
            lambda config: config.num_kv_shared_layers == max(0, config.num_hidden_layers - _KEYED),
        ),
    ),
}
