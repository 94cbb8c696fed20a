"""What looking costs: one pass with measures over a plain forward of the same batches."""

from functools import partial

from benchmarks.timing import interleaved, table
from layerwise.core.data import Texts
from layerwise.core.network import Network
from layerwise.core.open import open_network
from layerwise.core.reader import windows
from layerwise.jobs.inspect import inspect_model
from layerwise.jobs.session import load_reader
from layerwise.jobs.wanted import MEASURES, Wanted

#: without a gradient, a second forward, or an eigenvalue problem per document or matrix
ALSO = {
    "token_sample": ("token_sample",),
    "depth_use": ("depth_use",),
    "spread": ("spread",),
    "similarity": ("similarity",),
    "lens": ("lens",),
    "direct_match": ("direct_match",),
    "voids": ("voids",),
    "stream_moments": ("stream_moments",),
    "canonical": ("canonical",),
    "update_fit": ("update_fit",),
    "document_geometry": ("document_geometry",),
    "position_parts": ("position_parts",),
    "head_patterns": ("head_patterns",),
    "neuron_means": ("neuron_means",),
    "spectrum (no data)": ("spectrum",),
    "default": MEASURES,
    "default and voids, direct_match, update_fit, canonical": (
        *MEASURES,
        *("voids", "direct_match", "update_fit", "canonical", "position_parts"),
    ),
}


def _forward(network: Network, batches: list) -> None:
    import torch

    with torch.no_grad():
        for batch in batches:
            inputs = {k: v for k, v in batch.items() if k != "labels"}
            network.module(**inputs, use_cache=False)


def main() -> None:
    """Print the table."""
    network = open_network("demo", dtype="float32").load()
    reader = load_reader(open_network("demo"))
    batches = windows(reader, Texts(samples=16, length=512), "calibrate")
    tasks = {"plain forward": partial(_forward, network, batches)}
    for name, measures in ALSO.items():
        tasks[name] = partial(inspect_model, network, batches, Wanted(measures))
    found = interleaved(tasks, repeats=2)
    plain = found["plain forward"][0]
    rows = [(name, f"{s:.2f} s", f"{s / plain:.2f}") for name, (s, _) in found.items()]
    table("Inspecting 16 x 512 tokens, demo model, float32", ("what", "time", "ratio"), rows)


if __name__ == "__main__":
    main()
