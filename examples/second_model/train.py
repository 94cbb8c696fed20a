"""Train a GPT-2-shaped model of 3.8 M parameters on the docstrings of the pinned packages.

    python examples/second_model/train.py --out out/second --steps 1000

Only the calibrate part of the text is seen, by the tokenizer too. Training resumes from the last
checkpoint in `--out`.
"""

import sys
from pathlib import Path

from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from layerwise.core.data import use_of

# Both scripts are called train.py: this one gets the other as `demo_model.train`.
sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks.docstrings import documents
from demo_model.train import make_tokenizer, options_of, save, tokens_of, train


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
