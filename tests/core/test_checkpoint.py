"""Safetensors: the same bytes as the official library's, and every broken file refused by name."""

import json
import os
import shutil
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from layerwise.core import checkpoint
from layerwise.core.checkpoint import DTYPES, Checkpoint, read_header, read_tensor
from layerwise.core.errors import LayerwiseError
from layerwise.core.open import open_network
from layerwise.core.shards import ShardWriter, write_safetensors

SHAPES = [(), (0,), (1,), (3, 5), (2, 0, 4), (2, 1, 3)]


def tensors_of(dtype: torch.dtype) -> dict[str, Tensor]:
    """Random bits of every shape; NaNs among the floats."""
    generator = torch.Generator().manual_seed(0)
    found = {}
    for shape in SHAPES:
        if not shape and dtype == torch.float4_e2m1fn_x2:
            continue  # two of its elements share a byte along the last axis
        bits = torch.randint(0, 256, (*shape, dtype.itemsize), generator=generator).to(torch.uint8)
        bits = bits % 2 if dtype == torch.bool else bits
        found[f"a.{shape}"] = bits.reshape(-1).view(dtype).reshape(shape)
    return found


def same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        (t.dtype, t.shape) == (other[name].dtype, other[name].shape)
        and t.contiguous()
        .reshape(-1)
        .view(torch.uint8)
        .equal(other[name].contiguous().reshape(-1).view(torch.uint8))
        for name, t in one.items()
    )


@pytest.mark.parametrize("code", DTYPES)
def test_written_here_and_read_there_and_back(code: str, tmp_path: Path) -> None:
    path, tensors = tmp_path / "a.safetensors", tensors_of(DTYPES[code])
    write_safetensors(path, tensors)
    assert same_bits(safetensors.torch.load_file(path), tensors)
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
    assert same_bits({name: read_tensor(i) for name, i in read_header(path).items()}, tensors)
    assert not list(tmp_path.glob("*.part"))


def test_mixed_types_and_views(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    tensors = {"a": base[0, :5] > 3, "b": base[:3, ::2].half(), "c": base.T, "d": base[1].long()}
    write_safetensors(tmp_path / "a", tensors)
    assert same_bits(safetensors.torch.load_file(tmp_path / "a"), tensors)
    assert all(
        info.start % info.dtype.itemsize == 0 for info in read_header(tmp_path / "a").values()
    )


def test_what_was_there_stays_when_writing_fails(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_safetensors(path, {"x": torch.ones(3)})
    with pytest.raises(NotImplementedError):
        write_safetensors(path, {"x": torch.ones(3, device="meta")})
    assert read_tensor(read_header(path)["x"]).tolist() == [1, 1, 1]


def built(header: Any, body: int, length: int | None = None) -> bytes:
    """A file of a header, which may be anything, and zeros."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + bytes(body)


def entry(start: int, end: int, dtype: str = "F32", shape: Any = (2,)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


TWO = {"a": entry(0, 8), "b": entry(8, 16)}
BROKEN = {
    "empty": b"",
    "seven bytes": bytes(7),
    "cut in the body": built(TWO, 15),
    "cut in the header": built(TWO, 16)[:60],
    "more than the tensors": built(TWO, 17),
    "header longer than the file": built(TWO, 16, length=200),
    "absurd header length": built(TWO, 16, length=2**63 + 1),
    "header over the limit": built(TWO, 16, length=2**40),
    "no header": built(TWO, 16, length=0),
    "not JSON": built(b"{'a': 1}", 16),
    "not UTF-8": built(b'{"\xff": 1}', 16),
    "nested without end": built(b"[" * 100_000, 16),
    "a list": built([1, 2], 16),
    "overlapping": built({"a": entry(0, 8), "b": entry(4, 12)}, 12),
    "overlapping, as long as the sum": built({"a": entry(0, 8), "b": entry(4, 12)}, 16),
    "a hole, as long as the sum": built({"a": entry(0, 8), "b": entry(12, 20)}, 16),
    "the same place": built({"a": entry(0, 8), "b": entry(0, 8)}, 8),
    "a hole": built({"a": entry(0, 8), "b": entry(12, 20)}, 20),
    "a hole in front": built({"a": entry(8, 16)}, 16),
    "backwards": built({"a": entry(8, 0)}, 8),
    "negative": built({"a": entry(-8, 0)}, 0),
    "too few bytes": built({"a": entry(0, 4)}, 4),
    "unknown type": built({"a": entry(0, 8, "F33")}, 8),
    "type of a wrong kind": built({"a": entry(0, 8, ["F32"])}, 8),
    "broken shape": built({"a": entry(0, 8, shape=[2.0])}, 8),
    "shape of a wrong kind": built({"a": entry(0, 8, shape="2")}, 8),
    "negative shape": built({"a": entry(0, 8, shape=[-1, -2])}, 8),
    "huge and empty": built({"a": entry(0, 0, shape=[0, 2**70])}, 0),
    "three offsets": built({"a": entry(0, 8) | {"data_offsets": [0, 4, 8]}}, 8),
    "no offsets": built({"a": {"dtype": "F32", "shape": [2]}}, 8),
    "no entry": built({"a": None}, 8),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files_are_named(case: str, tmp_path: Path) -> None:
    path = tmp_path / "broken.safetensors"
    path.write_bytes(BROKEN[case])
    with pytest.raises(LayerwiseError, match=str(path)):
        read_header(path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(LayerwiseError, match=str(path)):
        Checkpoint(tmp_path)


def reads_or_refuses(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    try:
        found = read_header(path)
    except LayerwiseError as error:
        assert str(path) in str(error)
        return
    for info in found.values():
        assert read_tensor(info).shape == info.shape


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "fuzzed.safetensors"


whole = built({"__metadata__": {"format": "pt"}, **TWO, "c": entry(16, 18, "BF16", [1, 1])}, 18)


@given(
    changes=st.lists(st.tuples(st.integers(0, len(whole) - 1), st.integers(0, 255)), max_size=4),
    cut=st.integers(0, len(whole)) | st.none(),
)
def test_changed_bytes(scratch: Path, changes: list[tuple[int, int]], cut: int | None) -> None:
    content = bytearray(whole)
    for place, value in changes:
        content[place] = value
    reads_or_refuses(scratch, bytes(content[:cut]))


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["F32", "I8", "x"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2)
    ),
    max_leaves=4,
)
numbers = st.integers(-1, 9) | st.sampled_from([2**31, 2**63, 2**64, True, None, 0.0])
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "I8", "F8_E4M3"]) | anything,
        "shape": st.lists(numbers, max_size=3) | anything,
        "data_offsets": st.lists(numbers, min_size=2, max_size=2) | anything,
    }
)


@given(
    header=st.dictionaries(st.text(max_size=3), entries | anything, max_size=3),
    body=st.integers(0, 9),
)
@example(header={"a": entry(0, 0, shape=[2**40, 2**40, 0])}, body=0)
@example(header={"a": entry(0, 1, "I8", [True])}, body=1)
def test_changed_meaning(scratch: Path, header: dict[str, Any], body: int) -> None:
    reads_or_refuses(scratch, built(header, body))


def copy_sharded(folder: Path, to: Path, limit: int) -> dict[str, Tensor]:
    """Write a model's tensors anew, last first, in twos, in shards of a limit."""
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    (to / "config.json").write_text((folder / "config.json").read_text())
    writer, names = ShardWriter(to, limit), list(tensors)[::-1]
    for i in range(0, len(names), 2):
        writer.add({name: tensors[name] for name in names[i : i + 2]})
    files = writer.close()
    assert sorted(files) == sorted(p.name for p in to.iterdir() if p.name != "config.json")
    assert writer.nbytes == sum(t.nbytes for t in tensors.values())
    return tensors


@pytest.mark.parametrize("limit", [30_000, 10**9])
def test_shards_load_in_transformers(tiny: Callable[..., Path], tmp_path: Path, limit: int) -> None:
    from transformers import AutoModelForCausalLM

    tensors = copy_sharded(tiny("llama"), tmp_path, limit)
    count = len(list(tmp_path.glob("*.safetensors")))
    assert (count > 5) == (limit < 10**9) == (tmp_path / "model.safetensors.index.json").exists()
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(
        info[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys")
    )
    stock = AutoModelForCausalLM.from_pretrained(tiny("llama"))
    assert same_bits(loaded.state_dict(), stock.state_dict())
    checkpoint = Checkpoint(tmp_path)
    assert same_bits(checkpoint.read(tensors), tensors)
    assert checkpoint.nbytes == sum(t.nbytes for t in tensors.values())


def test_identity_is_of_the_content(tiny: Callable[..., Path], tmp_path: Path) -> None:
    tensors = copy_sharded(tiny("llama"), tmp_path, 30_000)
    one, two = Checkpoint(tiny("llama")), Checkpoint(tmp_path)
    assert (one.structure, one.weights) == (two.structure, two.weights)
    for file in tmp_path.glob("*.safetensors*"):
        file.unlink()
    name = next(iter(tensors))
    tensors[name][0, 0] += 1
    write_safetensors(tmp_path / "model.safetensors", tensors)
    assert Checkpoint(tmp_path).structure == one.structure
    assert Checkpoint(tmp_path).weights != one.weights
    write_safetensors(tmp_path / "model.safetensors", tensors | {name: tensors[name].half()})
    assert Checkpoint(tmp_path).structure != one.structure


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("code", ["F64", "F32", "F16", "BF16"])
def test_weights_that_are_no_numbers_are_named(code: str, value: float, tmp_path: Path) -> None:
    bad = torch.ones(3, 3, dtype=DTYPES[code])
    bad[1, 2] = value
    (tmp_path / "config.json").write_text("{}")
    write_safetensors(tmp_path / "m.safetensors", {"good": torch.ones(2), "up.weight": bad})
    checkpoint = Checkpoint(tmp_path)
    assert checkpoint.read(["good"])
    with pytest.raises(LayerwiseError, match=f"{tmp_path / 'm.safetensors'}, tensor 'up.weight'"):
        checkpoint.read(["good", "up.weight"])


def test_long_hashes_are_remembered_while_a_file_stays(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, cache = tmp_path / "model", tmp_path / "cache"
    shutil.copytree(tiny("llama"), folder)
    file = folder / "model.safetensors"
    plain = Checkpoint(folder).weights
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.setattr(checkpoint, "LONG", 1)
    fresh = lambda: (checkpoint._weights.cache_clear(), Checkpoint(folder).weights)[1]  # noqa: E731
    os.utime(file)  # a copy is as old as what it is of
    assert fresh() == plain
    assert not cache.exists(), "a file of this moment may change within a tick"
    os.utime(file, (1, 1))
    assert fresh() == plain
    (kept,) = (cache / "layerwise" / "weights").iterdir()
    kept.write_text("remembered")
    assert fresh() == "remembered"
    with file.open("r+b") as changed:
        changed.seek(-1, os.SEEK_END)
        changed.write(b"!")
    assert fresh() not in (plain, "remembered")
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))
    os.utime(file, (2, 2))
    assert len(fresh()) == 64, "a cache that cannot be written is no error"


def test_a_file_that_shrinks_after_it_was_opened(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_safetensors(path, {"x": torch.ones(8)})
    info = read_header(path)["x"]
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(LayerwiseError, match=str(path)):
        read_tensor(info)


@pytest.mark.parametrize(
    ("files", "found"),
    [
        ({}, "no config.json"),
        ({"config.json": "{}"}, "none"),
        ({"config.json": "{}", "pytorch_model.bin": "x"}, "pytorch_model.bin"),
        ({"config.json": "{"}, "config.json"),
        ({"config.json": "[]"}, "config.json"),
        ({"config.json": "{}", "model.safetensors.index.json": "{"}, "index.json"),
        ({"config.json": "{}", "model.safetensors.index.json": "{}"}, "index.json"),
        (
            {
                "config.json": "{}",
                "model.safetensors.index.json": '{"weight_map": {"x": "gone.safetensors"}}',
            },
            "missing gone.safetensors",
        ),
    ],
)
def test_folders_that_are_no_model(files: dict[str, str], found: str, tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(LayerwiseError, match=found):
        Checkpoint(tmp_path)


def wait_for_advice() -> None:
    for thread in threading.enumerate():
        if thread.name == "advice":
            thread.join()


def test_the_next_layer_is_asked_for_while_one_is_worked_on(
    tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = open_network(tiny("llama"))
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(
        os, "posix_fadvise", lambda fd, start, size, how: asked.append((start, size))
    )
    first, second = network.stack.layers[:2]
    network.bring(first)
    wait_for_advice()
    infos = [i for n, i in network.checkpoint.tensors.items() if n.startswith(f"{second.path}.")]
    assert sorted(asked) == sorted((info.start, info.nbytes) for info in infos)
    asked.clear()
    network.bring(network.stack.layers[-1])
    wait_for_advice()
    assert not asked


@pytest.mark.skipif("posix_fadvise" not in dir(os), reason="this system takes no advice")
def test_a_long_file_leaves_the_page_cache_once_it_is_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda fd: done.append("on the disk"))
    monkeypatch.setattr(os, "posix_fadvise", lambda *advice: done.append("forgotten"))
    write_safetensors(tmp_path / "short", {"w": torch.zeros(2)})
    assert done == []
    monkeypatch.setattr("layerwise.core.shards.LONG", 8)
    write_safetensors(tmp_path / "long", {"w": torch.zeros(2)})
    assert done == ["on the disk", "forgotten"]
