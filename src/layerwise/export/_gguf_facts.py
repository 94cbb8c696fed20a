"""The hyper-parameters of a GGUF file, read from a model's configuration."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from layerwise.core.errors import LayerwiseError
from layerwise.core.network import Network
from layerwise.core.stack import Layer
from layerwise.export._gguf_embedding import embedding_facts
from layerwise.export._gguf_fields import (
    CHOSEN,
    CONSTANT,
    LIMITS,
    OWN,
    REAL,
    SCORES,
    TRUTH,
    WHOLE,
    YARN,
)
from layerwise.export._gguf_models import Known, known, text_config
from layerwise.export._gguf_names import SINGLE, Names

#: positions where a model does not limit them
UNBOUND = 2048
#: llama.cpp looks for a token where the model is called so, and stops if it is missing
NAMED = {"phi": "<|endoftext|>"}


def head_size(config: Any) -> int:
    """Width of an attention head."""
    own = vars(config).get(config.attribute_map.get("head_dim", "head_dim"))
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
    config, entry, said = text_config(network), known(network), _said(network)
    _must_hold(config, entry)
    depths = Counter(layer.path.rpartition(".")[0] for layer in network.layers()).values()
    keys = ("block_count", "decoder_block_count")
    found: dict[str, Any] = {"context_length": UNBOUND, **dict(zip(keys, depths, strict=False))}
    found |= {**dict(_fields(network)), **constants(network)}
    size = said.get("qk_rope_head_dim") or (head_size(config) if _heads(said) else 0)
    found |= dict(_attention(network, size)) | dict(_rotary(config, size))
    found |= dict(_windows(config, entry))
    deep = vars(vars(network.model.config).get("vision_config") or config)
    if "deepstack_visual_indexes" in deep:
        found["n_deepstack_layers"] = len(deep["deepstack_visual_indexes"])
    if "position_embedding_type" in said:
        found["rope.scaling.finetuned"] = said["position_embedding_type"] == "rope"
    if said.get("indexer_types"):
        found["attention.indexer.types"] = [int(kind == "full") for kind in said["indexer_types"]]
    if entry.tenth and YARN["mscale_all_dim"] in found:
        found[YARN["mscale_all_dim"]] /= 10
    found |= embedding_facts(network)
    return found | (_by_kind(network) if entry.sized else {})


def _must_hold(config: Any, entry: Known) -> None:
    for field, allowed, holds in LIMITS.get(config.model_type, ()):
        if not holds(config):
            raise LayerwiseError(
                f"target gguf, {field}",
                allowed=f"{allowed}, as {entry.name} has it in llama.cpp",
                found=vars(config)[field],
                fix="use --target hf",
            )


def _said(network: Network) -> dict[str, Any]:
    """The fields of the configuration, by its own names and by those that it shares with others."""
    config = text_config(network)
    said = config.to_dict()
    said |= (said.get("attn_config") or {}) | (said.get("ffn_config") or {})
    return {f: said[own] for f, own in config.attribute_map.items() if own in said} | said


def _heads(said: Mapping[str, Any]) -> int:
    return said.get("num_attention_heads") or 0


def _fields(network: Network) -> Iterator[tuple[str, Any]]:
    """What is a field of the configuration."""
    said = _said(network)
    whole = WHOLE | OWN.get(text_config(network).model_type, {})
    for kinds, to in ((whole, int), (REAL, float), (TRUTH, bool), (CHOSEN, SCORES.get)):
        for key, fields in kinds.items():
            value = next((said[f] for f in fields if said.get(f) is not None), None)
            if value is not None:
                yield key, to(value)


def _attention(network: Network, size: int) -> Iterator[tuple[str, Any]]:
    """How many heads there are and how wide they are; a list where layers differ.

    Args:
        network: with these heads.
        size: numbers of a head that may be rotated.
    """
    entry, said, layers = known(network), _said(network), network.layers()
    heads = _heads(said)
    yield "attention.head_count", heads
    yield "attention.head_count_kv", said.get("num_key_value_heads") or heads
    wide = said.get("qk_nope_head_dim", 0) + size
    values = said.get("v_head_dim") or size
    if entry.absorbed:  # attention goes over what is compressed
        rank, of = said["kv_lora_rank"], [_rows(layer, ".kv_b_proj.weight") for layer in layers]
        yield from _widths(rank + size, rank)
        yield from _widths(wide, values, "_mla")
        yield "attention.head_count_kv", [min(rows, 1) for rows in of]
        return
    if heads:
        yield from _widths(wide, values)
    queries, keys = (
        [_rows(layer, f".{x}_proj.weight") // max(size, 1) for layer in layers] for x in "qk"
    )
    if len({*filter(None, queries)}) > 1 and not entry.sized:
        yield "attention.head_count", queries
    if len(set(keys)) > 1 and "linear_num_key_heads" not in said and not entry.filled:
        yield "attention.head_count_kv", keys  # convolutions and recurrences have none


def _widths(keys: int, values: int, end: str = "") -> Iterator[tuple[str, int]]:
    yield f"attention.key_length{end}", keys
    yield f"attention.value_length{end}", values


def _rows(layer: Layer, end: str) -> int:
    """Rows of a layer's matrix whose name ends so, 0 where there is none."""
    return next((shape[0] for name, shape in layer.shapes.items() if name.endswith(end)), 0)


def numbers(network: Network) -> Iterator[tuple[str, list[float]]]:
    """Hyper-parameters that are parameters with one number; their keys have no prefix."""
    layers = network.layers()
    for name, key in SINGLE.items():
        if name in layers[0].module.state_dict():
            paths = [f"{network.origins.get(layer.path, layer.path)}.{name}" for layer in layers]
            yield key, [float(network.stored.load(path)[path]) for path in paths]


def constants(network: Network) -> Mapping[str, Any]:
    """Hyper-parameters that are a constant of the model's code."""
    return CONSTANT.get(text_config(network).model_type, {})


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


def rope_of(config: Any, kind: str = "full_attention") -> Mapping[str, Any]:
    """The rotary parameters of layers of a kind; those that attend to all positions mostly.

    Where these are not rotated, those of the others.
    """
    found = vars(config).get("rope_parameters") or {}
    others = (value for value in found.values() if isinstance(value, dict))
    return found.get(kind) or next(others, found)


def turned(config: Any, size: int, kind: str = "full_attention") -> int:
    """How many numbers of a head of that size are rotated, in layers of a kind."""
    if "qk_rope_head_dim" in vars(config):
        return size
    said = (fields.get("partial_rotary_factor") for fields in (rope_of(config, kind), vars(config)))
    return int(size * (next(filter(None, said), None) or 1.0))


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
    each = vars(config).get("layer_rope_theta") or [rope["rope_theta"]]
    yield "rope.freq_base", float(max(each))
    if min(each) == 0:
        yield "attention.rope_pattern", [theta > 0 for theta in each]
    yield "rope.dimension_count", turned(config, size)
    if "mrope_section" in rope:  # of a text, all three positions are one
        yield "rope.dimension_sections", [*rope["mrope_section"], 0][:4]
    whole = vars(config).get("rope_parameters", {})
    if "sliding_attention" in whole:
        yield "rope.freq_base_swa", float(whole["sliding_attention"]["rope_theta"])
        yield "rope.dimension_count_swa", turned(config, size, "sliding_attention")
    old = rope.get("original_max_position_embeddings")
    old = old or vars(config).get("original_max_position_embeddings")
    if kind in ("linear", "yarn"):
        yield "rope.scaling.type", kind
        yield "rope.scaling.factor", float(rope["factor"])
    for field, key in YARN.items():
        if kind == "yarn" and rope.get(field) is not None:
            yield key, float(rope[field])
    if "llama_4_scaling_beta" in rope:
        yield "attention.temperature_length", int(old)
    if kind in ("yarn", "longrope") and old:
        yield "rope.scaling.original_context_length", int(old)
    if kind == "longrope":
        grown = config.max_position_embeddings / old
        yield "rope.scaling.attn_factor", math.sqrt(1 + math.log(grown) / math.log(old))


def _windows(config: Any, entry: Known) -> Iterator[tuple[str, Any]]:
    """The window of layers that do not attend to all positions, in the rhythm llama.cpp knows."""
    said = config.to_dict()  # a window on both sides is stored in another way than it is computed
    window = said.get("sliding_window") or said.get("local_attention")
    kinds = vars(config).get("layer_types") or []
    narrow = [kind == "sliding_attention" for kind in kinds]
    if entry.asked:
        yield "attention.sliding_window", int(window or 0) if any(narrow) or not kinds else 0
    if entry.listed:
        yield "attention.sliding_window", int(window or config.max_position_embeddings)
        yield "attention.sliding_window_pattern", narrow
        return
    wide = window and window >= config.max_position_embeddings and not entry.first
    if not window or not any(narrow) or wide:
        if entry.period and not entry.first:
            yield "attention.sliding_window", int(config.max_position_embeddings)
        return
    count, at = len(narrow), 0 if entry.first else -1
    fits = [p for p in range(2, count + 2) if narrow == [(i - at) % p > 0 for i in range(count)]]
    fits = fits if entry.depth in (0, count) else []
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
        pairs = turned(config, size) // 2
        return {"rope_freqs.weight": torch.tensor([1.0] * pairs + [1e30] * (size // 2 - pairs))}
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
