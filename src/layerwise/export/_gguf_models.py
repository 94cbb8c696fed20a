"""Which architectures GGUF knows, and what llama.cpp expects of their weights."""

from typing import Any, NamedTuple

from layerwise.core.errors import LayerwiseError, nearest
from layerwise.core.network import Network


class Known(NamedTuple):
    """An architecture of GGUF, and what llama.cpp expects of its weights."""

    name: str
    #: rows of queries and keys go from two halves per head, as transformers rotates them, to pairs
    halves: bool = False
    #: they go from pairs, as transformers rotates them there, to two halves per head
    unpaired: bool = False
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
    #: the field that says that states are divided by the root of their width before the head
    scaled: str = ""
    #: llama.cpp asks for a head, of what embeds as well
    headed: bool = False
    #: tensors that llama.cpp loads for every layer, though it has no use for those that some lack
    filled: tuple[str, ...] = ()
    #: beginnings of the names of tensors that the format has no place for, nor any need
    without: tuple[str, ...] = ()


_KEYS_AND_VALUES = ("attn_k.weight", "attn_k_norm.weight", "attn_v.weight")
#: model_type of a configuration -> what GGUF calls it, and what llama.cpp expects of its weights
KNOWN = {
    # queries and keys are rotated as they are, or not at all
    "apertus": Known("apertus", headed=True),
    "cohere": Known("command-r"),
    "ernie4_5": Known("ernie4_5"),
    "glm": Known("chatglm"),
    "glm4": Known("glm4"),
    "glm4v_text": Known("glm4", unpaired=True),
    "glm_ocr_text": Known("glm4", unpaired=True),
    "gpt2": Known("gpt2"),
    "helium": Known("llama"),
    "hunyuan_v1_dense": Known("hunyuan-dense"),
    "hunyuan_vl_text": Known("hunyuan_vl"),
    "jais2": Known("jais2"),
    "minicpm3": Known("minicpm3"),
    "mpt": Known("mpt"),
    "olmo2": Known("olmo2", headed=True),
    "paddleocr_vl_text": Known("paddleocr"),
    "phi": Known("phi2", headed=True),
    "phi3": Known("phi3", asked=True),
    "qwen2": Known("qwen2"),
    "qwen2_5_vl_text": Known("qwen2vl"),
    "qwen2_vl_text": Known("qwen2vl"),
    "qwen3": Known("qwen3"),
    "qwen3_vl_text": Known("qwen3vl"),
    "seed_oss": Known("seed_oss"),
    "stablelm": Known("stablelm", headed=True),
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
    "nemotron": Known("nemotron", shift=1.0, headed=True),
    # windows, and layers that see everything
    "cohere2": Known("cohere2", period=4),
    "granite_swa": Known("granite_swa", halves=True, listed=True, like="mimo2"),
    "cohere_compass_text": Known("cohere2", period=4, halves=True),
    "exaone4": Known("exaone4", period=4, depth=64),
    "gemma3n_text": Known("gemma3n", period=5, filled=_KEYS_AND_VALUES),
    "gemma4_text": Known("gemma4", listed=True, sized=True),
    "gemma4_unified_text": Known("gemma4", listed=True, sized=True),
    "olmo3": Known("olmo2", period=4, headed=True),
    # experts
    "afmoe": Known("afmoe", period=4),
    "aria_text": Known("granitemoe", halves=True),
    "cohere2_moe": Known("cohere2moe", listed=True, like="dots1"),
    "dbrx": Known("dbrx", headed=True),
    "deepseek_v2": Known("deepseek2", tenth=True),
    "deepseek_v3": Known("deepseek2", tenth=True),
    "deepseek_v32": Known("deepseek32", tenth=True, absorbed=True, like="glm-dsa"),
    "dots1": Known("dots1", headed=True),
    "ernie4_5_moe": Known("ernie4_5-moe"),
    "exaone_moe": Known("exaone-moe", period=4, headed=True),
    "glm4_moe": Known("glm4moe"),
    "glm4v_moe_text": Known("glm4moe"),
    "glm4_moe_lite": Known("deepseek2", tenth=True),
    "glm_moe_dsa": Known("glm-dsa", tenth=True, absorbed=True),
    "gpt_oss": Known("gpt-oss", period=2, paired=True, headed=True),
    "granitemoe": Known("granitemoe", halves=True),
    "granitemoe_swa": Known("granite_swa", halves=True, listed=True, like="mimo2"),
    "granitemoeshared": Known("granitemoe", halves=True),
    "hunyuan_v1_moe": Known("hunyuan-moe"),
    "hy_v3": Known("hy_v3", like="dots1", bare="exp_probs_b"),
    "laguna": Known("laguna", period=4, first=True, asked=True, like="step35"),
    "llama4_text": Known("llama4"),
    "mellum": Known("mellum", listed=True, like="qwen3moe", headed=True),
    "mimo_v2_flash": Known("mimo2", listed=True, headed=True),
    "minimax_m2": Known("minimax-m2", headed=True),
    "mistral4": Known("mistral4", tenth=True),
    "mixtral": Known("llama", halves=True),
    "olmoe": Known("olmoe", headed=True),
    "qwen2_moe": Known("qwen2moe", headed=True),
    "qwen3_moe": Known("qwen3moe"),
    "qwen3_vl_moe_text": Known("qwen3vlmoe"),
    "solar_open": Known("glm4moe"),
    "youtu": Known("deepseek2", tenth=True),
    # convolutions and recurrences
    "bamba": Known("granitehybrid", halves=True, columns=True),
    "falcon_h1": Known("falcon-h1", columns=True, bare="ffn_norm"),
    "falcon_mamba": Known("mamba"),
    "granitemoehybrid": Known("granitehybrid", halves=True, columns=True),
    "jamba": Known("jamba"),
    "kimi_linear": Known("kimi-linear", columns=True, absorbed=True, headed=True),
    "lfm2": Known("lfm2"),
    "lfm2_moe": Known("lfm2moe"),
    "mamba": Known("mamba"),
    "mamba2": Known("mamba2", columns=True),
    "nemotron_h": Known("nemotron_h", columns=True, routed="nemotron_h_moe"),
    "qwen3_5_moe_text": Known("qwen35moe", shift=1.0, tiled=True),
    "qwen3_5_text": Known("qwen35", shift=1.0, tiled=True),
    "qwen3_next": Known("qwen3next", shift=1.0),
}

#: the same of an encoder and a decoder that looks at it
PAIRS = {
    "mt5": Known("t5", rough=True),
    "t5": Known("t5", rough=True, scaled="scale_decoder_outputs"),
    "umt5": Known("t5", rough=True, scaled="tie_word_embeddings"),
}

_POOLER = ("pooler.",)
#: the same of networks without a head whose tokens see all others; every token's last hidden state
#: is the answer, as it is for those without a head of the types above
ENCODERS = {
    "bert": Known("bert", rough=True, without=_POOLER),
    "camembert": Known("bert", rough=True, padded=True, without=_POOLER),
    "data2vec-text": Known("bert", rough=True, padded=True, without=_POOLER),
    "distilbert": Known("bert", rough=True),
    "electra": Known("bert", rough=True),
    "ernie": Known("bert", rough=True, without=_POOLER),
    "eurobert": Known("eurobert"),
    "gemma3_text": Known("gemma-embedding", shift=1.0, period=6, rough=True),
    "jina_embeddings_v3": Known("jina-bert-v3", rough=True, like="bert", without=_POOLER),
    "modernbert": Known("modern-bert", period=3, first=True),
    "nomic_bert": Known("nomic-bert", like="bert"),
    "roberta": Known("bert", rough=True, padded=True, without=_POOLER),
    "xlm-roberta": Known("bert", rough=True, padded=True, without=_POOLER),
}
ENCODERS |= dict.fromkeys(PAIRS, Known("t5encoder", rough=True))


def text_of(config: Any) -> Any:
    """The configuration of what reads and writes text, in one that also sees or hears."""
    found = config.get_text_config(decoder=True)  # of an encoder with a decoder, a changed copy
    return config if found.model_type == config.model_type else found


def text_config(network: Network) -> Any:
    """The configuration of what reads and writes text in a network."""
    return text_of(network.model.config)


def sees_all(network: Network) -> bool:
    """Whether tokens see those behind them as well."""
    return network.stack.name.startswith("encoder")


def known(network: Network) -> Known:
    """What GGUF knows of a network.

    Raises:
        LayerwiseError: it does not know the architecture.
    """
    kind = str(text_config(network).model_type)
    bare = ENCODERS if sees_all(network) else KNOWN
    found = {"causal": KNOWN, "embed": bare, "seq2seq": PAIRS}.get(network.task, {}).get(kind)
    lists = {stack.container for stack in network.stacks}
    if found is None or len(lists) != 1 + (network.task == "seq2seq"):
        embeds = kind in ENCODERS
        raise LayerwiseError(
            "target gguf",
            allowed=f"encoders without a head, of type {', '.join(ENCODERS)}"
            if embeds
            else f"causal models of type {', '.join(KNOWN)}, encoders of {', '.join(ENCODERS)}, "
            f"encoders with a decoder of {', '.join(PAIRS)}",
            found=f"{kind}, {type(network.module).__name__}",
            fix="save it without its head: AutoModel.from_pretrained(FOLDER).save_pretrained(OTHER)"
            if embeds
            else nearest(kind, [*KNOWN, *ENCODERS], "use --target hf or compressed-tensors"),
        )
    if found.headed and network.task == "embed":
        raise LayerwiseError(
            f"target gguf, architecture {found.name}",
            allowed="a network with its head, which llama.cpp asks for",
            found=type(network.module).__name__,
            fix="save it with the head that it was trained with, or use --target hf",
        )
    if found.routed and any(".experts." in n for layer in network.layers() for n in layer.shapes):
        return found._replace(name=found.routed)
    return found
