"""What all tests share: shapes and types are checked at run time, models are tiny and made here."""

import os

# before torch starts its threads, and for processes that tests start: workers share the cores
os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"  # nor does transformers need threads for tiny weights

import sys
from collections.abc import Callable
from importlib import import_module
from inspect import isfunction
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

import jaxtyping
import pytest
import scipy.stats  # noqa: F401 - what is imported beneath the hook below is compiled each time
import torch
import transformers.conversion_mapping
import transformers.modeling_utils
from beartype import BeartypeConf, beartype
from hypothesis import settings


def _shaped(hint: Any) -> bool:
    """Whether an annotation names the sizes of an array, or is a word that may."""
    array = isinstance(hint, type) and issubclass(hint, jaxtyping.AbstractArray)
    inner = hint if isinstance(hint, list) else get_args(hint)
    return array or isinstance(hint, str) or any(map(_shaped, inner))


def _jaxtyped(*, typechecker: Any, whole: Any = jaxtyping.jaxtyped) -> Callable[[Any], Any]:
    """Sizes are compared within calls that name some; elsewhere that costs time and checks nothing."""

    def decorate(item: Any) -> Any:
        if isfunction(item) and not any(map(_shaped, item.__annotations__.values())):
            return typechecker(item)
        return whole(typechecker=typechecker)(item)

    return decorate


# beartype, but an int is good where a float is asked for; the hook takes it by name only
sys.modules["typecheck"] = ModuleType("typecheck")
sys.modules["typecheck"].check = beartype(conf=BeartypeConf(is_pep484_tower=True))  # type: ignore[attr-defined]
jaxtyping.install_import_hook("layerwise", "typecheck.check")
jaxtyping.jaxtyped = _jaxtyped  # the hook looks it up there
import_module("layerwise.families")  # the registry is complete before tests are collected
torch.set_num_threads(1)
settings.register_profile(
    "layerwise", deadline=None, derandomize=True, database=None, max_examples=50
)
settings.load_profile("layerwise")

VOCABULARY = 128
TEXT = """
def total(values, start=0):
    for value in values:
        start += value
    return start

The layers of a network are links of a chain: what one returns, the next receives.
"""


def _config(kind: str) -> Any:
    """Three or four layers of width 64; hidden sizes that differ wherever the model allows it."""
    t = transformers
    common = {"vocab_size": VOCABULARY, "hidden_size": 64, "initializer_range": 0.1}
    llama = common | {
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
    }
    few = {"num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 512}
    gpt2 = {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 512}
    experts = {"num_hidden_layers": 3, "num_local_experts": 4, "num_experts_per_tok": 2}
    makers: dict[str, Callable[[], Any]] = {
        "llama": lambda: t.LlamaConfig(**llama, tie_word_embeddings=True),
        "mixtral": lambda: t.MixtralConfig(**llama | experts),
        "dbrx": lambda: t.DbrxConfig(
            **{"vocab_size": VOCABULARY, "d_model": 64, "n_layers": 3, "n_heads": 4},
            attn_config={"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
            ffn_config=dict(hidden_size=64, ffn_hidden_size=96, moe_num_experts=4, moe_top_k=2),
            initializer_range=0.1,
        ),
        "gpt2": lambda: t.GPT2Config(**common, **gpt2),
        "opt": lambda: t.OPTConfig(**common, **few, ffn_dim=96, word_embed_proj_dim=64),
        "falcon": lambda: t.FalconConfig(**common, **few),
        "neox": lambda: t.GPTNeoXConfig(**common, **few, intermediate_size=96),
        "mamba": lambda: t.MambaConfig(**common, num_hidden_layers=3, state_size=8),
    }
    return makers[kind]()


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    plain = Tokenizer(models.BPE(unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.decoder = decoders.ByteLevel()
    # the byte-level alphabet moves control characters and the space up by 256
    ascii_bytes = [chr(b) for b in range(33, 127)] + [chr(256 + b) for b in (9, 10, 13, 32)]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        initial_alphabet=ascii_bytes,
        special_tokens=["<unk>", "<s>", "</s>"],
        show_progress=False,
    )
    plain.train_from_iterator([TEXT] * 3, trainer)
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=plain, **names)


@pytest.fixture(scope="session")
def tokenizer_into() -> Callable[[Path], None]:
    """Put a byte-level tokenizer of at most 128 tokens into a model folder."""
    tokenizer = _tokenizer()
    return lambda folder: tokenizer.save_pretrained(folder) and None


@pytest.fixture(scope="session")
def tiny(
    tmp_path_factory: pytest.TempPathFactory, tokenizer_into: Callable[[Path], None]
) -> Callable[..., Path]:
    """`tiny(kind, dtype)`: the folder of a tiny random model with a tokenizer, made once.

    Kinds: llama (grouped heads, tied), mixtral, dbrx, gpt2, opt, falcon, neox, mamba; `dtype` is
    `float32` or `bfloat16`. Only read the folder; it is shared.
    """
    made: dict[tuple[str, str], Path] = {}

    def make(kind: str, dtype: str = "float32") -> Path:
        if (kind, dtype) not in made:
            from transformers import AutoModelForCausalLM

            folder = tmp_path_factory.mktemp(f"{kind}-{dtype}")
            with torch.random.fork_rng():
                torch.manual_seed(0)
                model = AutoModelForCausalLM.from_config(_config(kind))
            model.to(getattr(torch, dtype)).save_pretrained(folder)
            tokenizer_into(folder)
            made[kind, dtype] = folder
        return made[kind, dtype]

    return make
