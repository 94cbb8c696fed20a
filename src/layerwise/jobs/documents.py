"""Documents for inspection: labelled ones, perturbed copies, and prompts with their responses."""

import csv
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from layerwise.core.data import Texts
from layerwise.core.errors import LayerwiseError
from layerwise.core.network import Network
from layerwise.core.reader import TOGETHER, Batches, Reader, windows
from layerwise.core.task import config_value


class Labelled(NamedTuple):
    """Batches of documents, the class of each, and the names of the classes."""

    batches: Batches
    labels: Tensor
    names: tuple[str, ...]


def labelled_rows(path: str | Path) -> Iterator[tuple[str, str]]:
    """Text and label of every row of a JSONL or CSV file.

    Raises:
        LayerwiseError: there is no such file, or a row lacks one of the two.
    """
    file = Path(path)
    if not file.is_file() or file.suffix not in (".jsonl", ".csv"):
        raise LayerwiseError(
            f"--labels {path}",
            allowed="a .jsonl or .csv file with the fields `text` and `label`",
            found="no such file" if not file.exists() else f"{file.name}",
            fix="give one",
        )
    with file.open(newline="", encoding="utf-8") as opened:
        rows = csv.DictReader(opened) if file.suffix == ".csv" else map(_row, opened)
        for number, row in enumerate(rows, 1):
            text, label = (row.get(k) for k in ("text", "label"))
            if not isinstance(text, str) or not text.strip() or label in (None, ""):
                raise LayerwiseError(
                    f"--labels {path}, row {number}",
                    allowed="the fields `text` and `label`",
                    found=", ".join(k for k in row if k) or "neither",
                    fix="mend or remove the row",
                )
            yield text, str(label)


def _row(line: str) -> Mapping[str, Any]:
    try:
        found = json.loads(line)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def labelled(
    network: Network, reader: Reader, path: str | Path, length: int, noise: str
) -> Labelled:
    """Labelled documents as batches, cut to `length` tokens, with `noise` in front of each.

    Raises:
        LayerwiseError: the file is no such file, has fewer than two labels, or the network reads
            images.
    """
    _only_text(reader, "--labels")
    rows = list(labelled_rows(path))
    names = tuple(dict.fromkeys(label for _, label in rows))
    if len(names) < 2:
        raise LayerwiseError(
            f"--labels {path}",
            allowed="two labels or more",
            found=f"{len(rows)} rows, labels: {', '.join(names) or 'none'}",
            fix="add documents of another label",
        )
    texts = [f"{noise} {text}" if noise else text for text, _ in rows]
    labels = torch.tensor([names.index(label) for _, label in rows])
    return Labelled(padded(network, reader, texts, length), labels, names)


def classes(labels: Sequence[Any], data: Texts | Sequence[Mapping[str, Tensor]]) -> Tensor:
    """The class of every document of some batches, numbered in the order in which they occur.

    Raises:
        LayerwiseError: there are no batches, or not as many documents as labels.
    """
    count = 0 if isinstance(data, Texts) else sum(len(next(iter(b.values()))) for b in data)
    if len(labels) != count:
        raise LayerwiseError(
            "labels",
            allowed=f"a label for each of the {count} documents in the batches"
            if count
            else "batches",
            found=f"{len(labels)} labels",
            fix="give as many labels as documents, or the path of a file of labelled texts",
        )
    names = list(dict.fromkeys(labels))
    return torch.tensor([names.index(label) for label in labels])


def padded(network: Network, reader: Reader, texts: Sequence[str], length: int) -> Batches:
    """Documents in their order, several a batch, padded on the right, with their mask."""
    rows = [reader.tokens(text)[:length] for text in texts]
    batches = [reader.padded(rows[i : i + TOGETHER]) for i in range(0, len(rows), TOGETHER)]
    if network.task == "seq2seq":
        for batch in batches:
            batch["decoder_input_ids"] = torch.full((len(batch["input_ids"]), 1), reader.start)
    return batches


def _only_text(reader: Reader, option: str) -> None:
    if reader.images:
        raise LayerwiseError(
            option,
            allowed="networks that read text",
            found="one that reads images",
            fix="leave it out, or inspect a language model",
        )


def check_length(network: Network, length: int) -> None:
    """A window must fit into the context.

    Raises:
        LayerwiseError: it is longer.
    """
    config = getattr(network.module, "config", None)
    most = None if config is None else config_value(config, "max_position_embeddings")
    if network.task != "classify" and isinstance(most, int) and length > most > 0:
        raise LayerwiseError(
            "--length",
            allowed=f"at most {most} tokens, the context of this network",
            found=length,
            fix=f"give --length {most} or less",
        )


def check_batches(network: Network, batches: Sequence[Mapping[str, Tensor]]) -> None:
    """Batches that are given must be of the kind that the network reads, and fit its context.

    Raises:
        LayerwiseError: there are none, they are of another kind, or too long.
    """
    module = network.module
    name = module.main_input_name if isinstance(module, PreTrainedModel) else ""
    for batch in batches:
        if name and not {name, "inputs_embeds"} & batch.keys():
            raise LayerwiseError(
                "batches",
                allowed=f"batches with {name}, which this network reads",
                found=", ".join(batch),
                fix="give text to a language model, and images to one for vision",
            )
        if "input_ids" in batch:
            check_length(network, batch["input_ids"].shape[1])
    if not batches:
        raise LayerwiseError(
            "batches", allowed="one batch or more", found="none", fix="give some data"
        )


def perturbed(text: str, generator: random.Random, share: float = 0.1) -> str:
    """A copy of a text in which a tenth of the words are split, or have a letter changed.

    Example:
        >>> perturbed("one two three", random.Random(1), share=1.0)
        'noe tow th ree'
    """
    words = []
    for word in text.split(" "):
        if len(word) > 1 and generator.random() < share:
            at = generator.randrange(1, len(word))
            swapped = word[: at - 1] + word[at] + word[at - 1] + word[at + 1 :]
            doubled = word[:at] + word[at - 1] + word[at:]
            word = generator.choice((f"{word[:at]} {word[at:]}", swapped, doubled))
        words.append(word)
    return " ".join(words)


def views(network: Network, reader: Reader, texts: Texts, documents: int, count: int) -> Batches:
    """Perturbed copies of some documents, those of one document after another.

    Raises:
        LayerwiseError: the network reads images.
    """
    _only_text(reader, "invariance")
    generator = random.Random(texts.seed)
    chosen = texts.documents("calibrate")[:documents]
    cut = [d.text[: 8 * texts.length] for d in chosen]
    copies = [perturbed(text, generator) for text in cut for _ in range(count)]
    return padded(network, reader, copies, texts.length)


def responses(network: Network, reader: Reader, texts: Texts, tokens: int) -> Batches:
    """Prompts of `length` tokens, each followed by what the network says to it, greedily.

    Raises:
        LayerwiseError: the network does not write.
    """
    if network.task != "causal":
        raise LayerwiseError(
            "--respond",
            allowed="networks that write word after word",
            found=f"one for the task {network.task!r}",
            fix="leave it out",
        )
    loaded, found = network.load(), []
    for batch in windows(reader, texts, "calibrate"):
        ids = batch["input_ids"].to(network.device)
        with torch.no_grad():
            said = loaded.model.generate(  # pyright: ignore[reportCallIssue]
                ids,
                attention_mask=torch.ones_like(ids),
                min_new_tokens=tokens,
                max_new_tokens=tokens,
                do_sample=False,
            )
        found.append({"input_ids": said})
    return found


def alone(batches: Sequence[Mapping[str, Tensor]], count: int) -> Batches:
    """The first documents of some batches, each in a batch of its own."""
    rows = (
        {key: value[i : i + 1] for key, value in batch.items()}
        for batch in batches
        for i in range(len(next(iter(batch.values()))))
    )
    return list(islice(rows, count))
