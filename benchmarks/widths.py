"""Which architectures can be made narrower: every width halved, written, and reloaded.

python -m benchmarks.widths [workers]           tiny random models of all types of the test suite
python -m benchmarks.widths [workers] experts   of those with experts: one fewer of every group
"""

import os
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from benchmarks.timing import table

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "architectures"))


def halved(entry: tuple[str, ...]) -> tuple[str, str, str]:
    """The task, what became of a type, and which fields of its configuration were halved."""
    import torch
    from build import Entry, build
    from checks import _limited
    from subject import Subject

    import layerwise.families
    from layerwise.core.find_widths import find_widths, readers
    from layerwise.core.plan import Edit, Step
    from layerwise.jobs.apply import apply_plan

    assert layerwise.families
    torch.set_num_threads(1)
    task, kind = entry[0], entry[1]
    try:
        with tempfile.TemporaryDirectory() as folder, _limited(120):
            subject = Subject(Entry(*entry), build(Entry(*entry)), Path(folder))
            network = subject.network
            fields: dict[str, int] = {}
            edits = []
            for width in find_widths(network):
                units = max(1, width.units // 2)
                fields |= width.values(units)
                for place, matrix in readers(network, width):
                    options = {"share": units / width.units, "pattern": f"column:{place.block}"}
                    edits.append(Edit(matrix.key, (Step("magnitude", options),)))
            if not fields:
                return task, "no width found", kind
            plan = subject.plan(target="hf", widths=fields, edits=tuple(edits))
            apply_plan(subject.folder / "model", plan, Path(folder) / "out", dtype="float32")
            return task, "written and reloaded", f"{kind}: {', '.join(fields)}"
    except BaseException as error:  # a type that cannot be built or opened, or a refusal
        return task, f"refused: {type(error).__name__}", f"{kind}: {str(error)[:300]}"


def fewer(entry: tuple[str, ...]) -> tuple[str, str, str]:
    """The task, what became of a type, and which experts it can lose; nothing without experts."""
    import torch
    from build import Entry, build, example
    from checks import _limited
    from subject import Subject

    import layerwise.families
    from layerwise.core.find_experts import find_experts
    from layerwise.core.stats import observe
    from layerwise.jobs.apply import apply_plan
    from layerwise.measure.experts import expert_use

    assert layerwise.families
    torch.set_num_threads(1)
    task, kind = entry[0], entry[1]
    try:
        with tempfile.TemporaryDirectory() as folder, _limited(120):
            model = build(Entry(*entry))
            subject = Subject(Entry(*entry), model, Path(folder))
            network = subject.network
            if all(m.expert is None for layer in network.layers() for m in layer.matrices):
                return task, "", kind
            widths = find_experts(network)
            if not widths:
                return task, "no experts found", kind
            units = {}
            for width in widths:
                span = width.units // width.spans
                kept = [n for n in range(width.units) if n % span]
                units[width.name] = dict.fromkeys(width.places[0].layers, kept)
            plan = subject.plan(target="hf", units=units)
            apply_plan(subject.folder / "model", plan, Path(folder) / "out", dtype="float32")
            use = observe(network, [example(Entry(*entry), model)], {"use": expert_use()})["use"]
            scored = all(len(use[key]) for kept in units.values() for key in kept)
            what = "written and reloaded" if scored else "written and reloaded, by hand only"
            return task, what, f"{kind}: {', '.join(units)}"
    except BaseException as error:  # a type that cannot be built or opened, or a refusal
        return task, f"refused: {type(error).__name__}", f"{kind}: {str(error)[:300]}"


def main(words: Sequence[str] = ()) -> None:
    """Print how many types of every task can be made narrower, and what hindered the others."""
    from build import entries

    workers = int(words[0]) if words else os.cpu_count()
    of_experts = "experts" in words
    with ProcessPoolExecutor(workers) as pool:
        found = list(
            pool.map(fewer if of_experts else halved, [tuple(entry) for entry in entries()])
        )
    found = [row for row in found if row[1]]
    counts = Counter((task, what) for task, what, _ in found)
    rows = [(task, what, str(count)) for (task, what), count in sorted(counts.items())]
    for row in sorted(found):
        print(*row, sep="\t", file=sys.stderr)
    title = "One expert fewer of every group" if of_experts else "Every width halved"
    table(title, ("task", "came to", "types"), rows)


if __name__ == "__main__":
    main(sys.argv[1:])
