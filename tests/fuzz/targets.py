"""The parsers that read what others wrote: each takes any bytes, and answers or refuses.

A target gets bytes and a folder to work in. A `LayerwiseError` is an answer; anything else that
is raised is a crash.
"""

import json
import struct
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from safetensors.torch import save
from transformers import AutoModelForCausalLM, LlamaConfig

from layerwise.core.checkpoint import Checkpoint, read_header, read_tensor
from layerwise.core.data import documents
from layerwise.core.errors import LayerwiseError
from layerwise.core.open import open_network
from layerwise.core.plan import check_selectors, parse_plan, settings
from layerwise.core.stack import Matrix
from layerwise.core.visits import parse_wiring
from layerwise.jobs.session import parse_bytes, parse_share

TINY = LlamaConfig(
    vocab_size=32,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    max_position_embeddings=64,
    architectures=["LlamaForCausalLM"],
    dtype="float32",
)
MATRICES = [
    Matrix(f"decoder/{i}", part, role, f"{part}.{role}.weight", expert, (4, 4), False, "", "")
    for i in range(3)
    for part, role, expert in (("attention", "q", None), ("mlp", "down", None), ("mlp", "up", 1))
]


@cache
def stored() -> bytes:
    """The safetensors file of a tiny model."""
    model: Any = AutoModelForCausalLM.from_config(TINY)
    return save({k: v.contiguous() for k, v in model.state_dict().items()}, {"format": "pt"})


def header(content: bytes, folder: Path) -> None:
    """A safetensors file."""
    path = folder / "model.safetensors"
    path.write_bytes(content)
    for info in read_header(path).values():
        assert read_tensor(info).shape == info.shape


def index(content: bytes, folder: Path) -> None:
    """The index of a folder in shards."""
    text = b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'
    (folder / "one.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + b"1")
    (folder / "model.safetensors").unlink(missing_ok=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors.index.json").write_bytes(content)
    try:
        held = Checkpoint(folder)
        assert set(held.tensors) == {"a"} and len(held.structure) == 64
    finally:
        (folder / "model.safetensors.index.json").unlink()


def plan(content: bytes, folder: Path) -> None:
    """A plan, its selectors and its wiring; what is one can be written and read again."""
    found = parse_plan(content.decode("utf-8", "replace"))
    try:
        check_selectors(found, MATRICES)
        for order in found.wiring.values():
            parse_wiring(order, 3, "wiring")
    finally:
        assert repr(parse_plan(found.to_yaml())) == repr(found)


def rows(content: bytes, folder: Path) -> None:
    """Rows of data, and the same bytes as a text."""
    for name in ("rows.jsonl", "rows.txt"):
        (folder / name).write_bytes(content)
        for document in documents(folder / name):
            document.text.encode()


def config(content: bytes, folder: Path) -> None:
    """The configuration of a model folder with good weights."""
    (folder / "model.safetensors").write_bytes(stored())
    (folder / "config.json").write_bytes(content)
    assert open_network(folder, dtype="float32").layers()


def words(content: bytes, folder: Path) -> None:
    """What is typed as a budget or a setting."""
    text = content.decode("utf-8", "replace")
    for parse in (parse_bytes, lambda t: parse_share(t, "--size"), lambda t: settings([t])):
        try:
            parse(text)
        except LayerwiseError:
            continue


#: names of fields that a change may add
FIELDS = [*vars(LlamaConfig()), "auto_map", "quantization_config", "text_config", "copy", "layer"]
FIELDS += ["text", "messages", "target", "weight_map", "dtype", "shape", "data_offsets", "parallel"]
PLAN = b"""layerwise: 1
model: {structure: s, weights: w}
target: hf
budget: {bits: 3.5}
data: {source: stdlib, seed: 0, samples: 4, length: 64}
wiring: {decoder: [0, 1, 1, {layer: 2, copy: true}]}
edits:
- select: decoder/0-2/1/mlp.*
  chain: [{method: gptq, options: {bits: 3, group: 32}}]
  bytes: 12
  damage: 0.5
fixed: ["*/*/*.norm", head]
"""
ROWS = b'{"text": "a", "target": "b"}\n{"messages": [{"role": "user", "content": "hi"}]}\n\n'

#: name -> (what is run, inputs to begin with)
TARGETS: dict[str, tuple[Callable[[bytes, Path], None], Callable[[], list[bytes]]]] = {
    "header": (header, lambda: [stored()[:2048], save({}), index_file()]),
    "index": (index, lambda: [b'{"metadata": {}, "weight_map": {"a": "one.safetensors"}}']),
    "plan": (plan, lambda: [PLAN]),
    "rows": (rows, lambda: [ROWS]),
    "config": (config, lambda: [json.dumps(TINY.to_diff_dict(), indent=0).encode()]),
    "words": (words, lambda: [b"2GB", b"1.5 GiB", b"20%", b"gptq.bits=3", b"menu.bits=[2, 3]"]),
}


def index_file() -> bytes:
    """A whole file of a few small tensors."""
    import torch

    return save({"a": torch.ones(2, 3), "b": torch.zeros(4, dtype=torch.int8)})


def refuses_or_answers(name: str, content: bytes, folder: Path) -> bool:
    """Run a target; whether it took the input. Anything but a `LayerwiseError` goes up."""
    try:
        TARGETS[name][0](content, folder)
    except LayerwiseError as error:
        assert "allowed is" in str(error) and "To mend it" in str(error)
        return False
    return True
