"""What GGUF calls the tensors of an architecture; names come from the `gguf` package."""

import math
from functools import reduce
from itertools import product

from layerwise.core.errors import LayerwiseError
from layerwise.core.ggml import needing_gguf
from layerwise.core.network import Network
from layerwise.export._gguf_models import known, text_config

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
        scaled = said.get(self.known.scaled)
        #: what the norm in front of the head is multiplied with
        self.scale = text_config(network).hidden_size ** -0.5 if scaled else 1.0
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
        tries = (also, name, name.partition(".")[2], f"backbone.{rest}", f"model.{also}")
        for names, tried in product(self._maps, tries):
            found = names.get_name(tried, try_suffixes=SUFFIXES)
            if found is not None:
                bare = found.endswith(SUFFIXES) or name.endswith(NUMBERS)
                full = found if bare else f"{found}.{'bias' if name[-5:] == '_bias' else 'weight'}"
                stem = full.rpartition(".")[0]
                return stem if stem.endswith(f".{self.known.bare}") else full
        return None
