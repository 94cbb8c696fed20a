"""Tiny random models of every architecture, by one rule over the names of configuration fields."""

import inspect
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.models.auto import modeling_auto

VOCABULARY = 128
LAYERS = 4

TASKS = {
    "causal": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "masked": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "seq2seq": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "image": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
}

#: field name -> small value; the first pattern that matches the whole name decides
SMALL: tuple[tuple[str, Any], ...] = (
    (r"(mamba_|ssm_)?chunk_size", 8),
    (r"mamba_(n|num)_heads|n_mamba_heads", 4),
    (r"mamba_(d_head|head_dim|headdim)", 32),
    (r"mamba_d_ssm", 128),
    (r"mamba_d_state|ssm_state_size|state_size|mamba_state_dim", 8),
    (r"(mamba_)?n_groups|mamba_ngroups", 1),
    (r".*vocab_size.*", VOCABULARY),
    (
        r"(pad|bos|eos|sep|cls|mask|unk|decoder_start|image|video|audio|boi|eoi|.*_token)(_.*)?_(id|index)",
        0,
    ),
    (r"first_k_dense_replace|num_dense_layers|n_dense_layers|moe_num_dense_layers", 1),
    (r"num_nextn_predict_layers|num_mtp_layers|num_kv_shared_layers", 0),
    (r"(num_|n_)?(hidden_|encoder_|decoder_|block_)?(layers?|layers_num|num_layers)|depth", LAYERS),
    (
        r"num_(encoder|decoder)_(hidden_)?layers|(encoder|decoder)_layers|n_(encoder|decoder)_layers",
        LAYERS,
    ),
    (
        r"(num_|n_)?((encoder|decoder|attention|attn|self_attention|q|query)_)*heads?(_num)?|num_heads|n_head",
        4,
    ),
    (r"linear_num_key_heads", 2),
    (r"linear_num_value_heads", 4),
    (
        r"(num_|n_)(key_value|kv|key_value_attention|multi_query)_(heads?|groups)|num_kv_heads|num_key_value_heads|n_kv_head",
        2,
    ),
    (r".*(experts_per_tok|top_?k|topk|experts_per_token|num_selected_experts|router_topk)", 2),
    (r"(n|num|topk)_group", 1),
    (r"topk_group", 1),
    (r".*(num|n).*experts|moe_num_experts|num_experts|zero_expert_num", 4),
    (r"n_shared_experts|num_shared_experts|moe_num_shared_experts", 1),
    (
        r"(max_|n_)?(position_embeddings|positions|seq_len|seq_length|ctx|sequence_length|max_source_positions|max_target_positions)",
        128,
    ),
    (r"max_.*(position|length|positions|embeddings|len)s?", 128),
    (r"qk_nope_head_dim|qk_rope_head_dim|v_head_dim|kv_lora_rank|q_lora_rank", 16),
    (r"qk_head_dim", 32),
    (r"rotary_dim", 8),
    (r"(.*_)?(head_dim|head_size|kv_channels|d_kv|attention_head_size)", 16),
    (
        r"(.*_)?(intermediate_size|ffn_dim|d_ff|dim_ff|dff|ffn_hidden_size|expert_ffn_hidden_size|n_inner|inner_dim|d_inner|mlp_dim|mlp_hidden_size|ffn_size|intermediate_dim)(_.*)?",
        96,
    ),
    (
        r"(hidden_size|d_model|n_embd|embed_dim|dim|model_dim|embedding_size|word_embed_proj_dim|emb_dim|n_embed|hidden_dim|d_embed|lru_width|input_dim|embedding_dim|entity_emb_size|backbone_hidden_size|encoder_hidden_size|decoder_hidden_size|per_layer_input_dim|hidden_size_per_layer_input|width)",
        64,
    ),
    (r"image_size|img_size", 64),
    (r"patch_size", 8),
    (r"num_labels", 3),
    (
        r"sliding_window|attention_window|window_size|local_window|chunk_size|attention_chunk_size",
        16,
    ),
)

#: fields that list the widths of stages
WIDTHS = r"hidden_sizes|embed_dims"

#: fields that may be None by default, where the model then fails
NEEDED = (
    r"head_dim|num_key_value_heads|num_attention_heads|n_routed_experts|vocab_size"
    r"|vocab_size_per_layer_input"
)

#: The only data about single architectures: model type -> fields whose defaults or rule fail.
SPECIAL: dict[str, dict[str, Any]] = {
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "zamba2": {"layer_types": ["mamba", "hybrid", "mamba", "hybrid"]},
    "zaya": {"num_experts_per_tok": 1},
    "esmc": {"num_key_value_heads": 4},
    "reformer": {"axial_pos_embds_dim": (32, 32), "axial_pos_shape": (8, 16)},
    "dots3_note_text": {
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 16,
        "swa_kv_lora_rank": 16,
        "swa_head_dim": 32,
        "swa_qk_nope_head_dim": 16,
        "swa_v_head_dim": 16,
    },
    "bit": {"num_groups": 8},
    "focalnet": {"embed_dim": 16},
    "phi4_multimodal_audio": {"nemo_conv_channels": 64},
    "gemma3n_text": {"intermediate_size": [96] * LAYERS},
    "mamba2": {"head_dim": 32, "n_groups": 1},
    "ernie4_5_moe": {"moe_k": 2},
    "granitemoehybrid": {"layer_types": ["mamba", "attention", "mamba", "attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "xmod": {"default_language": "en_XX"},
    "esm": {"pad_token_id": 1, "mask_token_id": 2},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {
        "first_k_dense_replace": 1,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
    },
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0}},
    "cohere_compass_text": {
        "rope_parameters": {
            "full_attention": None,
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        }
    },
    "efficientnet": {"width_coefficient": 0.25, "depth_coefficient": 1.0, "hidden_dim": 320},
    "qwen4_exp_text": {
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
        "indexer_head_dim": 16,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
    },
    "musicgen_decoder": {"num_codebooks": 1},
    "musicgen_melody_decoder": {"num_codebooks": 1},
    "perceiver": {"num_self_attends_per_block": 4, "num_latents": 32, "d_latents": 64},
    "vibevoice_acoustic_tokenizer_encoder": {"downsampling_ratios": [2, 2], "depths": [2, 2, 2]},
    "textnet": {"image_size": [64, 64], "hidden_sizes": [64, 64, 128, 256, 512]},
    "hiera": {"image_size": [64, 64], "embed_dim": 16},
    "hgnet_v2": {"hidden_sizes": [256, 512, 1024, 2048]},
    "regnet": {"depths": [2, 3, 4, 2], "hidden_sizes": [32, 48, 64, 96], "groups_width": 16},
    "cvt": {"depth": [1, 2, 4], "embed_dim": [16, 32, 64], "num_heads": [1, 2, 4]},
    "levit": {
        "key_dim": (16, 16, 16),
        "hidden_sizes": (64, 96, 128),
        "num_attention_heads": (2, 3, 4),
        "depths": (2, 2, 2),
    },
    "swin": {
        "embed_dim": 24,
        "depths": [2, 4, 2],
        "num_heads": [2, 4, 8],
        "window_size": 4,
        "patch_size": 4,
    },
    "swinv2": {
        "embed_dim": 24,
        "depths": [2, 4, 2],
        "num_heads": [2, 4, 8],
        "window_size": 4,
        "patch_size": 4,
    },
    "donut-swin": {
        "embed_dim": 24,
        "depths": [2, 4, 2],
        "num_heads": [2, 4, 8],
        "window_size": 4,
        "patch_size": 4,
    },
}


class Entry(NamedTuple):
    """One line of an Auto mapping."""

    task: str
    model_type: str
    class_name: str

    @property
    def key(self) -> str:
        return f"{self.task}/{self.model_type}"


def entries() -> Iterator[Entry]:
    """Every entry of the four Auto mappings."""
    for task, name in TASKS.items():
        for model_type, found in getattr(modeling_auto, name).items():
            yield Entry(task, model_type, found if isinstance(found, str) else found[0])


def small_config(
    kind: type[PretrainedConfig], asked: dict[str, Any] | None = None
) -> PretrainedConfig:
    """The configuration of a kind with every size made small, nested configurations as well."""
    fields = inspect.signature(kind.__init__).parameters
    given: dict[str, Any] = {}
    default = vars(kind())
    fields_of_mla = "kv_lora_rank" in fields
    for name, field in fields.items():
        if field.kind is not field.KEYWORD_ONLY:
            continue
        value = default.get(name, field.default)
        if isinstance(value, PretrainedConfig):
            given[name] = small_config(type(value))
            continue
        if isinstance(value, list | tuple) and re.fullmatch(WIDTHS, name):
            given[name] = [width // 4 for width in value]
            continue
        small = next((small for pattern, small in SMALL if re.fullmatch(pattern, name)), None)
        if small is None or isinstance(value, bool):
            continue
        if (isinstance(value, int) and not (small and value == 0)) or (
            value is None and re.fullmatch(NEEDED, name)
        ):
            given[name] = small
    if fields_of_mla:
        given["num_key_value_heads"] = given["num_attention_heads"]
    special = SPECIAL.get(kind.model_type, {})
    return kind(**{**given, **special, **(asked or {})})


def build(entry: Entry) -> nn.Module:
    """A tiny random model in float32, evaluation mode, with weights that matter."""
    kind = getattr(transformers, entry.class_name)
    asked = (
        {"is_decoder": True}
        if entry.task == "causal" and "is_decoder" in vars(kind.config_class())
        else {}
    )
    config = small_config(kind.config_class, asked)
    config.architectures = [entry.class_name]
    if config.is_encoder_decoder and vars(config).get("decoder_start_token_id") is None:
        config.decoder_start_token_id = 0
    torch.manual_seed(0)
    model = kind(config).float().eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1 and p.numel():
                p.copy_(torch.randn_like(p) * (0.5 / p[0].numel() ** 0.5))
    return model


def example(entry: Entry, model: nn.Module) -> dict[str, Tensor]:
    """A forward's inputs."""
    if entry.task == "image" and model.main_input_name == "pixel_values":
        size = model.config.image_size if "image_size" in vars(model.config) else 64
        size = size if isinstance(size, int) else size[0]
        channels = vars(model.config).get("num_channels", 3)
        return {
            "pixel_values": torch.randn(
                2, channels, size, size, generator=torch.Generator().manual_seed(0)
            )
        }
    ids = torch.arange(3, 3 + 2 * 9).reshape(2, 9) % VOCABULARY
    if entry.task == "seq2seq":
        return {"input_ids": ids, "decoder_input_ids": ids[:, :7] + 20}
    return {"input_ids": ids}
