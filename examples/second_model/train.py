"""Train a GPT-2-shaped model of 3.8 M parameters on the documentation of a Debian machine.

    python examples/second_model/train.py --out out/second --steps 1000

The text is that of the manual pages and READMEs of this machine, so another machine gives another
model. Documents are split by the sha256 of their text, as rows of a JSONL file are; only the
calibrate part is seen, by the tokenizer too. `text.jsonl` in `--out` is a sample of all three
parts, for `--data`. Training resumes from the last checkpoint in `--out`.
"""

import gzip
import hashlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from manual import plain
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from layerwise.core.data import use_of

# Both scripts are called train.py: this one gets the other as `demo_model.train`.
sys.path.insert(0, str(Path(__file__).parents[1]))
from demo_model.train import make_tokenizer, options_of, save, tokens_of, train

README = re.compile(r"(README.*|FAQ|.*\.(md|rst|txt))(\.gz)?")
RECORDS = re.compile(r"copyright|licen[cs]e|change|news|history|authors|thanks", re.IGNORECASE)


def read(path: Path) -> str:
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return data.decode("utf-8", errors="replace")


def texts() -> Iterator[str]:
    """Manual pages and documentation; links are left out, they lead to pages that come anyway.

    Google's 16,000 generated `gcloud` pages would be three quarters of the text; they stay out.
    """
    for path in sorted(Path("/usr/share/man").glob("man*/*")):
        if not path.is_symlink() and not path.name.startswith("gcloud"):
            yield plain(read(path))
    root = Path("/usr/share/doc")
    for path in sorted(root.rglob("*")):
        named = README.fullmatch(path.name) and not RECORDS.search(str(path.relative_to(root)))
        if named and path.is_file() and not path.is_symlink():
            yield read(path).strip()


def documents() -> list[str]:
    """English texts without the paragraphs that an earlier one has, in an order drawn by sha256.

    Manual pages share whole sections, which would carry the evaluate part into training.
    """
    kept, seen = [], set()
    for text in sorted(set(texts()), key=lambda t: hashlib.sha256(t.encode()).digest()):
        if sum(not c.isascii() for c in text) > 0.01 * len(text):
            continue
        paragraphs = [p for p in text.split("\n\n") if len(p) < 80 or p not in seen]
        seen.update(paragraphs)
        text = "\n\n".join(paragraphs)
        if len(text) >= 500:
            kept.append(text)
    return kept


def write_sample(documents: list[str], path: Path, size: int = 6_000_000) -> None:
    """Documents as JSONL until `size` bytes are full."""
    with path.open("w", encoding="utf-8") as file:
        for text in documents:
            line = json.dumps({"text": text}, ensure_ascii=False) + "\n"
            size -= len(line.encode())
            if size < 0:
                break
            file.write(line)


def gpt2(tokenizer: PreTrainedTokenizerFast) -> GPT2LMHeadModel:
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=2048,
            n_positions=512,
            n_embd=256,
            n_layer=4,
            n_head=4,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def main() -> None:
    options = options_of(__doc__)
    every = documents()
    write_sample(every, options.out / "text.jsonl")
    calibrate = [text for text in every if use_of(text) == "calibrate"]
    tokenizer = make_tokenizer(calibrate, 2048)
    tokens = tokens_of(tokenizer, calibrate)
    model = gpt2(tokenizer).to(options.device)
    print(
        f"{len(every)} documents, {len(calibrate)} calibrate: {len(tokens)} tokens;"
        f" {model.num_parameters()} parameters",
        flush=True,
    )
    # Full windows from the start: learned positions know only what they were trained at.
    save(model, tokenizer, options.out, train(model, tokens, options, short=0.0))


if __name__ == "__main__":
    main()
