"""One budget for bits and layers, and for bits and parts, against bits alone.

python -m benchmarks.joint                       both models, every size
python -m benchmarks.joint demo gguf 2.0 2.5     one model, one target, some sizes
python -m benchmarks.joint demo compact          parts as well, which the others store as zeros
"""

import sys
from collections.abc import Sequence

from benchmarks.models import Model, models
from benchmarks.timing import table
from layerwise.core.errors import LayerwiseError
from layerwise.core.open import open_network
from layerwise.core.plan import DataSpec
from layerwise.core.quality import Quality
from layerwise.core.reader import samples_of
from layerwise.jobs.contest import Contest
from layerwise.jobs.plan import make_plan
from layerwise.jobs.request import Request
from layerwise.jobs.session import Budget, load_reader, silent, texts_of

DOCUMENTS, SIZES = 24, (2.0, 2.5, 3.0)
#: types down to the smallest that llama.cpp has
TYPES = [*("Q6_K", "Q4_K", "IQ4_XS", "Q3_K", "IQ3_XXS", "Q2_K"), *("IQ2_XS", "IQ2_XXS", "IQ1_S")]
WIDTHS = {"bits": [2, 3, 4, 5, 6, 8]}
MENUS = {"gguf": {"type": TYPES}, "compressed-tensors": WIDTHS, "compact": WIDTHS}


def request_for(model: Model, target: str, bits: float) -> Request:
    """Half a minute of calibration, and the menu of a target."""
    data = DataSpec(model.data, 0, 32, 512)
    return Request(
        model.folder, Budget(bits=bits), target, data=data, settings={"menu": MENUS[target]}
    )


def quality(model: Model, request: Request) -> tuple[Quality, int, int] | None:
    """What a plan comes to, the layers or parts that it leaves out, and its bytes."""
    try:
        planned = make_plan(request, silent)
    except LayerwiseError:
        return None
    network = open_network(model.folder)
    texts = texts_of(request.data)._replace(length=256)
    batches = samples_of(load_reader(network), texts, "evaluate", DOCUMENTS)
    found = Contest(model.folder, planned.plan, 0, batches).solved(planned.plan)
    taken = next((row for row in planned.edge if row["chosen"]), {})
    gone = next((count for name, count in taken.items() if name.endswith("left out")), 0)
    return found, gone, planned.nbytes


def compared(model: Model, target: str, sizes: Sequence[float], what: str) -> None:
    """A row per size: bits alone, both, and their ratio."""
    rows = []
    for bits in sizes:
        request = request_for(model, target, bits)
        if target == "compact":
            request = request._replace(method="gptq")
        alone = quality(model, request)
        both = quality(model, request._replace(allow=("bits", what)))
        assert both is not None
        kl, gone, nbytes = both[0].estimate("kl"), both[1], both[2]
        before = alone[0].estimate("kl") if alone else "cannot be reached"
        ratio = both[0].against(alone[0]) if alone else ""
        rows.append((bits, f"{nbytes / 1e6:.2f} MB", before, kl, gone, ratio))
    header = ("bits", "all tensors", "KL, bits alone", f"KL, bits and {what}s", f"{what}s out")
    title = f"Bits and {what}s under one budget, {model.name} model, {target}"
    table(title, (*header, "ratio"), rows)


def main(names: Sequence[str] = ()) -> None:
    """Print a table per model and target."""
    chosen = {model.name: model for model in models()}
    wanted = [chosen[n] for n in names if n in chosen] or list(chosen.values())
    targets = [n for n in names if n in MENUS] or list(MENUS)
    sizes = [float(n) for n in names if n not in chosen and n not in MENUS] or SIZES
    for model in wanted:
        for target in targets:
            for what in ("layer", "part") if target == "compact" else ("layer",):
                compared(model, target, sizes, what)


if __name__ == "__main__":
    main(sys.argv[1:])
