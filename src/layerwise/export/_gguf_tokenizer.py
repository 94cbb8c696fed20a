"""A tokenizer as GGUF holds it: tokens, kinds, merges or scores, and what marks the ends."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from layerwise.core.errors import notice

TOKENS = "tokenizer.ggml.tokens"
#: kinds of tokens
_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = range(1, 7)


def tokenizer_entries(folder: Path, rows: int) -> dict[str, Any]:
    """Keys of GGUF and their values; a vocabulary without tokens where no tokenizer lies there.

    Args:
        folder: of the model.
        rows: of its embedding; tokens are padded to as many.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        notice(f"{folder} has no tokenizer.json: the GGUF file takes token numbers only")
        return {"tokenizer.ggml.model": "no_vocab"}
    found = json.loads(path.read_text(encoding="utf-8"))
    model = found["model"]
    if model["type"] not in ("BPE", "Unigram"):
        notice(f"llama.cpp has no {model['type']} tokenizer: the file takes token numbers only")
        return {"tokenizer.ggml.model": "no_vocab"}
    tokens, kinds = _tokens(found, rows)
    entries: dict[str, Any] = {TOKENS: tokens, "tokenizer.ggml.token_type": kinds}
    if model["type"] == "Unigram" or model.get("byte_fallback"):
        entries |= {"tokenizer.ggml.model": "llama", "tokenizer.ggml.pre": "default"}
        entries["tokenizer.ggml.scores"] = _scores(model, tokens)
        entries["tokenizer.ggml.add_space_prefix"] = _prefixes(found)
    else:
        entries |= {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": _splitter(found)}
        merges = model["merges"]
        entries["tokenizer.ggml.merges"] = [
            m if isinstance(m, str) else " ".join(m) for m in merges
        ]
    return entries | _ends(folder, tokens)


def _tokens(found: Mapping[str, Any], rows: int) -> tuple[list[str], list[int]]:
    model = found["model"]
    listed = enumerate(t for t, _ in model["vocab"]) if isinstance(model["vocab"], list) else None
    known = dict(listed) if listed else {i: t for t, i in model["vocab"].items()}
    added = {t["id"]: t for t in found.get("added_tokens", [])}
    known |= {number: t["content"] for number, t in added.items()}
    unknown = model.get("unk_token")
    tokens, kinds = [], []
    for number in range(max([rows, *(n + 1 for n in known)])):
        token = known.get(number, f"[PAD{number}]")
        kind = _NORMAL if number in known else _UNUSED
        if number in added:
            kind = _CONTROL if added[number]["special"] else _USER
        if model.get("byte_fallback") and token[:3] == "<0x" and len(token) == 6:
            kind = _BYTE
        if token == unknown or (isinstance(model["vocab"], list) and number == model.get("unk_id")):
            kind = _UNKNOWN
        tokens.append(token)
        kinds.append(kind)
    return tokens[:rows], kinds[:rows]


def _scores(model: Mapping[str, Any], tokens: list[str]) -> list[float]:
    """Log-probabilities, or how early a token is merged: both say which one is taken first."""
    if model["type"] == "Unigram":
        known = [score for _, score in model["vocab"]]
    else:
        ranks: dict[str, int] = {}
        for rank, merge in enumerate(model["merges"]):
            pair = merge.split(" ", 1) if isinstance(merge, str) else merge
            ranks.setdefault("".join(pair), rank)
        known = [-float(ranks.get(token, len(ranks))) for token in tokens]
    return (known + [-1e4] * len(tokens))[: len(tokens)]


def _prefixes(found: Mapping[str, Any]) -> bool:
    """Whether a space is put before a text."""
    said = json.dumps([found.get("normalizer"), found.get("pre_tokenizer")])
    return '"Prepend"' in said or '"add_prefix_space": true' in said or '"always"' in said


def _splitter(found: Mapping[str, Any]) -> str:
    """llama.cpp's name of the pattern that cuts text into words, told by how it cuts numbers."""
    said = json.dumps(found.get("pre_tokenizer") or {})
    if '"Split"' not in said and '"use_regex": true' in said:
        return "gpt-2"
    if "{1,3}" in said:
        return "llama-bpe"
    return "qwen2" if "\\\\p{N}" in said else "default"


def _ends(folder: Path, tokens: list[str]) -> dict[str, Any]:
    """Tokens with a meaning, whether they are put around a text, and the chat template."""
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    entries: dict[str, Any] = {}
    named = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding", "sep": "seperator"}
    for kind, key in named.items():
        token = loaded.special_tokens_map.get(f"{kind}_token")
        number = loaded.convert_tokens_to_ids(token) if token else len(tokens)
        if number < len(tokens):
            entries[f"tokenizer.ggml.{key}_token_id"] = number
    ids = loaded("a")["input_ids"]
    entries["tokenizer.ggml.add_bos_token"] = bool(ids) and ids[0] == loaded.bos_token_id
    entries["tokenizer.ggml.add_eos_token"] = len(ids) > 1 and ids[-1] == loaded.eos_token_id
    if isinstance(loaded.chat_template, str):
        entries["tokenizer.chat_template"] = loaded.chat_template
    return entries
