"""GGUF files in llama.cpp: every architecture of the table, depth, types, tokens, and back."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from torch import Tensor
from typer.testing import CliRunner
from written import SMALL, given_back, made_once, plan_of

from layerwise.cli import app
from layerwise.core.checkpoint import Checkpoint
from layerwise.core.errors import LayerwiseError
from layerwise.core.folder import find_folder
from layerwise.core.llama import Llama
from layerwise.core.open import open_network
from layerwise.core.plan import Edit, Plan, Step, read_plan
from layerwise.core.task import token_rows
from layerwise.export import _gguf_folds, _gguf_models
from layerwise.export._gguf_file import FILE, GgufFile
from layerwise.jobs import engine
from layerwise.jobs.apply import apply_plan
from layerwise.jobs.mixes import MIXES, mix_plan, written_bytes
from layerwise.jobs.plan import Request, make_plan
from layerwise.jobs.session import Budget
from layerwise.jobs.verify import Settings, verify

QUICK = Settings(documents=3, length=64, speed=False, memory=False)
COMMON: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "initializer_range": 0.1,
    "intermediate_size": 96,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
FEW = COMMON | {"num_hidden_layers": 2}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0}
LLAMA3 |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 16}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}
YARN |= {"original_max_position_embeddings": 128}
MSCALE = {"mscale": 1.0, "mscale_all_dim": 1.0, "original_max_position_embeddings": 8}
GRANITE = {"embedding_multiplier": 2.0, "logits_scaling": 1.5, "residual_multiplier": 0.7}
WINDOWS = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
ROUTED |= {"n_shared_experts": 1, "first_k_dense_replace": 1, "num_key_value_heads": 4}
HEAD = {"head_dim": 16}
SSM = {"vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 8}
DBRX = {"hidden_size": 64, "ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2}
HYBRID = ["conv", "full_attention"]
HYBRIDS: dict[str, Any] = {"layer_types": ["mamba", "attention"], "shared_intermediate_size": 64}
HYBRIDS |= {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1}
FALCON_H1: dict[str, Any] = {"mamba_d_ssm": 128, "mamba_n_heads": 8, "mamba_n_groups": 2}
FALCON_H1 |= {"mamba_d_state": 16, "mlp_multipliers": [0.6, 1.4], "key_multiplier": 2.5}
FALCON_H1 |= {"ssm_multipliers": [0.7, 1.5, 0.4, 1.8, 1.2], "ssm_in_multiplier": 1.3}
FALCON_H1 |= {"ssm_out_multiplier": 0.8, "attention_in_multiplier": 1.6, "head_dim": 16}
FALCON_H1 |= {"attention_out_multiplier": 0.9, "lm_head_multiplier": 0.5}
FALCON_H1 |= {"embedding_multiplier": 3.0}
NEMOTRON: dict[str, Any] = {k: v for k, v in FEW.items() if k != "num_hidden_layers"}
NEMOTRON |= {"mamba_num_heads": 8, "mamba_head_dim": 16, "ssm_state_size": 16, "n_groups": 2}
NEMOTRON |= {"head_dim": 16}
LINEAR = {f"linear_{x}_head_dim": 16 for x in ("key", "value")}
LINEAR |= {"linear_num_key_heads": 4, "linear_num_value_heads": 4}
MANY = {"linear_num_key_heads": 2, "linear_num_value_heads": 8, "linear_value_head_dim": 32}
MANY |= {"linear_key_head_dim": 32}
RANKS = {"qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16}
RANKS |= {"q_lora_rank": 32, "kv_lora_rank": 32}
INDEX = {"index_topk": 64, "index_head_dim": 64, "index_n_heads": 4}
GEMMA3N: dict[str, Any] = COMMON | {"num_hidden_layers": 25, "num_kv_shared_layers": 5}
GEMMA3N |= {"intermediate_size": 2048, "laurel_rank": 64, "hidden_size_per_layer_input": 256}
GEMMA3N |= {"head_dim": 16, "sliding_window": 8, "vocab_size_per_layer_input": 64}
GEMMA3N |= {"pad_token_id": None, "initializer_range": 0.05}
GEMMA4 = {"head_dim": 16, "sliding_window": 8, "vocab_size_per_layer_input": 128}
GEMMA4 |= {"hidden_size_per_layer_input": 32}
EXPERTS = {"hidden_size_per_layer_input": 0, "enable_moe_block": True, "num_experts": 4}
EXPERTS |= {"top_k_experts": 2, "moe_intermediate_size": 32}
SEES: dict[str, Any] = {"vision_config": {"hidden_size": 32, "intermediate_size": 32}}
SEES["vision_config"] |= {"num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28}
SEES["vision_config"] |= {"patch_size": 14}
DEEP = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "depth": 2,
    "num_heads": 2,
    "out_hidden_size": 64,
}
DEEP |= {"deepstack_visual_indexes": [0]}
TURN = {"rope_parameters": {"rope_type": "default", "rope_theta": 3e4, "mrope_section": [2, 3, 3]}}
FOUR = {"rope_parameters": TURN["rope_parameters"] | {"mrope_section": [2, 2, 2, 2]}}
TURNED_HALF = {"mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5}
TURNED_HALF = {"rope_parameters": TURN["rope_parameters"] | TURNED_HALF}
EYES = {"qwen2_vl": {"embed_dim": 32, "depth": 2, "num_heads": 2, "hidden_size": 64}}
FLAT = {k: v for k, v in DEEP.items() if k[:4] != "deep"}
EYES |= dict.fromkeys(("qwen2_5_vl", "glm4v", "glm4v_moe", "glm_ocr"), FLAT)
EYES["paddleocr_vl"] = SEES["vision_config"]
#: of what has three positions for every token or four, of a text the same one each time
TURNED = {
    "hunyuan_vl": (t.HunYuanVLConfig, FOUR),
    "paddleocr_vl": (t.PaddleOCRVLConfig, TURN),
    "glm4v": (t.Glm4vConfig, TURNED_HALF),
    "glm_ocr": (t.GlmOcrConfig, TURNED_HALF),
    "glm4v_moe": (t.Glm4vMoeConfig, ROUTED | TURNED_HALF),
    "qwen2_5_vl": (t.Qwen2_5_VLConfig, TURN),
    "qwen2_vl": (t.Qwen2VLConfig, TURN),
    "qwen3_vl": (t.Qwen3VLConfig, TURN),
    "qwen3_vl_moe": (t.Qwen3VLMoeConfig, MOE | TURN),
}

MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: t.LlamaConfig(**FEW, tie_word_embeddings=True),
    "llama with biases": lambda: t.LlamaConfig(**FEW, attention_bias=True, mlp_bias=True),
    "llama with wide heads": lambda: t.LlamaConfig(**FEW, head_dim=32),
    "llama 3": lambda: t.LlamaConfig(**FEW, rope_parameters=LLAMA3),
    "llama with yarn": lambda: t.LlamaConfig(**FEW, rope_parameters=YARN),
    "mistral": lambda: t.MistralConfig(**FEW, sliding_window=None),
    "qwen2": lambda: t.Qwen2Config(**FEW),
    "qwen3": lambda: t.Qwen3Config(**FEW, head_dim=16),
    "gemma": lambda: t.GemmaConfig(**FEW, head_dim=16),
    "gemma2": lambda: t.Gemma2Config(**FEW, **WINDOWS),
    "gemma3_text": lambda: t.Gemma3TextConfig(**COMMON, **WINDOWS),
    "phi3": lambda: t.Phi3Config(**FEW),
    "gpt2": lambda: t.GPT2Config(
        n_embd=64, n_layer=2, n_head=4, n_positions=512, **{k: FEW[k] for k in ("vocab_size",)}
    ),
    "granite": lambda: t.GraniteConfig(**FEW, **GRANITE, attention_multiplier=0.3),
    "olmo": lambda: t.OlmoConfig(**FEW),
    "olmo2": lambda: t.Olmo2Config(**FEW),
    "smollm3": lambda: t.SmolLM3Config(**COMMON),
    "starcoder2": lambda: t.Starcoder2Config(**FEW),
    "stablelm": lambda: t.StableLmConfig(**FEW),
    "phi": lambda: t.PhiConfig(**FEW),
    "cohere": lambda: t.CohereConfig(**FEW),
    "gpt_neox": lambda: t.GPTNeoXConfig(**FEW, rotary_pct=0.5),
    "gpt_neox one by one": lambda: t.GPTNeoXConfig(**FEW, use_parallel_residual=False),
    "falcon": lambda: t.FalconConfig(**FEW),
    "falcon with key heads": lambda: t.FalconConfig(
        **FEW, new_decoder_architecture=True, num_kv_heads=2
    ),
    "mixtral": lambda: t.MixtralConfig(**FEW, num_local_experts=4),
    "qwen2_moe": lambda: t.Qwen2MoeConfig(**FEW, **MOE, shared_expert_intermediate_size=64),
    "qwen3_moe": lambda: t.Qwen3MoeConfig(**FEW, **MOE, head_dim=16, norm_topk_prob=True),
    "olmoe": lambda: t.OlmoeConfig(
        **FEW | {"num_key_value_heads": 4}, num_experts=4, num_experts_per_tok=2
    ),
    "arcee": lambda: t.ArceeConfig(**FEW),
    "cwm": lambda: t.CwmConfig(**FEW),
    "internlm3": lambda: t.InternLM3Config(**FEW, **HEAD),
    "iquestcoder": lambda: t.IQuestCoderConfig(**FEW, **HEAD),
    "apertus": lambda: t.ApertusConfig(**FEW),
    "ernie4_5": lambda: t.Ernie4_5Config(**FEW, **HEAD),
    "glm": lambda: t.GlmConfig(**FEW, **HEAD),
    "glm4": lambda: t.Glm4Config(**FEW, **HEAD),
    "helium": lambda: t.HeliumConfig(**FEW, **HEAD),
    "hunyuan_v1_dense": lambda: t.HunYuanDenseV1Config(**FEW, **HEAD),
    "jais2": lambda: t.Jais2Config(**FEW),
    "ministral3": lambda: t.Ministral3Config(**FEW, **HEAD),
    "ministral": lambda: t.MinistralConfig(**FEW, **HEAD, sliding_window=512),
    "mpt": lambda: t.MptConfig(d_model=64, n_heads=4, n_layers=2, vocab_size=128, max_seq_len=512),
    "nemotron": lambda: t.NemotronConfig(**FEW),
    "seed_oss": lambda: t.SeedOssConfig(**FEW, **HEAD),
    "cohere2": lambda: t.Cohere2Config(**COMMON, sliding_window=8),
    "exaone4": lambda: t.Exaone4Config(
        **FEW, sliding_window=None, layer_types=["full_attention"] * 2
    ),
    "exaone4 with windows": lambda: t.Exaone4Config(
        **COMMON | {"num_hidden_layers": 64, "hidden_size": 32}, sliding_window=8
    ),
    "olmo3": lambda: t.Olmo3Config(**COMMON, sliding_window=8),
    "granite_swa": lambda: t.GraniteSWAConfig(
        **COMMON, **GRANITE, sliding_window=8, layer_rope_theta=[0, 1e5, 1e5, 1e5, 0, 1e5]
    ),
    "granitemoe_swa": lambda: t.GraniteMoeSWAConfig(
        **COMMON, **GRANITE, sliding_window=8, num_local_experts=4, num_experts_per_tok=2
    ),
    "granitemoe": lambda: t.GraniteMoeConfig(**FEW, num_local_experts=4),
    "hunyuan_v1_moe": lambda: t.HunYuanMoEV1Config(**FEW, **HEAD, num_experts=4, moe_topk=2),
    "dots1": lambda: t.Dots1Config(**FEW | ROUTED),
    "glm4_moe": lambda: t.Glm4MoeConfig(**FEW | ROUTED, **HEAD),
    "solar_open": lambda: t.SolarOpenConfig(**FEW | ROUTED | {"first_k_dense_replace": 0}, **HEAD),
    "ernie4_5_moe": lambda: t.Ernie4_5_MoeConfig(
        **FEW, **HEAD, moe_num_experts=4, moe_k=2, moe_intermediate_size=32
    ),
    "exaone_moe": lambda: t.ExaoneMoeConfig(**COMMON, **HEAD, **MOE, sliding_window=8),
    "afmoe": lambda: t.AfmoeConfig(
        **COMMON, **HEAD, **MOE, num_shared_experts=1, sliding_window=8, mup_enabled=True
    ),
    "aria_text": lambda: t.AriaTextConfig(
        **FEW, moe_num_experts=4, moe_topk=2, moe_num_shared_experts=2
    ),
    "cohere_compass_text": lambda: t.CohereCompassTextConfig(
        **COMMON,
        **{"sliding_window": 8, "logit_scale": 0.3},
        layer_types=["sliding_attention"] * 3 + ["full_attention"] + ["sliding_attention"] * 2,
        rope_parameters={
            "full_attention": None,
            "sliding_attention": {"rope_type": "default", "rope_theta": 3e4},
        },
    ),
    "cohere2_moe": lambda: t.Cohere2MoeConfig(
        **COMMON, **HEAD, num_experts=4, num_shared_experts=1, sliding_window=8
    ),
    "cohere2_moe behind a dense layer": lambda: t.Cohere2MoeConfig(
        **COMMON,
        **HEAD,
        **{"num_experts": 4, "expert_selection_fn": "sigmoid", "sliding_window": 8},
        mlp_layer_types=["dense"] + ["sparse"] * 5,
    ),
    "hy_v3": lambda: t.HYV3Config(**FEW, **HEAD, **MOE),
    "mellum": lambda: t.MellumConfig(
        **FEW,
        **HEAD,
        **MOE,
        **{"sliding_window": 8, "layer_types": ["full_attention", "sliding_attention"]},
        rope_parameters={
            "full_attention": YARN,
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    ),
    "gpt_oss": lambda: t.GptOssConfig(
        **COMMON, **HEAD, num_local_experts=4, num_experts_per_tok=2, sliding_window=8
    ),
    "llama4_text": lambda: t.Llama4TextConfig(
        **COMMON, **HEAD, num_local_experts=2, interleave_moe_layer_step=1
    ),
    "laguna": lambda: t.LagunaConfig(
        **COMMON | {"num_hidden_layers": 4},
        **HEAD | MOE | {"shared_expert_intermediate_size": 64, "sliding_window": 8},
        num_attention_heads_per_layer=[4, 8, 8, 8],
        layer_types=["full_attention"] + ["sliding_attention"] * 3,
    ),
    "laguna without windows": lambda: t.LagunaConfig(
        **FEW, **HEAD, **MOE, shared_expert_intermediate_size=64, gating="per-element"
    ),
    "minimax_m2": lambda: t.MiniMaxM2Config(
        **FEW, **HEAD, num_local_experts=4, num_experts_per_tok=2
    ),
    "mimo_v2_flash": lambda: t.MiMoV2FlashConfig(
        **COMMON | {"num_hidden_layers": 3},
        **{k: v for k, v in ROUTED.items() if k[:2] in ("n_", "mo") and "shared" not in k},
        **{"num_experts_per_tok": 2, "head_dim": 32, "v_head_dim": 16, "sliding_window": 8},
    ),
    "lfm2": lambda: t.Lfm2Config(**FEW, layer_types=HYBRID),
    "lfm2_moe": lambda: t.Lfm2MoeConfig(**FEW, **MOE, num_dense_layers=1, layer_types=HYBRID),
    "mamba": lambda: t.MambaConfig(**SSM, time_step_rank=4),
    "falcon_mamba": lambda: t.FalconMambaConfig(**SSM, time_step_rank=4),
    "falcon_h1": lambda: t.FalconH1Config(**FEW, **FALCON_H1),
    "falcon_h1 with a norm": lambda: t.FalconH1Config(
        **FEW,
        **FALCON_H1,
        mamba_rms_norm=True,
        mlp_bias=True,
        mamba_norm_before_gate=False,
        tie_word_embeddings=True,
    ),
    "granitemoehybrid": lambda: t.GraniteMoeHybridConfig(**FEW, **HYBRIDS, num_local_experts=0),
    "bamba": lambda: t.BambaConfig(
        **FEW,
        **{k: v for k, v in HYBRIDS.items() if k.startswith("mamba")},
        attn_layer_indices=[1],
    ),
    "granitemoehybrid with rotation": lambda: t.GraniteMoeHybridConfig(
        **FEW, **HYBRIDS, num_local_experts=0, position_embedding_type="rope"
    ),
    "granitemoehybrid with experts": lambda: t.GraniteMoeHybridConfig(
        **FEW, **HYBRIDS, num_local_experts=4, num_experts_per_tok=2
    ),
    "granitemoeshared": lambda: t.GraniteMoeSharedConfig(
        **FEW, num_local_experts=4, shared_intermediate_size=48
    ),
    "mamba2": lambda: t.Mamba2Config(
        **SSM | {"state_size": 16}, num_heads=8, head_dim=16, n_groups=2
    ),
    "nemotron_h": lambda: t.NemotronHConfig(
        **NEMOTRON, layers_block_type=["mamba", "attention", "mlp"]
    ),
    "nemotron_h with experts": lambda: t.NemotronHConfig(
        **NEMOTRON | ROUTED | {"num_key_value_heads": 2},
        **{"layers_block_type": ["mamba", "attention", "moe"]},
        moe_shared_expert_intermediate_size=64,
    ),
    "jamba": lambda: t.JambaConfig(
        **FEW,
        num_experts=4,
        **{
            f"{x}_layer_{y}": z
            for x in ("attn", "expert")
            for y, z in (("period", 2), ("offset", 1))
        },
        **{"mamba_dt_rank": 4, "mamba_d_state": 8, "use_mamba_kernels": False},
    ),
    "qwen3_next": lambda: t.Qwen3NextConfig(
        **COMMON | {"num_hidden_layers": 4}, **HEAD, **MOE, **LINEAR | {"linear_num_key_heads": 2}
    ),
    "qwen3_5_text": lambda: t.Qwen3_5TextConfig(
        **COMMON | {"num_hidden_layers": 4}, head_dim=64, **LINEAR
    ),
    "qwen3_5_moe_text": lambda: t.Qwen3_5MoeTextConfig(
        **{k: v for k, v in COMMON.items() if k not in ("intermediate_size", "num_hidden_layers")},
        **{"num_hidden_layers": 4, "head_dim": 64, **MOE, **LINEAR},
    ),
    "qwen3_5_text with more values": lambda: t.Qwen3_5TextConfig(
        **COMMON | {"num_hidden_layers": 4}, head_dim=64, **LINEAR | MANY
    ),
    "dbrx": lambda: t.DbrxConfig(
        **{"d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 512, "vocab_size": 128},
        attn_config={"kv_n_heads": 2, "clip_qkv": 0.5, "rope_theta": 3e4},
        ffn_config=DBRX,
        rope_parameters={"rope_type": "default", "rope_theta": 3e4},
        initializer_range=0.1,
    ),
    "deepseek_v2": lambda: t.DeepseekV2Config(**FEW | ROUTED | RANKS),
    "deepseek_v3": lambda: t.DeepseekV3Config(**FEW | ROUTED | RANKS, n_group=2, topk_group=1),
    "deepseek_v3 with yarn": lambda: t.DeepseekV3Config(
        **FEW | ROUTED | RANKS,
        **{"n_group": 2, "topk_group": 1, "rope_parameters": YARN | MSCALE},
    ),
    "deepseek_v32": lambda: t.DeepseekV32Config(
        **FEW | ROUTED | RANKS | INDEX, n_group=2, topk_group=1
    ),
    "glm_moe_dsa": lambda: t.GlmMoeDsaConfig(
        **COMMON | ROUTED | RANKS | INDEX | {"num_hidden_layers": 3},
        indexer_types=["full", "shared", "full"],
    ),
    "kimi_linear": lambda: t.KimiLinearConfig(
        **COMMON | {"num_hidden_layers": 3, "num_key_value_heads": 4},
        **{**RANKS, "q_lora_rank": None, "qk_rope_head_dim": 16, "moe_intermediate_size": 32},
        **{"num_local_experts": 4, "num_experts_per_tok": 2},
        **{"linear_head_dim": 16, "linear_num_heads": 4},
        layer_types=["linear_attention", "linear_attention", "full_attention"],
    ),
    "mistral4": lambda: t.Mistral4Config(
        **FEW | ROUTED | RANKS,
        rope_parameters=YARN | MSCALE | {"llama_4_scaling_beta": 0.1},
    ),
    "glm4_moe_lite": lambda: t.Glm4MoeLiteConfig(**FEW | ROUTED | RANKS),
    "minicpm3": lambda: t.MiniCPM3Config(**FEW | RANKS | {"num_key_value_heads": 4}),
    "youtu": lambda: t.YoutuConfig(**FEW | RANKS | {"num_key_value_heads": 4}),
    "gemma3n_text": lambda: t.Gemma3nTextConfig(
        **GEMMA3N,
        rope_parameters={
            "full_attention": {"rope_type": "default", "rope_theta": 3e4},
            "sliding_attention": {"rope_type": "default", "rope_theta": 2e3},
        },
    ),
    "gemma4_text": lambda: t.Gemma4TextConfig(**COMMON, **GEMMA4),
    "gemma4_unified_text": lambda: t.Gemma4UnifiedTextConfig(
        **COMMON, **HEAD, sliding_window=8, final_logit_softcapping=5.0
    ),
    "gemma4 with experts": lambda: t.Gemma4TextConfig(**COMMON, **GEMMA4 | EXPERTS),
    "gemma4 with shared keys": lambda: t.Gemma4TextConfig(
        **COMMON | {"num_hidden_layers": 12},
        **GEMMA4,
        num_kv_shared_layers=6,
        use_double_wide_mlp=True,
    ),
    "gemma4 that sees": lambda: t.Gemma4Config(
        text_config=COMMON | GEMMA4, audio_config=None, **SEES, image_token_id=3, video_token_id=4
    ),
    **{
        f"{name} that sees": lambda name=name, config=config, words=words: config(
            text_config=FEW | HEAD | words,
            vision_config=EYES.get(name, DEEP),
            image_token_id=3,
            video_token_id=4,
        )
        for name, (config, words) in TURNED.items()
    },
    "gemma3 that sees": lambda: t.Gemma3Config(
        text_config=COMMON | WINDOWS, **SEES, mm_tokens_per_image=4, image_token_index=3
    ),
    "bloom": lambda: t.BloomConfig(vocab_size=128, hidden_size=64, n_layer=2, n_head=4),
    "gpt_bigcode": lambda: t.GPTBigCodeConfig(
        n_embd=64, n_layer=2, n_head=4, n_positions=512, vocab_size=128
    ),
}

#: what is packed where it is not all of the feed-forward parts, by how names begin
SELECTED = dict.fromkeys(
    ("mamba", "falcon_mamba", "nemotron_h", "falcon_h1 with"), "*/*/mixer.in_proj"
)
SELECTED |= {"gemma3n": "*/20-24/mlp.*_proj"}
#: options of the export, for what makes much of little that changes in front
EXPORTED = {"gemma3n_text": {"embedding": "F32"}}
#: of types that the automatic class does not know
CLASSES = {"mistral4": t.Mistral4ForCausalLM}
CLASSES |= {
    "hunyuan_vl that sees": t.HunYuanVLForConditionalGeneration,
    "paddleocr_vl that sees": t.PaddleOCRVLForConditionalGeneration,
    "glm4v that sees": t.Glm4vForConditionalGeneration,
    "glm_ocr that sees": t.GlmOcrForConditionalGeneration,
    "glm4v_moe that sees": t.Glm4vMoeForConditionalGeneration,
    "qwen2_5_vl that sees": t.Qwen2_5_VLForConditionalGeneration,
    "qwen2_vl that sees": t.Qwen2VLForConditionalGeneration,
    "qwen3_vl that sees": t.Qwen3VLForConditionalGeneration,
    "qwen3_vl_moe that sees": t.Qwen3VLMoeForConditionalGeneration,
}


@pytest.fixture(scope="module")
def folder_of(
    tmp_path_factory: pytest.TempPathFactory, tokenizer_into: Callable[[Path], None]
) -> Callable[[str], Path]:
    """A tiny random model, its norms and biases as well."""

    def build(name: str) -> Any:
        model = CLASSES.get(name, t.AutoModelForCausalLM.from_config)(MODELS[name]())
        for key, parameter in model.named_parameters():
            if any(part in key for part in ("norm", "bias", "ln_", "sinks", "A_log")):
                wide = 2.0 if "router" in key else 0.2  # choices that rounding leaves alone
                parameter.data.add_(wide * torch.randn_like(parameter))
        return model

    return made_once(tmp_path_factory, tokenizer_into, build)


def test_every_architecture_of_the_table_is_tested() -> None:
    configs = [make().get_text_config(decoder=True) for make in MODELS.values()]
    assert {config.model_type for config in configs} == set(_gguf_models.KNOWN)


@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_gives_our_logits(
    name: str, folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    """`apply` runs the file, which holds packed and plain matrices, in llama.cpp, or refuses it."""
    model = folder_of(name)
    select = next((s for n, s in SELECTED.items() if name.startswith(n)), "*/*/mlp")
    plan = plan_of(model, select=select, export=EXPORTED.get(name, {}))
    applied = apply_plan(model, plan, tmp_path / "out")
    file = GgufFile(tmp_path / "out" / FILE)
    assert applied.nbytes == file.nbytes
    ids = (torch.arange(32) * 7 % 128)[None]
    kind = CLASSES.get(name, t.AutoModelForCausalLM)
    found = kind.from_pretrained(model, dtype=torch.float32).eval()
    with torch.no_grad():
        wanted = found(ids).logits[0]
    given_back(file, open_network(model))
    batches = [{"input_ids": ids}]
    with engine.in_llama(file.path, batches) as answers:
        near = engine.agreement([wanted], map(answers, batches))
    assert near.kl < 2e-2, "eight bits change little: the original's logits are near as well"


#: types of which there are sentence encoders, and some others
HEADLESS = ("cohere", "falcon_h1", "gemma", "gemma2", "gemma3_text", "granite", "lfm2", "llama")
HEADLESS += ("mistral", "phi3", "qwen2", "qwen3", "smollm3")
#: how states become one -> what sentence-transformers calls it
POOLED: dict[str, Callable[[Tensor], Tensor]] = {
    "lasttoken": lambda states: states[-1],
    "cls_token": lambda states: states[0],
    "mean_tokens": lambda states: states.mean(0),
}


@pytest.mark.parametrize("name", HEADLESS)
def test_hidden_states_without_a_head(
    name: str, folder_of: Callable[[str], Path], tokenizer_into: Any, tmp_path: Path
) -> None:
    ids = (torch.arange(32) * 7 % 128)[None]
    model = t.AutoModel.from_pretrained(folder_of(name), dtype=torch.float32).eval()
    model.save_pretrained(tmp_path / "model")
    tokenizer_into(tmp_path / "model")
    with torch.no_grad():
        wanted = model(ids).last_hidden_state[0]
    plan = plan_of(tmp_path / "model", "", export={"embedding": "F32"})
    apply_plan(tmp_path / "model", plan, tmp_path / "out")
    batches = [{"input_ids": ids}]
    with engine.in_llama(tmp_path / "out" / FILE, batches, token_rows, embeds=True) as answers:
        assert engine.distance([wanted], map(answers, batches)).worst < 1e-2


def test_a_head_that_llama_cpp_asks_for(tmp_path: Path) -> None:
    t.AutoModel.from_config(MODELS["olmo2"]()).save_pretrained(tmp_path)
    with pytest.raises(LayerwiseError, match=r"olmo2: allowed is a network with its head"):
        make_plan(Request(tmp_path, Budget(bits=6.0), target="gguf", data=SMALL))


@pytest.mark.parametrize("mode", POOLED)
@pytest.mark.parametrize("name", ["gemma3_text", "qwen3"])
def test_llama_cpp_pools_as_the_folder_says(
    name: str, mode: str, folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    """A causal network of sentence-transformers, saved with its head: logits, and one state."""
    model, ids = tmp_path / "model", torch.arange(10, 30)
    shutil.copytree(folder_of(name), model)
    (model / "1_Pooling").mkdir()
    said = {f"pooling_mode_{mode}": True, "include_prompt": True}
    (model / "1_Pooling" / "config.json").write_text(json.dumps(said))
    apply_plan(model, plan_of(model, "", export={"embedding": "F32"}), tmp_path / "out")
    with torch.no_grad():
        found = t.AutoModel.from_pretrained(model, dtype=torch.float32).eval()(ids[None])
    wanted = POOLED[mode](found.last_hidden_state[0])
    with Llama(tmp_path / "out" / FILE, 32, pooled=True) as loaded:
        one = loaded.embedding(ids.tolist())
    assert (one - wanted).norm() < 1e-2 * wanted.norm()


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("dbrx", "ffn_config", DBRX | {"moe_normalize_expert_weights": None}),
        ("falcon_h1 with a norm", "mamba_norm_before_gate", True),
        ("falcon_h1", "time_step_limit", [0.0, 1.0]),
        ("gemma3n_text", "final_logit_softcapping", 20.0),
        ("gemma3n_text", "num_kv_shared_layers", 10),
        ("gemma3n_text", "activation_sparsity_pattern", [0.5] * 25),
    ],
)
def test_what_llama_cpp_computes_otherwise_is_refused(
    name: str, field: str, value: Any, tmp_path: Path
) -> None:
    config = type(MODELS[name]()).from_dict(MODELS[name]().to_dict() | {field: value})
    t.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(LayerwiseError, match=rf"target gguf, {field}: .*use --target hf"):
        make_plan(Request(tmp_path, Budget(bits=6.0), target="gguf", data=SMALL))


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        ("llama", ("rotate_stream", "awq")),
        ("granite", ("rotate_stream", "smoothquant")),
        ("gemma", ("awq",)),
        ("gemma2", ("awq",)),
        ("gpt2", ("smoothquant",)),
        ("phi3", ("awq",)),
        ("cohere", ("awq",)),
    ],
)
def test_rewritten_weights_are_the_original_in_llama_cpp(
    name: str, steps: tuple[str, ...], folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    """Norms that add 1 to their weight, tied heads, shared norms, biases and fused rows."""
    model = folder_of(name)
    plan = plan_of(model, select="*/*/mlp", rewrites=tuple(Step(step) for step in steps))
    apply_plan(model, plan, tmp_path / "out")
    ids = (torch.arange(32) * 7 % 128)[None]
    found = t.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        wanted = found(ids).logits[0]
    batches = [{"input_ids": ids}]
    with engine.in_llama(tmp_path / "out" / FILE, batches) as answers:
        near = engine.agreement([wanted], map(answers, batches))
    assert near.kl < 5e-3


def test_experts_of_a_layer_share_their_type(
    folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    plan = plan_of(folder_of("mixtral"), select="*/*/mlp.gate_up_proj[1]")
    with pytest.raises(LayerwiseError, match=r"one type for all experts.*found F32, Q8_0"):
        apply_plan(folder_of("mixtral"), plan, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_head_that_the_format_ties_cannot_be_untied(
    folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    plan = plan_of(folder_of("gemma"), rewrites=(Step("rotate_stream"),))
    with pytest.raises(LayerwiseError, match=r"architecture gemma: .*found lm_head.weight"):
        apply_plan(folder_of("gemma"), plan, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_file_that_says_something_else_is_refused(
    folder_of: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of queries and keys left in the order of transformers: llama.cpp rotates others."""
    model = folder_of("llama")
    wrong = {"llama": _gguf_models.Known("llama", halves=False)}
    monkeypatch.setattr(_gguf_models, "KNOWN", wrong)
    with pytest.raises(LayerwiseError, match=r"dequantized model.*not sound"):
        apply_plan(model, plan_of(model), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_multiplier_that_is_forgotten_is_refused(
    folder_of: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, (whole, fields) = folder_of("falcon_h1"), _gguf_folds.FACTORS["falcon_h1"]
    some = lambda *said: (f for f in whole(*said) if "k_proj" not in f.part)  # noqa: E731
    monkeypatch.setitem(_gguf_folds.FACTORS, "falcon_h1", (some, fields))
    with pytest.raises(LayerwiseError, match=r"target gguf: .*change no number.*--target hf"):
        apply_plan(model, plan_of(model, select="*/*/mlp"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("type_", ["Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q2_K", "IQ3_XXS"])
def test_types_in_the_engine(type_: str, tmp_path: Path) -> None:
    plan = plan_of("demo", type_, export={"embedding": "Q8_0"})
    applied = apply_plan("demo", plan, tmp_path / "out")
    assert {t_.tensor_type.name for t_ in GgufFile(tmp_path / "out" / FILE).tensors.values()} == {
        "F32",
        "Q8_0",
        type_,
    }
    # at 8-bit inputs IQ3_XXS stands at the tolerance, on one side or the other by the processor
    most = 1.5e-3 if type_ == "IQ3_XXS" else 0.0
    found = [float(re.findall(r"mean KL (\S+) nats", w)[0]) for w in applied.warnings]
    assert all(kl < most for kl in found), applied.warnings


def test_a_plan_whose_codes_are_chosen_anew(tmp_path: Path) -> None:
    few = {"menu": {"type": ["Q4_K", "Q3_K", "IQ3_XXS"]}, "refine": {"by": "feedback"}}
    request = Request(
        "demo",
        Budget(bits=4),
        method="ggml+refine",
        allocator="uniform",
        target="gguf",
        data=SMALL,
        settings=few,
    )
    planned = make_plan(request)
    assert {step.method for e in planned.plan.edits for step in e.chain} == {"ggml", "refine"}
    applied = apply_plan("demo", planned.plan, tmp_path / "out")
    assert planned.nbytes == applied.nbytes == GgufFile(tmp_path / "out" / FILE).nbytes


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt2"])
def test_dropped_and_repeated_layers(
    name: str, folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    model = folder_of(name)
    order = {"gemma3_text": [0, 1, 2, 3, 4], "llama": [0, 1, 1], "gpt2": [1]}[name]
    plan = plan_of(model, wiring={"decoder": order})
    apply_plan(model, plan, tmp_path / "out")
    reader = GgufFile(tmp_path / "out" / FILE)
    assert max(int(n.split(".")[1]) for n in reader.tensors if n.startswith("blk.")) + 1 == len(
        order
    )
    found = verify(model, tmp_path / "out", QUICK._replace(naive=False))
    assert all(check["ok"] for check in found.checks), found.checks


def test_a_file_at_which_llama_cpp_ends_is_one_clear_error(
    folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    """Llama 4 without a layer that sees everything: llama.cpp ends its process."""
    model = folder_of("llama4_text")
    plan = plan_of(model, "", wiring={"decoder": [0, 1, 2]})
    with pytest.raises(LayerwiseError, match=r"in llama.cpp: .*found its end, code -6: .*ASSERT"):
        apply_plan(model, plan, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_rhythm_of_windows_that_llama_cpp_does_not_know(
    folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    model = folder_of("gemma3_text")
    plan = plan_of(model, wiring={"decoder": [0, 5, 1, 2]})
    with pytest.raises(LayerwiseError, match=r"layer_types|same kind"):
        apply_plan(model, plan, tmp_path / "out")


def test_plan_apply_verify_on_the_demo_model(tmp_path: Path) -> None:
    request = Request("demo", Budget(bits=3.5), target="gguf", score="lim", data=SMALL)
    planned = make_plan(request)
    assert planned.bits is not None and 3.3 < planned.bits <= 3.5
    applied = apply_plan("demo", planned.plan, tmp_path / "out")
    assert planned.nbytes == applied.nbytes == GgufFile(tmp_path / "out" / FILE).nbytes
    found = verify("demo", tmp_path / "out", QUICK)
    assert all(check["ok"] for check in found.checks), found.checks
    rows = {row["name"]: row for row in found.rows}
    assert rows["naive"]["bytes"] <= rows["plan"]["bytes"] == applied.nbytes
    assert abs(rows["llama.cpp"]["kl"][0] - rows["plan"]["kl"][0]) < 5e-3


@pytest.mark.parametrize("kind", ["size", "bytes"])
def test_budgets_count_embedding_and_norms(kind: str) -> None:
    whole = Checkpoint(find_folder("demo")).nbytes
    budget = Budget(size=0.3) if kind == "size" else Budget(bytes=int(0.3 * whole))
    few = {"menu": {"type": ["Q8_0", "Q6_K", "Q4_K", "Q3_K", "Q2_K"]}}
    for settings in (few, few | {"gguf": {"embedding": "Q8_0"}}):
        request = Request("demo", budget, target="gguf", score="lim", data=SMALL, settings=settings)
        planned = make_plan(request)
        assert 0.29 * whole < planned.nbytes <= 0.3 * whole
        assert planned.plan.export == settings.get("gguf", {})


@pytest.mark.parametrize("name", MIXES)
def test_mixtures_of_llama_cpp(name: str, tmp_path: Path) -> None:
    network = open_network("demo")
    plan = mix_plan(network, name, SMALL)
    applied = apply_plan("demo", plan, tmp_path / "out", check=False)
    file = GgufFile(tmp_path / "out" / FILE)
    assert applied.nbytes == written_bytes(network, plan) == file.nbytes
    kinds = {n: t_.tensor_type.name for n, t_ in file.tensors.items()}
    first = {"Q4_K_M": "Q6_K", "Q3_K_M": "Q5_K", "Q2_K": "Q3_K"}[name]
    assert kinds["blk.0.attn_v.weight"] == first
    assert kinds["blk.4.ffn_up.weight"] == name[:4]
    assert kinds["token_embd.weight"] == "Q6_K"


def test_tokens_of_llama_cpp_are_those_of_the_tokenizer(tmp_path: Path) -> None:
    apply_plan("demo", plan_of("demo", ""), tmp_path / "out", check=False)
    tokenizer = t.AutoTokenizer.from_pretrained(find_folder("demo"))
    text = "def f(x1234):\n    return 'äß€' + x  # 12,345.6  don't\n\n\n"
    with Llama(tmp_path / "out" / FILE, 8) as loaded:
        assert loaded.tokenize(text) == tokenizer(text)["input_ids"]
        with pytest.raises(LayerwiseError, match="at most 8 tokens"):
            loaded.logits(list(range(9)))


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2"])
def test_a_gguf_file_is_a_model(
    name: str, folder_of: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model = folder_of(name)
    apply_plan(model, plan_of(model), tmp_path / "out")
    file = tmp_path / "out" / FILE
    opened = open_network(file)
    assert len(opened.layers()) == 2
    again = plan_of(file, "Q4_K")
    apply_plan(file, again, tmp_path / "again")
    assert open_network(tmp_path / "again").model.config.vocab_size == 128


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF\x03\x00\x00\x00" + b"\xff" * 40])
def test_a_broken_file_is_one_clear_error(
    content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = tmp_path / "broken.gguf"
    file.write_bytes(content)
    with pytest.raises(LayerwiseError, match=r"broken\.gguf"):
        open_network(file)


def test_what_gguf_does_not_know_is_refused_at_planning(tiny: Callable[..., Path]) -> None:
    with pytest.raises(LayerwiseError, match=r"target gguf: allowed.*llama.*found opt"):
        make_plan(Request(tiny("opt"), Budget(bits=4.0), target="gguf", data=SMALL))


def test_heads_that_are_moved_are_whole_blocks(
    folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    """Columns go by heads of 32 weights: as a block of 32 does, not one of 256."""
    model, select = folder_of("qwen3_5_text with more values"), "*/*/attention.o"
    apply_plan(model, plan_of(model, "Q4_0", select=select), tmp_path / "out")
    file, network = GgufFile(tmp_path / "out" / FILE), open_network(model)
    assert file.tensors["blk.0.ssm_out.weight"].tensor_type.name == "Q4_0"
    layer = network.layers()[0]
    tensors, back = network.fetch(layer), file.records(network, layer)
    for matrix in layer.matrices:
        weight, found = matrix.view(tensors[matrix.parameter]), back[matrix.key].dense()
        assert (found - weight).abs().max() <= 0.15 * weight.abs().max(), matrix.key
    with pytest.raises(LayerwiseError, match=r"attention\.o.*Q4_K, .*wider than heads of 32"):
        apply_plan(model, plan_of(model, "Q4_K", select=select), tmp_path / "wide")


def test_what_is_written_transposed_is_kept(
    folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    model = folder_of("kimi_linear")
    plan = plan_of(model, select="*/2/attention.kv_b*")
    with pytest.raises(LayerwiseError, match=r"kv_b.*half of transposed.*keep it"):
        apply_plan(model, plan, tmp_path / "out")


def test_other_methods_and_types_are_refused(tmp_path: Path) -> None:
    plan = plan_of("demo")
    chain = (Step("gptq", {"bits": 4, "group": 32}),)
    wrong = Plan(plan.model, target="gguf", data=SMALL, edits=(Edit("*", chain),))
    with pytest.raises(LayerwiseError, match="which has no GGML type"):
        apply_plan("demo", wrong, tmp_path / "out")
    with pytest.raises(LayerwiseError, match="did you mean Q4_K"):
        apply_plan("demo", plan_of("demo", "Q4_k"), tmp_path / "out")
    with pytest.raises(LayerwiseError, match="embeding"):
        apply_plan("demo", plan_of("demo", export={"embeding": "Q8_0"}), tmp_path / "out")
    with pytest.raises(LayerwiseError, match=r"menu\.type"):
        settings = {"menu": {"type": [4]}}
        make_plan(Request("demo", Budget(bits=4), target="gguf", data=SMALL, settings=settings))


def test_an_importance_matrix_from_the_command_line(tmp_path: Path) -> None:
    runner, file = CliRunner(), tmp_path / "demo.gguf"
    words = ["imatrix", "demo", "--out", str(file), "--samples", "4", "--length", "64", "--json"]
    done = runner.invoke(app, words, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    plan = plan_of("demo", "Q2_K", "*/0/*", export={"imatrix": str(file)})
    apply_plan("demo", plan, tmp_path / "out", check=False)
    assert read_plan(tmp_path / "out" / "plan.yaml") == plan
    alike = plan_of("demo", "Q2_K", "*/0/*", export={"imatrix": ""})
    measured = apply_plan("demo", alike, tmp_path / "measured", check=False)
    assert measured.nbytes == GgufFile(tmp_path / "out" / FILE).nbytes
    with pytest.raises(LayerwiseError, match=r"found no entry|values"):
        other = tmp_path / "other.dat"
        other.write_bytes(b"\0" * 12)
        apply_plan("demo", plan_of("demo", export={"imatrix": str(other)}), tmp_path / "x")
