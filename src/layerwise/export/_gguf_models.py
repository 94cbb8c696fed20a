"""Which architectures GGUF knows, and how their hyper-parameters are written.

The names of tensors come from the `gguf` package; what a model is, from its configuration.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from layerwise.core.errors import LayerwiseError, nearest
from layerwise.core.ggml import needing_gguf
from layerwise.core.network import Network


class Known(NamedTuple):
    """An architecture of GGUF.

    `halves`: rows of queries and keys go from two halves per head, as transformers rotates them,
    to pairs. `woven`: fused rows of queries, keys and values come head by head. `shift` is added to
    the weights of norms. `period`: every `period`-th layer attends to all positions, the others to
    a window.
    """

    name: str
    halves: bool = False
    woven: bool = False
    shift: float = 0.0
    period: int = 0


#: model_type of a configuration -> what GGUF calls it, and what llama.cpp expects of its weights
KNOWN = {
    "llama": Known("llama", halves=True),
    "mistral": Known("llama", halves=True),
    "granite": Known("granite", halves=True),
    "olmo": Known("olmo", halves=True),
    "smollm3": Known("smollm3", halves=True),
    "qwen2": Known("qwen2"),
    "qwen3": Known("qwen3"),
    "olmo2": Known("olmo2"),
    "phi3": Known("phi3"),
    "gpt2": Known("gpt2"),
    "starcoder2": Known("starcoder2"),
    "stablelm": Known("stablelm"),
    "phi": Known("phi2"),
    "cohere": Known("command-r"),
    "gemma": Known("gemma", shift=1.0),
    "gemma2": Known("gemma2", shift=1.0, period=2),
    "gemma3_text": Known("gemma3", shift=1.0, period=6),
    "gpt_neox": Known("gptneox", woven=True),
    "falcon": Known("falcon", woven=True),
    "bloom": Known("bloom", woven=True),
    "gpt_bigcode": Known("starcoder"),
    "mixtral": Known("llama", halves=True),
    "qwen2_moe": Known("qwen2moe"),
    "qwen3_moe": Known("qwen3moe"),
    "olmoe": Known("olmoe"),
}

#: a parameter that transformers fuses -> the names of what its rows hold, one after the other
FUSED = {"gate_up_proj": ("gate_proj", "up_proj")}
#: llama.cpp looks for a token where the model is called so, and stops if it is missing
NAMED = {"phi": "<|endoftext|>"}

#: key of GGUF -> fields of a configuration, of which the first that is there counts
_WHOLE = {
    "context_length": ("max_position_embeddings",),
    "embedding_length": ("hidden_size",),
    "attention.head_count": ("num_attention_heads",),
    "attention.head_count_kv": ("num_key_value_heads",),
    "vocab_size": ("vocab_size",),
    "expert_count": ("num_local_experts", "num_experts"),
    "expert_used_count": ("num_experts_per_tok",),
    "expert_feed_forward_length": ("moe_intermediate_size",),
    "expert_shared_feed_forward_length": ("shared_expert_intermediate_size",),
}
_REAL = {
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps",),
    "attention.layer_norm_epsilon": (
        "layer_norm_epsilon",
        "layer_norm_eps",
        "norm_epsilon",
        "layer_norm_rms_eps",
    ),
    "attn_logit_softcapping": ("attn_logit_softcapping",),
    "final_logit_softcapping": ("final_logit_softcapping",),
    "attention.scale": ("attention_multiplier",),
    "embedding_scale": ("embedding_multiplier",),
    "residual_scale": ("residual_multiplier",),
    "logit_scale": ("logits_scaling", "logit_scale"),
    "attention.clamp_kqv": ("clip_qkv",),
}
#: positions where a model does not limit them
UNBOUND = 2048
_TRUTH = {"use_parallel_residual": ("use_parallel_residual",)}


def known(network: Network) -> Known:
    """What GGUF knows of a network.

    Raises:
        LayerwiseError: it does not know the architecture.
    """
    kind = str(network.model.config.model_type)
    found = KNOWN.get(kind)
    if found is None or len(network.stacks) != 1 or network.task != "causal":
        raise LayerwiseError(
            "target gguf",
            allowed=f"causal models of type {', '.join(KNOWN)}",
            found=f"{kind}, {type(network.module).__name__}",
            fix=nearest(kind, KNOWN, "use --target hf or compressed-tensors"),
        )
    return found


class Names:
    """From names in memory to names in GGUF, for one network."""

    def __init__(self, network: Network) -> None:
        with needing_gguf():
            from gguf import MODEL_ARCH_NAMES, TensorNameMap
        self.known = known(network)
        numbers = {name: number for number, name in MODEL_ARCH_NAMES.items()}
        self._map = TensorNameMap(numbers[self.known.name], len(network.layers()))

    def __call__(self, name: str) -> str:
        """The name of a tensor in GGUF, the first where it is cut.

        Raises:
            LayerwiseError: the format has no place for it.
        """
        return self.pieces(name)[0]

    def pieces(self, name: str) -> tuple[str, ...]:
        """Names in GGUF of the equal blocks of rows that a tensor is cut into; mostly one.

        Raises:
            LayerwiseError: the format has no place for it.
        """
        path, _, last = name.rpartition(".")
        for parts in ((last,), FUSED.get(last, ())):
            found = [self._find(f"{path}.{part}") for part in parts]
            if found and all(found):
                return tuple(filter(None, found))
        raise LayerwiseError(
            f"target gguf, architecture {self.known.name}",
            allowed="the tensors that GGUF has names for",
            found=name,
            fix="this variant of the architecture cannot be written; use --target hf",
        )

    def _find(self, name: str) -> str | None:
        """One name; some are known without that of the base model, parameters of experts bare."""
        for tried in (name, name.partition(".")[2]):
            found = self._map.get_name(tried, try_suffixes=(".weight", ".bias"))
            if found is not None:
                return found if found.endswith((".weight", ".bias")) else f"{found}.weight"
        return None


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
    config, size = network.model.config, head_size(network.model.config)
    found: dict[str, Any] = {"block_count": len(network.layers())}
    for kinds, to in ((_WHOLE, int), (_REAL, float), (_TRUTH, bool)):
        for key, fields in kinds.items():
            values = [config.to_dict().get(f, _get(config, f)) for f in fields]
            value = next((v for v in values if v is not None), None)
            if value is not None:
                found[key] = to(value)
    found.setdefault("attention.head_count_kv", found["attention.head_count"])
    found.setdefault("context_length", UNBOUND)
    found |= {"attention.key_length": size, "attention.value_length": size}
    if config.model_type == "olmo":
        found["attention.layer_norm_epsilon"] = 1e-5  # a constant of its code
    return found | dict(_rotary(config, size)) | dict(_windows(config, known(network)))


def _get(config: Any, field: str) -> Any:
    """A field under the name that the architecture gives it."""
    return config.to_dict().get(config.attribute_map.get(field, field))


def rope_of(config: Any) -> Mapping[str, Any]:
    """The rotary parameters of layers that attend to all positions."""
    found = vars(config).get("rope_parameters") or {}
    return found.get("full_attention", found)


def _rotary(config: Any, size: int) -> Iterator[tuple[str, Any]]:
    rope = rope_of(config)
    if not rope:
        return
    kind = rope.get("rope_type", "default")
    if kind not in ("default", "linear", "yarn", "llama3", "longrope"):
        raise LayerwiseError(
            "target gguf, rope_type",
            allowed="default, linear, yarn, llama3 or longrope",
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
    if kind in ("yarn", "longrope") and old:
        yield "rope.scaling.original_context_length", int(old)
    if kind == "longrope":
        grown = config.max_position_embeddings / old
        yield "rope.scaling.attn_factor", math.sqrt(1 + math.log(grown) / math.log(old))


def _windows(config: Any, entry: Known) -> Iterator[tuple[str, Any]]:
    """The window of layers that do not attend to all positions, in the rhythm llama.cpp knows."""
    window = vars(config).get("sliding_window")
    kinds = vars(config).get("layer_types") or []
    narrow = [kind == "sliding_attention" for kind in kinds]
    if entry.name == "phi3":
        yield "attention.sliding_window", 0 if window is None else int(window)
    if not window or not any(narrow) or window >= config.max_position_embeddings:
        if entry.period:
            yield "attention.sliding_window", int(config.max_position_embeddings)
        return
    fits = [p for p in range(2, len(narrow) + 2) if narrow == _rhythm(p, len(narrow))]
    chosen = entry.period if entry.period in fits else next(iter(fits), 0)
    if not entry.period or not chosen:
        raise LayerwiseError(
            "target gguf, layer_types",
            allowed=f"windows in a rhythm that {entry.name} has in llama.cpp",
            found=" ".join("window" if n else "all" for n in narrow[:12]),
            fix="keep whole periods of layers, or use --target hf",
        )
    yield "attention.sliding_window", int(window)
    if chosen != entry.period:
        yield "attention.sliding_window_pattern", chosen


def _rhythm(period: int, count: int) -> list[bool]:
    return [i % period < period - 1 for i in range(count)]


def rope_factors(config: Any) -> dict[str, Tensor]:
    """Tensors that llama.cpp divides rotary frequencies by, where they are scaled one by one."""
    rope, size = rope_of(config), head_size(config)
    if rope.get("rope_type") == "longrope":
        return {
            f"rope_factors_{k}.weight": torch.tensor(rope[f"{k}_factor"]) for k in ("long", "short")
        }
    if rope.get("rope_type") != "llama3":
        return {}
    steps = torch.arange(0, size, 2, dtype=torch.float32) / size
    length = 2 * math.pi * rope["rope_theta"] ** steps
    old, low, high = (
        rope[k] for k in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor")
    )
    smooth = ((old / length - low) / (high - low)).clamp(0, 1)
    return {"rope_freqs.weight": 1 / ((1 - smooth) / rope["factor"] + smooth)}
