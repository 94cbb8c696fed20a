"""Train a small model for every task that is no causal language model, about a minute each.

    python examples/tasks/train.py --out out/tasks                 all three
    python examples/tasks/train.py --out out/tasks --only image

`masked` is a RoBERTa of 4 layers that fills in numbers in words and digits, `seq2seq` a T5 of 3 + 3
layers that writes numbers in digits, `image` a ViT of 6 layers that reads the handwritten
digits of scikit-learn, as PNG files. Beside each `model`, an ordinary folder, lies its data. Only
documents to calibrate with are seen, so that evaluating is fair.
"""

import argparse
import json
import math
import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import transformers as t
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from torch.nn.functional import cross_entropy

from layerwise.core.data import Texts
from layerwise.core.open import open_network
from layerwise.core.reader import Batches, windows
from layerwise.core.task import answer, forward_arguments, labels_of
from layerwise.jobs.session import load_reader
from layerwise.jobs.stock import load_stock

SPECIAL = {
    "pad_token": "<pad>",
    "cls_token": "<s>",
    "sep_token": "</s>",
    "eos_token": "</s>",
    "mask_token": "<mask>",
}


def tokenizer(texts: Iterable[str], size: int, ends: str) -> t.PreTrainedTokenizerFast:
    """Byte-level BPE; `ends` is what stands around a text, such as `<s> $A </s>`."""
    plain = Tokenizer(models.BPE())
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=list(dict.fromkeys(SPECIAL.values())),
        show_progress=False,
    )
    plain.train_from_iterator(texts, trainer)
    known = [(name, plain.token_to_id(name)) for name in ("<s>", "</s>")]
    plain.post_processor = processors.TemplateProcessing(single=ends, special_tokens=known)
    return t.PreTrainedTokenizerFast(tokenizer_object=plain, **SPECIAL)


ONES = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
ONES += "fifteen sixteen seventeen eighteen nineteen"
TENS = "twenty thirty forty fifty sixty seventy eighty ninety"


def in_words(number: int) -> str:
    """A number below a million in English words."""
    ones, tens = ONES.split(), TENS.split()
    if number < 20:
        return ones[number]
    if number < 100:
        rest = f"-{ones[number % 10]}" if number % 10 else ""
        return tens[number // 10 - 2] + rest
    unit, name = (1000, "thousand") if number >= 1000 else (100, "hundred")
    rest = f" {in_words(number % unit)}" if number % unit else ""
    return f"{in_words(number // unit)} {name}{rest}"


def write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    """Rows of data as JSONL."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def masked(folder: Path) -> tuple[Path, int]:
    """A RoBERTa in miniature that fills in what is hidden of numbers in words and digits."""
    data = folder.parent / "sentences.jsonl"
    chosen = random.Random(0).choices(range(1000), k=12_000)
    said = [f"{in_words(n)} is {n}." for n in chosen]
    lines = [" ".join(said[i : i + 8]) for i in range(0, len(said), 8)]
    write_rows(data, [{"text": f"{line}\n"} for line in lines])
    words = tokenizer(lines, 320, "<s> $A </s>")
    words.save_pretrained(folder)
    config = t.RobertaPreLayerNormConfig(
        vocab_size=len(words),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=256,
        initializer_range=0.08,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=words.pad_token_id,
        bos_token_id=words.cls_token_id,
        eos_token_id=words.sep_token_id,
    )
    t.RobertaPreLayerNormForMaskedLM(config).save_pretrained(folder)
    return data, 64


def seq2seq(folder: Path) -> tuple[Path, int]:
    """A T5 in miniature that writes numbers in digits."""
    data = folder.parent / "numbers.jsonl"
    rows = [{"text": in_words(n), "target": " ".join(str(n))} for n in range(0, 10_000, 3)]
    write_rows(data, rows)
    words = tokenizer((row["text"] for row in rows), 320, "$A </s>")
    words.save_pretrained(folder)
    config = t.T5Config(
        vocab_size=len(words),
        d_model=128,
        d_kv=32,
        d_ff=256,
        num_layers=3,
        num_decoder_layers=3,
        num_heads=4,
        dropout_rate=0.0,
        pad_token_id=words.pad_token_id,
        eos_token_id=words.eos_token_id,
        decoder_start_token_id=words.pad_token_id,
    )
    t.T5ForConditionalGeneration(config).save_pretrained(folder)
    return data, 64


def image(folder: Path) -> tuple[Path, int]:
    """A ViT in miniature that reads handwritten digits."""
    from PIL import Image
    from sklearn.datasets import load_digits

    data = folder.parent / "digits"
    digits = load_digits()
    for number, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        place = data / str(label)
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray((pixels * 15).astype("uint8")).save(place / f"{number}.png")
    t.ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(folder)
    names = {i: str(i) for i in range(10)}
    config = t.ViTConfig(
        image_size=8,
        patch_size=2,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=6,
        num_attention_heads=4,
        id2label=names,
        label2id={name: i for i, name in names.items()},
    )
    t.ViTForImageClassification(config).save_pretrained(folder)
    return data, 64


#: task -> (how its folder is made, steps, highest learning rate)
TASKS: dict[str, tuple[Callable[[Path], tuple[Path, int]], int, float]] = {
    "masked": (masked, 700, 2e-3),
    "seq2seq": (seq2seq, 900, 2e-3),
    "image": (image, 700, 1e-3),
}


def together(batches: Batches, size: int) -> Batches:
    """Batches of equal shapes joined into ones of up to `size` rows."""
    alike: dict[tuple, Batches] = defaultdict(list)
    for batch in batches:
        alike[tuple(value.shape[1:] for value in batch.values())].append(batch)
    return [
        {key: torch.cat([batch[key] for batch in group[i : i + size]]) for key in group[0]}
        for group in alike.values()
        for i in range(0, len(group), size)
    ]


def loss_of(module: torch.nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Cross-entropy of the answers that count, whatever the task."""
    return cross_entropy(
        answer(module(**forward_arguments(module, batch)), batch), labels_of(batch)
    )


def train(
    folder: Path, data: Path, length: int, steps: int, rate: float, samples: int = 4000
) -> float:
    """Train the model of a folder in place; gives the mean loss of the last steps."""
    network = open_network(folder, dtype="float32")
    texts = Texts(str(data), samples=samples, length=length)
    batches = windows(load_reader(network), texts, "calibrate", batch=16)
    if len(batches[0]["labels"]) == 1:
        batches = together(batches, 32)
    module = load_stock(folder, "float32", torch.device("cpu")).train().requires_grad_(True)
    optimizer = torch.optim.AdamW(module.parameters(), rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / 50, 0.5 + 0.5 * math.cos(math.pi * step / steps)),
    )
    chance, losses = random.Random(0), []
    for _ in range(steps):
        loss = loss_of(module, chance.choice(batches))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    module.save_pretrained(folder)  # type: ignore[operator]
    last = losses[-(steps // 10 + 1) :]
    return sum(last) / len(last)


def main() -> None:
    """Train what is asked for, and say how it went."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--out", type=Path, required=True)
    options.add_argument("--only", choices=list(TASKS), nargs="+", default=list(TASKS))
    options.add_argument("--steps", type=int, help="steps of each, in place of its own")
    asked = options.parse_args()
    t.logging.set_verbosity_error()
    t.logging.disable_progress_bar()
    for name in asked.only:
        began, (make, steps, rate) = time.monotonic(), TASKS[name]
        torch.manual_seed(0)
        folder = asked.out / name / "model"
        folder.mkdir(parents=True, exist_ok=True)
        data, length = make(folder)
        loss = train(folder, data, length, asked.steps or steps, rate)
        seconds = time.monotonic() - began
        print(f"{folder}: loss {loss:.3f} after {seconds:.0f} s; --data {data}", flush=True)


if __name__ == "__main__":
    main()
