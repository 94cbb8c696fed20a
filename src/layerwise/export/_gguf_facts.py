"""The hyper-parameters of a GGUF file, read from a model's configuration."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from layerwise.core.errors import LayerwiseError
from layerwise.core.network import Network
from layerwise.export._gguf_embedding import embedding_facts
from layerwise.export._gguf_models import Known, Names, known, text_config

#: key of GGUF -> fields of a configuration, of which the first that is there counts
_WHOLE = {
    "context_length": ("max_position_embeddings",),
    "embedding_length": ("hidden_size",),
    "attention.head_count": ("num_attention_heads",),
    "attention.head_count_kv": ("num_key_value_heads",),
    "vocab_size": ("vocab_size",),
    "expert_count": ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"),
    "expert_used_count": ("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts"),
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
_REAL = {
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
    "embedding_scale": ("embedding_multiplier",),
    "residual_scale": ("residual_multiplier",),
    "logit_scale": ("logits_scaling", "logit_scale"),
    "attention.clamp_kqv": ("clip_qkv",),
    "attention.max_alibi_bias": ("alibi_bias_max",),
    "expert_weights_scale": ("routed_scaling_factor", "route_scale"),
}
_TRUTH = {
    "use_parallel_residual": ("use_parallel_residual",),
    "expert_weights_norm": ("norm_topk_prob", "route_norm"),
}
#: of rotary parameters
_YARN = {
    "beta_fast": "rope.scaling.yarn_beta_fast",
    "beta_slow": "rope.scaling.yarn_beta_slow",
    "mscale_all_dim": "rope.scaling.yarn_log_multiplier",
    "llama_4_scaling_beta": "attention.temperature_scale",
}
#: experts are weighed by a sigmoid of what the router says
_SIGMOID = {"expert_gating_func": 2}
#: what is a constant of a model's code
_CONSTANT = {
    "afmoe": _SIGMOID,
    "deepseek_v2": {"expert_gating_func": 1},
    "deepseek_v3": _SIGMOID,
    "distilbert": {"attention.layer_norm_epsilon": 1e-12},
    "dots1": _SIGMOID,
    "exaone_moe": _SIGMOID,
    "falcon_mamba": {"ssm.dt_b_c_rms": True},
    "glm4_moe": _SIGMOID,
    "glm4_moe_lite": _SIGMOID,
    "lfm2_moe": _SIGMOID,
    "minimax_m2": _SIGMOID,
    "mpt": {"attention.layer_norm_epsilon": 1e-5},
    "olmo": {"attention.layer_norm_epsilon": 1e-5},
    "qwen3_5_moe_text": {"rope.dimension_sections": [11, 11, 10, 0]},
    "qwen3_5_text": {"rope.dimension_sections": [11, 11, 10, 0]},
    "solar_open": _SIGMOID,
}
#: positions where a model does not limit them
UNBOUND = 2048
#: llama.cpp looks for a token where the model is called so, and stops if it is missing
NAMED = {"phi": "<|endoftext|>"}


def head_size(config: Any) -> int:
    """Width of an attention head."""
    own = vars(config).get("head_dim")
    return own or config.hidden_size // config.num_attention_heads


def heads_of(config: Any, name: str) -> int:
    """Heads of a tensor of queries or keys, by its GGUF name."""
    grouped = vars(config).get("num_key_value_heads") or config.num_attention_heads
    return grouped if ".attn_k." in name else config.num_attention_heads


def hyper_parameters(network: Network) -> dict[str, Any]:
    """Keys of GGUF, without the architecture's prefix, and their values.

    Raises:
        LayerwiseError: the configuration says something that llama.cpp cannot do.
    """
    config, entry = text_config(network), known(network)
    found: dict[str, Any] = {"block_count": len(network.layers())}
    said = config.to_dict() | (config.to_dict().get("attn_config") or {})
    for kinds, to in ((_WHOLE, int), (_REAL, float), (_TRUTH, bool)):
        for key, fields in kinds.items():
            values = [said.get(f, said.get(config.attribute_map.get(f, f))) for f in fields]
            value = next((v for v in values if v is not None), None)
            if value is not None:
                found[key] = to(value)
    found.setdefault("context_length", UNBOUND)
    heads = found.setdefault("attention.head_count", 0)
    found.setdefault("attention.head_count_kv", heads)
    size = head_size(config) if heads else 0
    if heads:
        found |= {"attention.key_length": size, "attention.value_length": size}
    if "qk_rope_head_dim" in said:  # keys are partly the same for all heads
        whole = said["qk_nope_head_dim"] + said["qk_rope_head_dim"]
        found |= {"attention.key_length": whole, "attention.value_length": said["v_head_dim"]}
        size = said["qk_rope_head_dim"]
    found |= _CONSTANT.get(config.model_type, {})
    if "position_embedding_type" in said:
        found["rope.scaling.finetuned"] = said["position_embedding_type"] == "rope"
    attends = [any("k_proj." in name for name in layer.shapes) for layer in network.layers()]
    alike = all(attends) or "linear_num_key_heads" in said
    if any(attends) and not alike:  # convolutions and recurrences have no key heads
        keys = found["attention.head_count_kv"]
        found["attention.head_count_kv"] = [keys * one for one in attends]
    heads_of_values = found.get("ssm.time_step_rank")
    if entry.even and heads_of_values != found["ssm.group_count"]:
        raise LayerwiseError(
            f"target gguf, architecture {entry.name}",
            allowed=f"as many heads of values as of keys, {found['ssm.group_count']}",
            found=heads_of_values,
            fix="use --target hf",
        )
    found |= dict(_rotary(config, size)) | dict(_windows(config, entry))
    found |= embedding_facts(network) if network.task == "embed" else {}
    return found | (_by_kind(network) if entry.listed else {})


def _by_kind(network: Network) -> dict[str, Any]:
    """Heads of layers with a window and of the others, whose size is not the same."""
    config, names, keys = text_config(network), Names(network), []
    sizes = {"full_attention": head_size(config), "sliding_attention": head_size(config)}
    for layer, kind in zip(network.layers(), config.layer_types, strict=True):
        held = {
            names(f"{layer.path}.{n}").partition(".attn_")[2]: s for n, s in layer.shapes.items()
        }
        sizes[kind] = held["q_norm.weight"][0]
        rows = held.get("k.weight", (0,))[0] or config.num_key_value_heads * sizes[kind]
        keys.append(rows // sizes[kind])
    found: dict[str, Any] = {"attention.head_count_kv": keys}
    for kind, end in (("full_attention", ""), ("sliding_attention", "_swa")):
        each = ("attention.key_length", "attention.value_length", "rope.dimension_count")
        found |= {f"{name}{end}": sizes[kind] for name in each}
    return found


def rope_of(config: Any) -> Mapping[str, Any]:
    """The rotary parameters of layers that attend to all positions."""
    found = vars(config).get("rope_parameters") or {}
    return found.get("full_attention", found)


def _rotary(config: Any, size: int) -> Iterator[tuple[str, Any]]:
    rope = rope_of(config)
    if not rope:
        return
    kind = rope.get("rope_type", "default")
    if kind not in ("default", "linear", "yarn", "llama3", "longrope", "proportional"):
        raise LayerwiseError(
            "target gguf, rope_type",
            allowed="default, linear, yarn, llama3, longrope or proportional",
            found=kind,
            fix="use --target hf",
        )
    yield "rope.freq_base", float(rope["rope_theta"])
    share = rope.get("partial_rotary_factor", vars(config).get("partial_rotary_factor")) or 1.0
    yield "rope.dimension_count", int(size * share)
    whole = vars(config).get("rope_parameters", {})
    if "sliding_attention" in whole:
        yield "rope.freq_base_swa", float(whole["sliding_attention"]["rope_theta"])
    old = rope.get("original_max_position_embeddings")
    old = old or vars(config).get("original_max_position_embeddings")
    if kind in ("linear", "yarn"):
        yield "rope.scaling.type", kind
        yield "rope.scaling.factor", float(rope["factor"])
    for field, key in _YARN.items():
        if kind == "yarn" and rope.get(field) is not None:
            yield key, float(rope[field])
    if kind in ("yarn", "longrope") and old:
        yield "rope.scaling.original_context_length", int(old)
    if kind == "longrope":
        grown = config.max_position_embeddings / old
        yield "rope.scaling.attn_factor", math.sqrt(1 + math.log(grown) / math.log(old))


def _windows(config: Any, entry: Known) -> Iterator[tuple[str, Any]]:
    """The window of layers that do not attend to all positions, in the rhythm llama.cpp knows."""
    window = vars(config).get("sliding_window") or vars(config).get("local_attention")
    kinds = vars(config).get("layer_types") or []
    narrow = [kind == "sliding_attention" for kind in kinds]
    if entry.name == "phi3":
        yield "attention.sliding_window", 0 if window is None else int(window)
    if entry.listed:
        yield "attention.sliding_window", int(window or config.max_position_embeddings)
        yield "attention.sliding_window_pattern", narrow
        return
    wide = window and window >= config.max_position_embeddings and not entry.first
    if not window or not any(narrow) or wide:
        if entry.period and not entry.first:
            yield "attention.sliding_window", int(config.max_position_embeddings)
        return
    fits = [p for p in range(2, len(narrow) + 2) if narrow == _rhythm(p, len(narrow), entry.first)]
    fits = fits if entry.depth in (0, len(narrow)) else []
    chosen = entry.period if entry.period in fits else next(iter(fits), 0)
    if not entry.period or not chosen:
        raise LayerwiseError(
            "target gguf, layer_types",
            allowed=f"windows in a rhythm that {entry.name} has in llama.cpp"
            + (f", at {entry.depth} layers" if entry.depth else ""),
            found=" ".join("window" if n else "all" for n in narrow[:12]),
            fix="keep whole periods of layers, or use --target hf",
        )
    yield "attention.sliding_window", int(window)
    if chosen != entry.period:
        yield "attention.sliding_window_pattern", chosen


def _rhythm(period: int, count: int, first: bool) -> list[bool]:
    return [i % period != (0 if first else period - 1) for i in range(count)]


def rope_factors(network: Network) -> dict[str, Tensor]:
    """Tensors that llama.cpp divides rotary frequencies by, where they are scaled one by one."""
    config = text_config(network)
    rope = rope_of(config)
    if rope.get("rope_type") == "longrope":
        return {
            f"rope_factors_{k}.weight": torch.tensor(rope[f"{k}_factor"]) for k in ("long", "short")
        }
    if rope.get("rope_type") == "proportional":  # the others are not turned
        size = _by_kind(network)["attention.key_length"]
        turned = int(size * rope.get("partial_rotary_factor", 1.0) / 2)
        return {"rope_freqs.weight": torch.tensor([1.0] * turned + [1e30] * (size // 2 - turned))}
    if rope.get("rope_type") != "llama3":
        return {}
    size = head_size(config)
    steps = torch.arange(0, size, 2, dtype=torch.float32) / size
    length = 2 * math.pi * rope["rope_theta"] ** steps
    old, low, high = (
        rope[k] for k in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor")
    )
    smooth = ((old / length - low) / (high - low)).clamp(0, 1)
    return {"rope_freqs.weight": 1 / ((1 - smooth) / rope["factor"] + smooth)}
