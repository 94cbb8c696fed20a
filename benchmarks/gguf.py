"""At equal bytes, our plans against llama.cpp's own mixtures of types, in llama.cpp itself."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.models import Model, models
from benchmarks.timing import table
from layerwise.core.data import Texts
from layerwise.core.open import open_network
from layerwise.core.plan import DataSpec, Plan
from layerwise.core.quality import Quality, measure_quality
from layerwise.core.reader import samples_of
from layerwise.export import TARGETS
from layerwise.export._gguf_file import FILE
from layerwise.jobs.apply import apply_plan
from layerwise.jobs.bits import plan_bits
from layerwise.jobs.engine import in_llama
from layerwise.jobs.mixes import mix_plan, written_bytes
from layerwise.jobs.request import Request
from layerwise.jobs.session import Budget, load_reader, silent
from layerwise.jobs.stock import streamed

MIXTURES = ("Q2_K", "Q3_K_M", "Q4_K_M")


def main() -> None:
    """Print a table per model."""
    for model in models():
        compare(model)


def compare(model: Model, documents: int = 48, length: int = 256) -> None:
    """KL of both at the bytes of every mixture, importance measured on the same text."""
    data = DataSpec(source=model.data, samples=64, length=256)
    network = open_network(model.folder, dtype="float32")
    texts = Texts(model.data, 0, 0, length)
    batches = samples_of(load_reader(network), texts, "evaluate", documents)
    with streamed(network, batches) as answers:
        original = [answers(batch) for batch in batches]
    rows = []
    for name in MIXTURES:
        theirs = mix_plan(network, name, data)
        limit = written_bytes(network, theirs)
        request = Request(
            model.folder,
            Budget(bytes=limit),
            target="gguf",
            data=data,
            settings={"gguf": theirs.export},
        )
        planned = plan_bits(request, open_network(model.folder), TARGETS["gguf"], silent)
        base = measured(model, theirs, batches, original)
        found = measured(model, planned.plan, batches, original)
        for what, quality, nbytes in ((name, base, limit), ("ours", found, planned.nbytes)):
            ratio = quality.against(base, "kl")
            rows.append((what, f"{nbytes:,}", quality.estimate("kl"), ratio))
    header = ("plan", "bytes", "KL (nats/token)", "over the mixture")
    table(f"GGUF in llama.cpp, {model.name} model, importance matrix", header, rows)


def measured(model: Model, plan: Plan, batches: Sequence[Any], original: Sequence[Any]) -> Quality:
    """Quality of a plan's file, run by llama.cpp, against the original."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "out")
        apply_plan(model.folder, plan, out, check=False)
        before = iter(original)
        with in_llama(out / FILE, batches) as answers:
            return measure_quality(batches, lambda batch: next(before), answers)[1]


if __name__ == "__main__":
    main()
