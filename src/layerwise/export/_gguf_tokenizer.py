"""A tokenizer as GGUF holds it: tokens, kinds, merges or scores, and what marks the ends."""

import json
import re
from base64 import b64decode
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from layerwise.core.errors import notice

TOKENS = "tokenizer.ggml.tokens"
#: in front of a token that begins a word
_MARK = "\u2581"
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
    if model["type"] not in ("BPE", "Unigram", "WordPiece"):
        notice(f"llama.cpp has no {model['type']} tokenizer: the file takes token numbers only")
        return {"tokenizer.ggml.model": "no_vocab"}
    tokens, kinds = _tokens(found, rows)
    entries: dict[str, Any] = {TOKENS: tokens, "tokenizer.ggml.token_type": kinds}
    if model["type"] == "WordPiece":
        entries |= _words(found, tokens, kinds)
    elif model["type"] == "Unigram" and not model.get("byte_fallback"):
        entries |= _pieces(found, tokens)
    elif model.get("byte_fallback"):
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


def _words(found: Mapping[str, Any], tokens: list[str], kinds: list[int]) -> dict[str, Any]:
    """WordPiece: what begins a word has a mark, not what goes on with it."""
    goes_on = found["model"]["continuing_subword_prefix"]
    written = []
    for token, kind in zip(tokens, kinds, strict=True):
        begins = kind not in (_UNKNOWN, _CONTROL) and not token.startswith(goes_on)
        written.append(_MARK + token if begins else token.removeprefix(goes_on))
    said = found.get("normalizer") or {}
    lower = bool(said.get("lowercase"))
    strips = said.get("strip_accents")
    return {
        "tokenizer.ggml.model": "bert",
        TOKENS: written,
        "tokenizer.ggml.normalizer.lowercase": lower,
        "tokenizer.ggml.normalizer.strip_accents": lower if strips is None else bool(strips),
    }


def _pieces(found: Mapping[str, Any], tokens: list[str]) -> dict[str, Any]:
    """Unigram: the likeliest pieces, after characters are mapped to what they are written as."""
    said = json.dumps([found.get("normalizer"), found.get("pre_tokenizer")])
    entries = {
        "tokenizer.ggml.model": "t5",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.scores": _scores(found["model"], tokens),
        "tokenizer.ggml.add_space_prefix": _prefixes(found),
        "tokenizer.ggml.remove_extra_whitespaces": '"WhitespaceSplit"' in said or " {2,}" in said,
    }
    mapped = next(iter(re.findall(r'"precompiled_charsmap": "([^"]+)"', said)), "")
    return entries | ({"tokenizer.ggml.precompiled_charsmap": b64decode(mapped)} if mapped else {})


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
    """Tokens with a meaning, whether they are put around a text, and the chat template.

    What encoders put around a text, [CLS] and [SEP], begins and ends it where nothing else does.
    """
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    entries: dict[str, Any] = {}
    named = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding", "sep": "seperator"}
    named |= {"cls": "cls", "mask": "mask"}
    held = loaded.special_tokens_map
    instead = {"bos": held.get("cls_token"), "eos": held.get("sep_token")}
    for kind, key in named.items():
        token = held.get(f"{kind}_token") or instead.get(kind)
        number = loaded.convert_tokens_to_ids(token) if token else len(tokens)
        if number < len(tokens):
            entries[f"tokenizer.ggml.{key}_token_id"] = number
    ids = loaded("a")["input_ids"]
    first, last = (entries.get(f"tokenizer.ggml.{end}_token_id") for end in ("bos", "eos"))
    entries["tokenizer.ggml.add_bos_token"] = bool(ids) and ids[0] == first
    entries["tokenizer.ggml.add_eos_token"] = len(ids) > 1 and ids[-1] == last
    if isinstance(loaded.chat_template, str):
        entries["tokenizer.chat_template"] = loaded.chat_template
    return entries
