"""Documents and their three uses: stable shares, clear errors, windows of the asked shape."""

import json
import sysconfig
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from layerwise.core.data import (
    Document,
    Texts,
    documents,
    stdlib_documents,
    use_of,
)
from layerwise.core.errors import LayerwiseError
from layerwise.core.reader import Reader, samples_of, windows


@pytest.fixture(scope="module")
def reader(tiny: Callable[..., Path]) -> Reader:
    return Reader("causal", AutoTokenizer.from_pretrained(tiny("llama")))


def paragraphs(count: int) -> list[str]:
    return [f"Paragraph {i} says that {i * i} is the square of {i}. " * 4 for i in range(count)]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Sixty documents of about two hundred characters."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in paragraphs(60)))
    return path


def test_the_shares_are_six_two_two_and_stay() -> None:
    shares = Counter(use_of(f"document {i}") for i in range(5000))
    expected = {"calibrate": 3000, "select": 1000, "evaluate": 1000}
    assert all(abs(shares[use] - count) < 120 for use, count in expected.items())
    uses = [use_of(key) for key in ("a", "b", "c", "abc", "json/decoder.py")]
    assert uses == ["evaluate", "calibrate", "evaluate", "calibrate", "calibrate"]


def test_uses_have_nothing_in_common(rows: Path) -> None:
    texts = Texts(str(rows))
    uses = [{d.key for d in texts.documents(use)} for use in ("calibrate", "select", "evaluate")]
    assert sum(map(len, uses)) == len(set().union(*uses)) == 60


def test_the_seed_shuffles(rows: Path) -> None:
    first, again, other = (Texts(str(rows), seed).documents("calibrate") for seed in (0, 0, 1))
    assert first == again != other
    assert sorted(first) == sorted(other)


def test_stdlib_is_the_source_of_the_interpreter() -> None:
    found = {document.key: document.text for document in stdlib_documents()}
    assert {"json/decoder.py", "os.py"} <= found.keys()
    assert found["os.py"] == Path(sysconfig.get_path("stdlib"), "os.py").read_text()
    assert not any(part.startswith("test") for key in found for part in key.split("/"))


def test_stdlib_has_no_tests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    left_out = ["test/a.py", "x/tests/a.py", "test_a.py", "idlelib/a.py", "lib2to3/a.py"]
    left_out += ["site-packages/a/b.py", "__pycache__/a.py", "a.txt", "empty.py"]
    for name in ["x/b.py", "a.py", *left_out]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(" " if name == "empty.py" else "x = 1")
    assert [document.key for document in stdlib_documents()] == ["a.py", "x/b.py"]


def test_a_text_file_is_cut_at_blank_lines(tmp_path: Path) -> None:
    text = "\n\n".join(paragraphs(100)) + "\n\n"
    (tmp_path / "a.txt").write_text(text)
    blocks = [document.text for document in documents(tmp_path / "a.txt")]
    assert "".join(blocks).strip() == text.strip()
    assert all(4096 <= len(block) < 4096 + 300 for block in blocks[:-1])
    assert all(block.startswith("Paragraph") for block in blocks)


def test_a_folder_has_a_document_per_file(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name, text in (("b.txt", "two"), ("in/c.md", "three"), ("a.py", "one"), (".x", "hidden")):
        (tmp_path / name).write_text(text)
    assert [document.text for document in documents(tmp_path)] == ["one", "two", "three"]


def test_rows_are_lines_and_nothing_else(tmp_path: Path) -> None:
    """A line separator inside a string is no end of a row."""
    messages = [{"role": "user", "content": "hi"}]
    texts = ["one\u2028two\x85three", "four\x0cfive"]
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    path = tmp_path / "a.jsonl"
    path.write_text("\r\n".join([*lines, "", json.dumps({"messages": messages})]), encoding="utf-8")
    assert [d.text for d in documents(path)] == [*texts, json.dumps(messages)]
    assert [d.chat for d in documents(path)] == [False, False, True]


def test_only_messages_go_through_the_chat_template(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny("llama"))
    reader = Reader("causal", tokenizer)
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    path = tmp_path / "a.jsonl"
    said = ["nobody", "somebody", "anybody", "everybody"]
    rows = [{"messages": [{"role": "user", "content": word * 20}]} for word in said]
    rows += [{"text": f"[{{not messages but text: {word * 20}"} for word in said]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = [
        tokenizer.decode(batch["input_ids"][0])
        for use in ("calibrate", "select", "evaluate")
        if any(documents(path, use))
        for batch in samples_of(reader, Texts(str(path)), use)
    ]
    expected = [f"<user>{word * 20}" for word in said] + [row["text"] for row in rows[4:]]
    assert sorted(found) == sorted(f"<s>{text}" for text in expected)


@pytest.mark.parametrize(
    "row",
    [
        "{",
        "3",
        "null",
        '"text"',
        "[]",
        "{}",
        '{"tekst": ""}',
        '{"text": 3}',
        '{"text": null}',
        r'{"text": "\ud800"}',
    ],
)
def test_a_bad_row_is_named_by_its_line(row: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"text": "good"}}\n\n{row}\n')
    with pytest.raises(LayerwiseError, match=f"{path}, line 3.*`text` or `messages`") as error:
        list(documents(path))
    assert error.value.found == row


def test_sources_that_hold_nothing(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "folder").mkdir()
    for source in (tmp_path / "empty.txt", tmp_path / "folder"):
        with pytest.raises(LayerwiseError, match=f"{source}.*'calibrate'.*found none among"):
            Texts(str(source)).documents("calibrate")
    with pytest.raises(LayerwiseError, match=r"latin.txt.*UTF-8.*0xe9"):
        list(documents(tmp_path / "latin.txt"))
    with pytest.raises(LayerwiseError, match=r"nothing.txt.*no such file"):
        list(documents(tmp_path / "nothing.txt"))


def test_windows(reader: Reader, rows: Path) -> None:
    texts = Texts(str(rows), samples=20, length=24)
    batches = windows(reader, texts, "calibrate", batch=8)
    assert [tuple(b["input_ids"].shape) for b in batches] == [(8, 24), (8, 24), (4, 24)]
    assert all(b["input_ids"].dtype == torch.int64 for b in batches)
    joined = torch.cat([b["input_ids"].reshape(-1) for b in batches])
    stream = [i for d in texts.documents("calibrate") for i in _with_start(reader, d)]
    assert joined.tolist() == stream[: 20 * 24]
    other = torch.cat([b["input_ids"] for b in windows(reader, texts, "evaluate")])
    assert not any((joined.reshape(20, 24) == row).all(1).any() for row in other)


def _with_start(reader: Reader, document: Document) -> list[int]:
    return [reader.processor.bos_token_id, *reader.processor(document.text)["input_ids"]]


def test_fewer_windows_where_the_text_is_short(reader: Reader, rows: Path) -> None:
    batches = windows(reader, Texts(str(rows), samples=1000, length=512), "select")
    assert 0 < sum(len(b["input_ids"]) for b in batches) < 1000
    with pytest.raises(LayerwiseError, match=r"one window of 9999999 tokens.*tokens for the use"):
        windows(reader, Texts(str(rows), length=9_999_999), "select")


def test_samples_are_beginnings_of_documents(reader: Reader, rows: Path) -> None:
    texts = Texts(str(rows), length=24)
    found = samples_of(reader, texts, "evaluate", count=5)
    chosen = texts.documents("evaluate")[:5]
    assert [b["input_ids"][0].tolist() for b in found] == [
        _with_start(reader, d)[:24] for d in chosen
    ]


def test_samples_need_documents_of_some_length(reader: Reader, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"{i}"}) + "\n" for i in range(50)))
    with pytest.raises(LayerwiseError, match="more than 16 tokens"):
        samples_of(reader, Texts(str(path)), "evaluate")
