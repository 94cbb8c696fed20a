"""Which experts can be left out: saliencies against chance, on a small mixture that was trained.

python -m benchmarks.experts [steps] [folder]    a few minutes of training on one core

Two mixtures of 16 experts a layer, two a token, read the standard library, one of them with hardly
any balance among experts; they are kept in the folder, and taken from there if they are there.
"""

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from transformers import AutoTokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM

from benchmarks.timing import table
from layerwise.core.data import Texts
from layerwise.core.find_experts import without_experts
from layerwise.core.folder import find_folder
from layerwise.core.open import open_network
from layerwise.core.plan import DataSpec, Plan
from layerwise.core.quality import Quality
from layerwise.core.reader import samples_of, windows
from layerwise.core.stats import Scores
from layerwise.jobs.contest import Contest, contest_on
from layerwise.jobs.fewer import WAYS, able_experts, at_random, best_saliency, saliencies
from layerwise.jobs.narrow import Candidate, Dense
from layerwise.jobs.request import Request, identity
from layerwise.jobs.session import Budget, load_reader, silent

STEPS, BATCH, LENGTH = 600, 16, 128
SHARES = (0.25, 0.5)
DOCUMENTS, DRAWS = 32, 5
TOLD = {
    "gated": "mean gated norm (REAP)",
    "total": "sum of gated norms",
    "norm": "sum of norms (EAN)",
    "frequency": "frequency",
}
#: weights of the loss that balances experts, of which a training has one: little and much
BALANCES = (0.001, 0.02)


def train(folder: Path, steps: int, balance: float) -> None:
    """A mixture of experts with the tokenizer of the demo model."""
    tokenizer = AutoTokenizer.from_pretrained(find_folder("demo"))
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        moe_intermediate_size=128,
        num_experts=16,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        output_router_logits=True,
        router_aux_loss_coef=balance,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = Qwen3MoeForCausalLM(config).train()
    texts = Texts("stdlib", 0, steps * BATCH, LENGTH)
    reader = load_reader(open_network("demo"))
    rows = torch.cat([batch["input_ids"] for batch in windows(reader, texts, "calibrate", BATCH)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1)
    course = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.1)
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        ids = rows[torch.randint(len(rows), (BATCH,), generator=generator)]
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        course.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step + 1 == steps:
            print(f"step {step}: {loss.item():.3f}", file=sys.stderr, flush=True)
    model.config.output_router_logits = False
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def compared(folder: Path, balance: float) -> None:
    """A table: what every saliency costs at some shares, and its ratio to a random choice."""
    data = DataSpec(samples=32, length=256)
    network = open_network(folder)
    request = Request(folder, Budget(size=1.0), "hf", data=data)
    dense = Dense(request, network, able_experts(network))
    batches = samples_of(load_reader(network), Texts("stdlib", 0, 0, 256), "evaluate", DOCUMENTS)
    contest = Contest(folder, Plan(identity(network), data=data), 0, batches, known={})
    select = contest_on(request, network)
    scored = dict(zip(WAYS, saliencies(request, network, silent), strict=True))
    generator = torch.Generator().manual_seed(0)
    drawn = [at_random(scored["gated"], generator) for _ in range(DRAWS)]

    def quality(saliency: Scores, candidate: Candidate) -> Quality:
        plan = replace(dense, saliency=saliency).plan(candidate)
        return contest.qualities(without_experts(contest.opened(), plan.units, dense.widths))[1]

    rows = []
    count = dense.widths[0].units
    for share in SHARES:
        units = round(count * (1 - share))
        candidate = Candidate((), {width.name: units for width in dense.widths})
        draws = [quality(saliency, candidate) for saliency in drawn]
        chance = sorted(draws, key=lambda q: q.estimate("kl").value)[DRAWS // 2]
        found = {f"at random, median of {DRAWS}": chance}
        found |= {TOLD[way]: quality(saliency, candidate) for way, saliency in scored.items()}
        best = best_saliency(dense, list(scored.values()), candidate, select, silent)
        found["the best on the select split"] = quality(best, candidate)
        for name, one in found.items():
            ratio = "" if one is chance else one.against(chance, "kl")
            rows.append((f"{share:.0%}", units, name, one.estimate("kl"), ratio))
    header = ("experts out", "left", "chosen by", "KL (nats/token)", "over random")
    table(f"Experts left out of a mixture of {count} a layer, balance {balance}", header, rows)


def main(words: Sequence[str] = ()) -> None:
    """Train the mixtures, if they are not there, and print a table for each."""
    steps = int(words[0]) if words else STEPS
    with tempfile.TemporaryDirectory() as made:
        for balance in BALANCES:
            folder = Path(words[1] if len(words) > 1 else made) / str(balance)
            if not (folder / "config.json").exists():
                train(folder, steps, balance)
            compared(folder, balance)


if __name__ == "__main__":
    main(sys.argv[1:])
