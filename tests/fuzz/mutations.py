"""Changes of meaning: an input is read, something in it is replaced, and it is written again."""

import json
import random
import struct
from collections.abc import Callable
from typing import Any

import yaml

#: what parsers do not expect where they expect something else
ODD: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 7, 2**31, 2**63, 2**64, -(2**63), 10**40, 0.0, 0.5, -1.5,
    1e308, float("nan"), float("inf"), "", "a", "0", "*", "decoder/*", "float16", "int8", "gptq",
    "rtn", "\ud800", "\0", "x" * 300, [], [0], [1, 2], [None], [[]], {}, {"a": 1}, {"": None},
    ["LlamaForCausalLM"], ["BertModel"], ["AutoModel"], "gpt2", "bert", "llama", {"layer": 0},
)  # fmt: skip

Codec = tuple[Callable[[bytes], Any], Callable[[Any], bytes]]


def _json(value: Any) -> bytes:
    return json.dumps(value).encode("utf-8", "surrogatepass")


def _split(content: bytes) -> Any:
    length = struct.unpack("<Q", content[:8])[0]
    return [json.loads(content[8 : 8 + length]), content[8 + length :].hex()]


def _join(value: Any) -> bytes:
    text = _json(value[0])
    return struct.pack("<Q", len(text)) + text + bytes.fromhex(str(value[1]))


CODECS: dict[str, Codec] = {
    "header": (_split, _join),
    "index": (json.loads, _json),
    "config": (json.loads, _json),
    "plan": (
        lambda content: yaml.safe_load(content.decode()),
        lambda value: yaml.safe_dump(value).encode("utf-8", "surrogatepass"),
    ),
    "rows": (
        lambda content: [json.loads(line) for line in content.splitlines() if line.strip()],
        lambda value: b"\n".join(map(_json, value)),
    ),
}


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) inside a value."""
    if isinstance(value, dict):
        found = [(value, key) for key in value]
    elif isinstance(value, list):
        found = [(value, key) for key in range(len(value))]
    else:
        return []
    return found + [place for holder, key in found for place in places(holder[key])]


def changed(name: str, content: bytes, seed: int, names: list[str]) -> bytes:
    """An input with one to three things replaced, added or taken away.

    Raises:
        Exception: the input cannot be read or written as what it is.
    """
    chance = random.Random(seed)
    read, write = CODECS[name]
    value = read(content)
    for _ in range(chance.randint(1, 3)):
        found = places(value)
        if not found:
            break
        holder, key = chance.choice(found)
        deed = chance.random()
        if deed < 0.2:
            del holder[key]
        elif deed < 0.4 and isinstance(holder, dict):
            holder[chance.choice(names)] = chance.choice(ODD)
        elif deed < 0.55:
            other, which = chance.choice(found)
            holder[key] = other[which] if which in other or isinstance(other, list) else None
        else:
            holder[key] = chance.choice(ODD)
    return write(value)
