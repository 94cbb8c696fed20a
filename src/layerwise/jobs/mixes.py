"""llama.cpp's own mixtures of types, as plans: what its users get without a planner."""

from collections.abc import Callable, Iterator

from layerwise.core.errors import LayerwiseError, nearest
from layerwise.core.ggml import fitting
from layerwise.core.network import Network
from layerwise.core.plan import DataSpec, Edit, Plan, Step, chains_of
from layerwise.core.stack import Matrix
from layerwise.export import TARGETS
from layerwise.export._gguf_models import text_config
from layerwise.export._gguf_names import Names
from layerwise.jobs.request import identity

#: a tensor's kind, its layer, how many layers there are, query heads per key -> its type
Rule = Callable[[str, int, int, int], str]


def _more(i: int, n: int) -> bool:
    """The layers that llama.cpp gives more bits: the ends, and every third between."""
    return i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2


def _q2_k(kind: str, i: int, n: int, shared: int) -> str:
    if kind in ("attn_v", "attn_qkv"):
        return "Q4_K" if shared >= 4 else "Q3_K"
    return "Q3_K" if kind in ("attn_output", "ffn_down") else "Q2_K"


def _q3_k_m(kind: str, i: int, n: int, shared: int) -> str:
    if kind in ("attn_v", "attn_qkv"):
        return "Q5_K" if i < 2 else "Q4_K"
    if kind == "ffn_down":
        return "Q5_K" if i < n // 16 else "Q4_K"
    return "Q4_K" if kind == "attn_output" else "Q3_K"


def _q4_k_m(kind: str, i: int, n: int, shared: int) -> str:
    raised = kind in ("attn_v", "attn_qkv", "ffn_down") and _more(i, n)
    return "Q6_K" if raised else "Q4_K"


#: from the largest to the smallest; the types of an embedding that is not tied
MIXES: dict[str, tuple[Rule, str]] = {
    "Q4_K_M": (_q4_k_m, "Q4_K"),
    "Q3_K_M": (_q3_k_m, "Q3_K"),
    "Q2_K": (_q2_k, "Q2_K"),
}


def mix_plan(network: Network, name: str, data: DataSpec = DataSpec()) -> Plan:
    """The plan that is what `llama-quantize` makes of a model under the name of a mixture.

    Args:
        network: the model.
        name: Q2_K, Q3_K_M or Q4_K_M.
        data: what importance is measured on.

    Raises:
        LayerwiseError: there is no mixture of that name.

    Reference: llama.cpp, llama-quant.cpp, without its exceptions for 8 experts, 70B and Falcon.
    """
    if name not in MIXES:
        raise LayerwiseError(
            "mixture of llama.cpp",
            allowed=", ".join(MIXES),
            found=name,
            fix=nearest(name, MIXES, "choose one of these"),
        )
    rule, embedding = MIXES[name]
    tied = "lm_head.weight" in (network.model.all_tied_weights_keys or {})
    edits = [Edit(m.key, (Step("ggml", {"type": t}),)) for m, t in _types(network, rule)]
    return Plan(
        model=identity(network),
        target="gguf",
        data=data,
        edits=tuple(edits),
        export={"embedding": "Q6_K" if tied else embedding, "output": "Q6_K"},
    )


def _types(network: Network, rule: Rule) -> Iterator[tuple[Matrix, str]]:
    names, config = Names(network), text_config(network)
    keys = vars(config).get("num_key_value_heads") or config.num_attention_heads
    shared, layers = config.num_attention_heads // keys, network.layers()
    for i, layer in enumerate(layers):
        for matrix in layer.matrices:
            kind = names(f"{layer.path}.{matrix.parameter}").split(".")[2]
            wanted = rule(kind, i, len(layers), shared)
            yield matrix, fitting(wanted, matrix.shape[1]).name


def written_bytes(network: Network, plan: Plan) -> int:
    """Bytes of all tensors of a plan's GGUF file."""
    target, size = TARGETS["gguf"], network.stored.dtype.itemsize
    inside = (m for layer in network.layers() for m in layer.matrices)
    assert target.rest is not None
    chain_of = chains_of(plan.edits)
    return target.rest(network, plan.export) + sum(
        target.nbytes(m, chain_of(m), size) for m in inside
    )
