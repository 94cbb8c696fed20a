"""Tail exponents beside those of the `weightwatcher` package, which has an environment of its own.

    python -m benchmarks.weightwatcher FOLDER     a virtual environment; made there if it is none

The package is installed there and nowhere else; torch comes from this environment. Compared are
all matrices of the demo model: alpha, the largest eigenvalue, the stable rank, and alpha-hat.
"""

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from benchmarks.apart import environment, found_by
from benchmarks.timing import table
from layerwise.core.open import open_network
from layerwise.describe.weights import squared_values, tail_index
from layerwise.jobs.inspect import fetch

#: runs in the other environment: an nn.Linear per matrix, analysed as the package does by default
THEIRS = """
import sys, json
sys.path.append(sys.argv[2])
import torch, weightwatcher
held = torch.load(sys.argv[1], weights_only=True)
net = torch.nn.ModuleDict()
for i, w in enumerate(held.values()):
    net[f"m{i}"] = torch.nn.Linear(w.shape[1], w.shape[0], bias=False)
    net[f"m{i}"].weight.data = w
found = weightwatcher.WeightWatcher(model=net).analyze(min_evals=10)
names = list(held)
rows = {}
for _, row in found.iterrows():
    key = names[int(row["longname"].rpartition("m")[2])]
    rows[key] = {k: float(row[k]) for k in ("alpha", "lambda_max", "stable_rank", "alpha_weighted")}
print("FOUND" + json.dumps({"version": weightwatcher.__version__, "rows": rows}))
"""


def theirs(folder: Path, matrices: dict[str, torch.Tensor]) -> dict:
    """What the package says of some matrices."""
    python = environment(folder, ["weightwatcher"])
    with TemporaryDirectory() as place:
        held, here = Path(place) / "matrices.pt", Path(torch.__file__).parents[1]
        torch.save(matrices, held)
        found = found_by(python, THEIRS, held, here, cwd=place)
    if "error" in found:
        raise SystemExit(f"weightwatcher failed: {found['error']}")
    return found


def ours(weight: torch.Tensor) -> dict[str, float]:
    values = squared_values(weight, exact=4096)
    alpha, largest = tail_index(values), values.max().item()
    stable = values.sum().item() / largest
    hat = alpha * torch.tensor(largest).log10().item()
    return {"alpha": alpha, "lambda_max": largest, "stable_rank": stable, "alpha_weighted": hat}


def main(folder: str) -> None:
    """Print the table."""
    network = open_network("demo", dtype="float32").load()
    keys = [layer.key for layer in network.layers()]
    matrices = {name: w.contiguous() for key in keys for name, w in fetch(network, key).items()}
    found = theirs(Path(folder), matrices)
    rows = []
    for name in ("alpha", "lambda_max", "stable_rank", "alpha_weighted"):
        pairs = [(ours(matrices[key])[name], row[name]) for key, row in found["rows"].items()]
        gaps = [abs(a - b) / max(abs(b), 1e-12) for a, b in pairs]
        means = [sum(side) / len(pairs) for side in zip(*pairs, strict=True)]
        rows.append((name, len(pairs), *(f"{m:.4f}" for m in means), f"{max(gaps):.1e}"))
    header = ("figure", "matrices", "layerwise", "weightwatcher", "largest relative difference")
    table(f"weightwatcher {found['version']}, demo model", header, rows)


if __name__ == "__main__":
    main(sys.argv[1])
