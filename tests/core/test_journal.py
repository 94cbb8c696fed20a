"""The journal: what is finished stays, a torn line is forgotten, another job is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch

from layerwise.core.errors import LayerwiseError
from layerwise.core.journal import Journal
from layerwise.core.weight import Dense, Quantized, Sum, Weight

JOB = {"plan": "abc", "data": {"seed": 0, "samples": 128}, "order": (1, 2)}


def released(folder: Path, job: dict) -> Journal:
    """A journal that lets go of its lock at once, as a process that ended does."""
    with Journal(folder, job) as journal:
        return journal


def records(number: int) -> dict[str, Weight]:
    codes = torch.full((2, 3), number, dtype=torch.int8)
    quantized = Quantized(codes, torch.ones(2, 1, dtype=torch.bfloat16), None, 4, 0)
    layer = f"decoder/{number}"
    return {
        f"{layer}/mlp.up": quantized,
        f"{layer}/mlp.down[3]": Sum(quantized, Dense(torch.randn(2, 3))),
    }


@pytest.fixture
def written(tmp_path: Path) -> dict[str, dict[str, Weight]]:
    """Two finished layers in `tmp_path / 'j'`."""
    journal = released(tmp_path / "j", JOB)
    kept = {f"decoder/{i}": records(i) for i in range(2)}
    for layer, found in kept.items():
        journal.write(layer, found, {"seconds": 1.5})
    return kept


def check(journal: Journal, kept: dict[str, dict[str, Weight]]) -> None:
    assert journal.lines.keys() == kept.keys()
    for layer, expected in kept.items():
        assert layer in journal
        assert journal.lines[layer]["report"] == {"seconds": 1.5}
        found = journal.read(layer)
        assert found.keys() == expected.keys()
        for key, record in expected.items():
            assert type(found[key]) is type(record)
            assert torch.equal(found[key].dense(), record.dense())


def test_what_was_written_is_there_again(tmp_path: Path, written: Any) -> None:
    check(released(tmp_path / "j", JOB), written)
    assert "decoder/2" not in released(tmp_path / "j", JOB)


@pytest.mark.parametrize(
    "torn", [b"{", b'{"layer": "decoder/2", "sha256": "', b'{"layer": "decoder/2"}']
)
def test_a_torn_last_line_is_forgotten(tmp_path: Path, written: Any, torn: bytes) -> None:
    path = tmp_path / "j" / "journal.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + torn)
    journal = released(tmp_path / "j", JOB)
    check(journal, written)
    assert path.read_bytes() == whole
    journal.write("decoder/2", records(2), {"seconds": 1.5})
    assert list(released(tmp_path / "j", JOB).lines) == ["decoder/0", "decoder/1", "decoder/2"]


def test_every_place_where_a_kill_may_cut_the_journal(tmp_path: Path, written: Any) -> None:
    path = tmp_path / "j" / "journal.jsonl"
    whole = path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    for cut in (0, 1, *(end + step for end in ends for step in (-1, 0, 1)), len(whole)):
        path.write_bytes(whole[:cut])
        found = released(tmp_path / "j", JOB)
        assert list(found.lines) == list(written)[: max(sum(end <= cut for end in ends) - 1, 0)]
        assert path.read_bytes().startswith(whole[: ends[0]])


def test_a_file_without_its_line_is_no_finished_layer(tmp_path: Path, written: Any) -> None:
    path = tmp_path / "j" / "journal.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))
    journal = released(tmp_path / "j", JOB)
    assert list(journal.lines) == ["decoder/0"]
    journal.write("decoder/1", written["decoder/1"], {"seconds": 1.5})
    check(released(tmp_path / "j", JOB), written)


@pytest.mark.parametrize(
    ("job", "named"),
    [
        (JOB | {"plan": "xyz"}, "a change in plan"),
        (JOB | {"data": {"seed": 1, "samples": 128}, "order": (1, 3)}, "a change in data, order"),
        (JOB | {"threads": 2}, "a change in threads"),
        ({"plan": "abc"}, "a change in data, order"),
    ],
)
def test_another_job_is_refused(tmp_path: Path, written: Any, job: dict, named: str) -> None:
    with pytest.raises(LayerwiseError, match=f"{named}. .*delete {tmp_path / 'j'}"):
        released(tmp_path / "j", job)
    check(released(tmp_path / "j", JOB), written)


@pytest.mark.parametrize("harm", ["change", "cut", "remove"])
def test_a_changed_file_is_refused(tmp_path: Path, written: Any, harm: str) -> None:
    path = tmp_path / "j" / "decoder-1.safetensors"
    content = path.read_bytes()
    if harm == "remove":
        path.unlink()
    else:
        path.write_bytes(content[:-1] if harm == "cut" else content[:-1] + b"\x7f")
    journal = released(tmp_path / "j", JOB)
    assert journal.read("decoder/0").keys() == written["decoder/0"].keys()
    with pytest.raises(LayerwiseError, match=f"{path}.*delete {tmp_path / 'j'}"):
        journal.read("decoder/1")


@pytest.mark.parametrize("line", [b"{not json}", b'{"no": "layer"}', b"3", b'{"job": 3}'])
@pytest.mark.parametrize("place", [0, 1])
def test_a_changed_journal_is_refused(
    tmp_path: Path, written: Any, line: bytes, place: int
) -> None:
    path = tmp_path / "j" / "journal.jsonl"
    lines = path.read_bytes().splitlines()
    lines[place] = line
    path.write_bytes(b"\n".join(lines) + b"\n")
    with pytest.raises(LayerwiseError, match=f"journal {tmp_path / 'j'}"):
        released(tmp_path / "j", JOB)
