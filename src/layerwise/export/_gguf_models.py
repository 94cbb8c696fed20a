"""Which architectures GGUF knows, and what it calls them and their tensors.

The names of tensors come from the `gguf` package.
"""

import math
from functools import reduce
from itertools import product
from typing import Any, NamedTuple

from layerwise.core.errors import LayerwiseError, nearest
from layerwise.core.ggml import needing_gguf
from layerwise.core.network import Network


class Known(NamedTuple):
    """An architecture of GGUF, and what llama.cpp expects of its weights."""

    name: str
    #: rows of queries and keys go from two halves per head, as transformers rotates them, to pairs
    halves: bool = False
    #: fused rows of queries, keys and values come head by head
    woven: bool = False
    #: added to the weights of norms
    shift: float = 0.0
    #: every n-th layer attends to all positions, the others to a window
    period: int = 0
    #: it is the first of each n that attends to all positions
    first: bool = False
    #: llama.cpp looks for windows at this depth only
    depth: int = 0
    #: which layers have a window is said for each
    listed: bool = False
    #: heads of layers with a window have a size of their own
    sized: bool = False
    #: a window is asked for: 0 where there is none
    asked: bool = False
    #: the architecture whose names its tensors have, or have as well
    like: str = ""
    #: two tensors make keys and values of what is compressed, that of keys transposed
    absorbed: bool = False
    #: of the multiplier of yarn's logarithm, a tenth is written
    tenth: bool = False
    #: a tensor without a suffix
    bare: str = ""
    #: its name where it has experts
    routed: str = ""
    #: rows of gate and up take turns
    paired: bool = False
    #: recurrences have a number per head, as a column, and a norm per group
    columns: bool = False
    #: of linear attention, the first heads of values of all heads of keys come first, then the
    #: second ones; transformers puts those of one head of keys together
    tiled: bool = False
    #: positions begin behind the padding token's number: rows of the table before that are left out
    padded: bool = False
    #: llama.cpp takes its GELU from a table in half precision
    rough: bool = False
    #: tensors that llama.cpp loads for every layer, though it has no use for those that some lack
    filled: tuple[str, ...] = ()
    #: beginnings of the names of tensors that the format has no place for, nor any need
    without: tuple[str, ...] = ()


_KEYS_AND_VALUES = ("attn_k.weight", "attn_k_norm.weight", "attn_v.weight")
#: model_type of a configuration -> what GGUF calls it, and what llama.cpp expects of its weights
KNOWN = {
    # queries and keys are rotated as they are, or not at all
    "apertus": Known("apertus"),
    "cohere": Known("command-r"),
    "ernie4_5": Known("ernie4_5"),
    "glm": Known("chatglm"),
    "glm4": Known("glm4"),
    "gpt2": Known("gpt2"),
    "helium": Known("llama"),
    "hunyuan_v1_dense": Known("hunyuan-dense"),
    "jais2": Known("jais2"),
    "minicpm3": Known("minicpm3"),
    "mpt": Known("mpt"),
    "olmo2": Known("olmo2"),
    "phi": Known("phi2"),
    "phi3": Known("phi3", asked=True),
    "qwen2": Known("qwen2"),
    "qwen3": Known("qwen3"),
    "seed_oss": Known("seed_oss"),
    "stablelm": Known("stablelm"),
    "starcoder2": Known("starcoder2"),
    # queries and keys are rotated in halves by transformers, in pairs by llama.cpp
    "arcee": Known("arcee", halves=True),
    "cwm": Known("llama", halves=True),
    "granite": Known("granite", halves=True),
    "internlm3": Known("llama", halves=True),
    "iquestcoder": Known("llama", halves=True),
    "llama": Known("llama", halves=True),
    "ministral": Known("llama", halves=True),
    "ministral3": Known("mistral3", halves=True),
    "mistral": Known("llama", halves=True),
    "olmo": Known("olmo", halves=True),
    "smollm3": Known("smollm3", halves=True),
    # one matrix holds queries, keys and values head by head
    "bloom": Known("bloom", woven=True),
    "falcon": Known("falcon", woven=True),
    "gpt_bigcode": Known("starcoder"),
    "gpt_neox": Known("gptneox", woven=True),
    # norms multiply with 1 + their weight
    "gemma": Known("gemma", shift=1.0),
    "gemma2": Known("gemma2", shift=1.0, period=2),
    "gemma3_text": Known("gemma3", shift=1.0, period=6),
    "nemotron": Known("nemotron", shift=1.0),
    # windows, and layers that see everything
    "cohere2": Known("cohere2", period=4),
    "granite_swa": Known("granite_swa", halves=True, listed=True, like="mimo2"),
    "exaone4": Known("exaone4", period=4, depth=64),
    "gemma3n_text": Known("gemma3n", period=5, filled=_KEYS_AND_VALUES),
    "gemma4_text": Known("gemma4", listed=True, sized=True),
    "olmo3": Known("olmo2", period=4),
    # experts
    "afmoe": Known("afmoe", period=4),
    "cohere2_moe": Known("cohere2moe", listed=True, like="dots1"),
    "deepseek_v2": Known("deepseek2", tenth=True),
    "deepseek_v3": Known("deepseek2", tenth=True),
    "deepseek_v32": Known("deepseek32", tenth=True, absorbed=True, like="glm-dsa"),
    "dots1": Known("dots1"),
    "ernie4_5_moe": Known("ernie4_5-moe"),
    "exaone_moe": Known("exaone-moe", period=4),
    "glm4_moe": Known("glm4moe"),
    "glm4_moe_lite": Known("deepseek2", tenth=True),
    "glm_moe_dsa": Known("glm-dsa", tenth=True, absorbed=True),
    "gpt_oss": Known("gpt-oss", period=2, paired=True),
    "granitemoe": Known("granitemoe", halves=True),
    "granitemoe_swa": Known("granite_swa", halves=True, listed=True, like="mimo2"),
    "granitemoeshared": Known("granitemoe", halves=True),
    "hunyuan_v1_moe": Known("hunyuan-moe"),
    "hy_v3": Known("hy_v3", like="dots1", bare="exp_probs_b"),
    "laguna": Known("laguna", period=4, first=True, asked=True, like="step35"),
    "llama4_text": Known("llama4"),
    "mellum": Known("mellum", listed=True, like="qwen3moe"),
    "mimo_v2_flash": Known("mimo2", listed=True),
    "minimax_m2": Known("minimax-m2"),
    "mistral4": Known("mistral4", tenth=True),
    "mixtral": Known("llama", halves=True),
    "olmoe": Known("olmoe"),
    "qwen2_moe": Known("qwen2moe"),
    "qwen3_moe": Known("qwen3moe"),
    "solar_open": Known("glm4moe"),
    "youtu": Known("deepseek2", tenth=True),
    # convolutions and recurrences
    "bamba": Known("granitehybrid", halves=True, columns=True),
    "falcon_h1": Known("falcon-h1", columns=True, bare="ffn_norm"),
    "falcon_mamba": Known("mamba"),
    "granitemoehybrid": Known("granitehybrid", halves=True, columns=True),
    "jamba": Known("jamba"),
    "kimi_linear": Known("kimi-linear", columns=True, absorbed=True),
    "lfm2": Known("lfm2"),
    "lfm2_moe": Known("lfm2moe"),
    "mamba": Known("mamba"),
    "mamba2": Known("mamba2", columns=True),
    "nemotron_h": Known("nemotron_h", columns=True, routed="nemotron_h_moe"),
    "qwen3_5_moe_text": Known("qwen35moe", shift=1.0, tiled=True),
    "qwen3_5_text": Known("qwen35", shift=1.0, tiled=True),
    "qwen3_next": Known("qwen3next", shift=1.0),
}

_POOLER = ("pooler.",)
#: the same of networks without a head, of which every token's last hidden state is the answer
ENCODERS = {
    "bert": Known("bert", rough=True, without=_POOLER),
    "camembert": Known("bert", rough=True, padded=True, without=_POOLER),
    "distilbert": Known("bert", rough=True),
    "eurobert": Known("eurobert"),
    "jina_embeddings_v3": Known("jina-bert-v3", rough=True, like="bert", without=_POOLER),
    "modernbert": Known("modern-bert", period=3, first=True),
    "nomic_bert": Known("nomic-bert", like="bert"),
    "roberta": Known("bert", rough=True, padded=True, without=_POOLER),
    "xlm-roberta": Known("bert", rough=True, padded=True, without=_POOLER),
}

#: a parameter that transformers fuses -> the names of what its rows hold, one after the other
FUSED = dict.fromkeys(("gate_up_proj", "input_linear"), ("gate_proj", "up_proj"))
FUSED |= {"conv1d": ("q_conv1d", "k_conv1d", "v_conv1d"), "kv_b_proj": ("k_b_proj", "v_b_proj")}
#: what keys are made by, where it is a tensor of its own
MAKES_KEYS = ".attn_k_b."
SUFFIXES = (".weight", ".bias", ".scale")
#: parameters of recurrences, which have a name of their own in GGUF
NUMBERS = (".A_log", ".D")
#: a parameter with one number -> the hyper-parameter that holds those of all layers
SINGLE = {f"mlp.act_fn.{name}": f"xielu.{name}" for name in ("alpha_p", "alpha_n", "beta", "eps")}
#: what transformers calls a part or a bias -> what the `gguf` package knows it as
_ALSO = {
    ".dt_bias": ".dt_proj.bias",
    "_bias": ".bias",
    ".block_sparse_moe.": ".mlp.",
    ".forget_gate.": ".",
    ".language_model.": ".",
    ".mixer.experts.": ".mlp.experts.",
    ".router.scale": ".router.proj.scale",
    ".router.per_expert_scale": ".experts.down_proj.scale",
    ".gate.moe_statics.": ".moe_statics.",
    **{
        f".{x}_projections.{n}.": f".{x}_projections."
        for n in range(3)
        for x in ("altup", "altup_unembed")
    },
}
#: an architecture that others are like -> what they call a part -> what it is called there
_AS_IN = {
    "bert": {
        "layers.": "encoder.layer.",
        ".self_attn.q_proj.": ".attention.self.query.",
        ".self_attn.k_proj.": ".attention.self.key.",
        ".self_attn.v_proj.": ".attention.self.value.",
        ".post_attention_layernorm.": ".attention.output.LayerNorm.",
        ".mlp.fc1.": ".intermediate.dense.",
        ".mlp.fc2.": ".output.dense.",
        ".post_mlp_layernorm.": ".output.LayerNorm.",
    }
}


def text_config(network: Network) -> Any:
    """The configuration of what reads and writes text, in one that also sees or hears."""
    return network.model.config.get_text_config(decoder=True)


def known(network: Network) -> Known:
    """What GGUF knows of a network.

    Raises:
        LayerwiseError: it does not know the architecture.
    """
    kind = str(text_config(network).model_type)
    found = {"causal": KNOWN, "embed": ENCODERS}.get(network.task, {}).get(kind)
    lists = {stack.container for stack in network.stacks}
    if found is None or len(lists) != 1:
        embeds = kind in ENCODERS
        raise LayerwiseError(
            "target gguf",
            allowed=f"encoders without a head, of type {', '.join(ENCODERS)}"
            if embeds
            else f"causal models of type {', '.join(KNOWN)}, encoders of {', '.join(ENCODERS)}",
            found=f"{kind}, {type(network.module).__name__}",
            fix="save it without its head: AutoModel.from_pretrained(FOLDER).save_pretrained(OTHER)"
            if embeds
            else nearest(kind, [*KNOWN, *ENCODERS], "use --target hf or compressed-tensors"),
        )
    if found.routed and any(".experts." in n for layer in network.layers() for n in layer.shapes):
        return found._replace(name=found.routed)
    return found


class Names:
    """From names in memory to names in GGUF, for one network."""

    def __init__(self, network: Network) -> None:
        with needing_gguf():
            from gguf import MODEL_ARCH_NAMES, TensorNameMap
        self.known = known(network)
        numbers = {name: number for number, name in MODEL_ARCH_NAMES.items()}
        kinds = (self.known.name, self.known.like)
        self._maps = [
            TensorNameMap(numbers[k], len(network.layers())) for k in kinds if k in numbers
        ]
        said = text_config(network).to_dict()
        parts = ("num_attention_heads", "qk_nope_head_dim", "v_head_dim", "kv_lora_rank")
        #: heads, numbers of a key and of a value that are made of what is compressed, and of that
        self.compressed = tuple(said.get(part, 0) for part in parts)
        self._groups = said.get("n_groups") or said.get("mamba_n_groups") or 1
        alone = not said.get("num_local_experts")
        shared = {".shared_mlp.": ".mlp." if alone else ".mlp.shared_mlp."}
        self._also = {**_ALSO, **shared, ".output_linear.": ".down_proj."}
        self._also |= _AS_IN.get(self.known.like, {})
        self._tokens = said.get("vocab_size", 0)
        self._padded = 1 + (said["pad_token_id"] or 0) if self.known.padded else 0

    def __call__(self, name: str) -> str:
        """The name of a tensor in GGUF, the first where it is cut.

        Raises:
            LayerwiseError: the format has no place for it.
        """
        return self.pieces(name)[0]

    def pieces(self, name: str) -> tuple[str, ...]:
        """Names in GGUF of the equal blocks of rows that a tensor is cut into; mostly one, none
        for a number that is a hyper-parameter.

        Raises:
            LayerwiseError: the format has no place for it.
        """
        if name.endswith(tuple(SINGLE)):
            return ()
        fused, parts = next((f for f in FUSED.items() if f".{f[0]}" in name), ("", ()))
        ways = ([name], [name.replace(fused, part) for part in parts])
        for names in ways[::-1] if self.known.absorbed else ways:
            found = [self._find(n) for n in names]
            if found and all(found):
                return tuple(filter(None, found))
        raise LayerwiseError(
            f"target gguf, architecture {self.known.name}",
            allowed="the tensors that GGUF has names for",
            found=name,
            fix="this variant of the architecture cannot be written; use --target hf",
        )

    def shape_of(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape under which a tensor is written, by its name in GGUF."""
        if self.known.columns and name.endswith((".ssm_a", ".ssm_d")):
            return (math.prod(shape), 1)
        if self.known.columns and name.endswith(".ssm_norm.weight"):
            return (self._groups, math.prod(shape) // self._groups)
        if ".ssm_conv1d_" in name:
            return (shape[0], 1, shape[-1])
        if self.known.absorbed and name.endswith((f"{MAKES_KEYS}weight", ".attn_v_b.weight")):
            heads, keys, values, rank = self.compressed
            return (heads, rank, keys) if MAKES_KEYS in name else (heads, values, rank)
        rows = shape[0] - self.unused(name)
        return (rows + self.repeated(name, rows), *shape[1:])

    def unused(self, name: str) -> int:
        """Rows that a tensor, by its name in GGUF, begins with and that no token comes to."""
        return self._padded if name == "position_embd.weight" else 0

    def repeated(self, name: str, rows: int) -> int:
        """Rows that a tensor, by its name in GGUF, has for tokens that its first one stands for."""
        return self._tokens - rows if name == "per_layer_token_embd.weight" else 0

    def _find(self, name: str) -> str | None:
        """One name; some are known without that of the base model, parameters of experts bare."""
        also = reduce(lambda n, pair: n.replace(*pair), self._also.items(), name)
        rest = also.partition(".")[2]
        tries = (also, name, name.partition(".")[2], f"backbone.{rest}")
        for names, tried in product(self._maps, tries):
            found = names.get_name(tried, try_suffixes=SUFFIXES)
            if found is not None:
                bare = found.endswith(SUFFIXES) or name.endswith(NUMBERS)
                full = found if bare else f"{found}.{'bias' if name[-5:] == '_bias' else 'weight'}"
                stem = full.rpartition(".")[0]
                return stem if stem.endswith(f".{self.known.bare}") else full
        return None
