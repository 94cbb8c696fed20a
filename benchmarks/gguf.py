"""At equal bytes, our plans against llama.cpp's own mixtures of types, in llama.cpp itself.

python -m benchmarks.gguf               all tables
python -m benchmarks.gguf mixtures      plans of ours over mixtures
python -m benchmarks.gguf codes         one type everywhere, its codes chosen anew
python -m benchmarks.gguf codes demo    on one of the two models
"""

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.models import Model, models
from benchmarks.timing import table
from layerwise.core.data import Texts
from layerwise.core.open import open_network
from layerwise.core.plan import DataSpec, Edit, Plan, Step
from layerwise.core.quality import Quality, measure_quality
from layerwise.core.reader import samples_of
from layerwise.export import TARGETS
from layerwise.export._gguf_file import FILE
from layerwise.jobs.apply import apply_plan
from layerwise.jobs.bits import plan_bits
from layerwise.jobs.engine import in_llama
from layerwise.jobs.mixes import mix_plan, written_bytes
from layerwise.jobs.request import Request, identity
from layerwise.jobs.session import Budget, load_reader, silent
from layerwise.jobs.stock import streamed

MIXTURES = ("Q2_K", "Q3_K_M", "Q4_K_M")
TYPES = ("Q2_K", "Q3_K", "Q4_K")
#: what may follow the encoder, under the name that the table gives it
AFTER = {
    "llama.cpp's encoder": (),
    "then feedback": (Step("refine", {"by": "feedback"}),),
    "then descent": (Step("refine"),),
}


def main(words: Sequence[str] = ()) -> None:
    """Print the tables of both models, or those that are named."""
    tables = {"mixtures": mixtures, "codes": codes}
    for model in models():
        if not {"demo", "second"} & {*words} or model.name in words:
            bench = Bench(model)
            for name in [word for word in words if word in tables] or tables:
                tables[name](bench)


class Bench:
    """A model, its text, and what the original answers."""

    def __init__(self, model: Model, documents: int = 48, length: int = 256) -> None:
        self.model = model
        self.data = DataSpec(source=model.data, samples=64, length=256)
        self.network = open_network(model.folder, dtype="float32")
        texts = Texts(model.data, 0, 0, length)
        self.batches = samples_of(load_reader(self.network), texts, "evaluate", documents)
        with streamed(self.network, self.batches) as answers:
            self.original = [answers(batch) for batch in self.batches]

    def measure(self, plan: Plan) -> Quality:
        """Quality of a plan's file, run by llama.cpp, against the original."""
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder, "out")
            apply_plan(self.model.folder, plan, out, check=False)
            before = iter(self.original)
            with in_llama(out / FILE, self.batches) as answers:
                return measure_quality(self.batches, lambda batch: next(before), answers)[1]

    def table(self, title: str, over: str, rows: Sequence[Any]) -> None:
        """Print a table of plans, their bytes and their KL."""
        header = ("plan", "bytes", "KL (nats/token)", f"over {over}")
        table(f"GGUF in llama.cpp, {self.model.name} model, {title}", header, rows)


def codes(bench: Bench) -> None:
    """KL of every type as its encoder leaves it, and with codes chosen on the inputs."""
    rows = []
    for name in TYPES:
        base = None
        for what, after in AFTER.items():
            edits = (Edit("*", (Step("ggml", {"type": name}), *after)),)
            plan = Plan(identity(bench.network), target="gguf", data=bench.data, edits=edits)
            found, nbytes = bench.measure(plan), written_bytes(bench.network, plan)
            base = base or found
            kl, ratio = found.estimate("kl"), found.against(base, "kl")
            rows.append((f"{name}, {what}", f"{nbytes:,}", kl, ratio))
    bench.table("one type everywhere", "its encoder", rows)


def mixtures(bench: Bench) -> None:
    """KL of both at the bytes of every mixture, importance measured on the same text."""
    model, network, data = bench.model, bench.network, bench.data
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
        base, found = bench.measure(theirs), bench.measure(planned.plan)
        for what, quality, nbytes in ((name, base, limit), ("ours", found, planned.nbytes)):
            ratio = quality.against(base, "kl")
            rows.append((what, f"{nbytes:,}", quality.estimate("kl"), ratio))
    bench.table("importance matrix", "the mixture", rows)


if __name__ == "__main__":
    main(sys.argv[1:])
