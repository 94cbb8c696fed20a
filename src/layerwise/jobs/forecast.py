"""What a job will take, said before its first layer."""

from collections.abc import Sequence

from layerwise.core.method import find
from layerwise.core.network import Network
from layerwise.core.plan import Heal, Plan, Step, chains_of
from layerwise.core.stops import Batch
from layerwise.export import TARGETS

#: hidden states that a batch holds while it waits before an operation of a layer, at most
HELD = 7


def memory_to_solve(
    network: Network, batches: Sequence[Batch], needs: Sequence[str]
) -> dict[str, int]:
    """A layer with its edited copy and its records, what batches hold at a pause, and moments."""
    layers = network.layers()
    matrices = [matrix for layer in layers for matrix in layer.matrices]
    weights = max((sum(m.size for m in layer.matrices) for layer in layers), default=0)
    width = max((min(m.shape) for m in matrices), default=0)
    inner = max((m.shape[1] for m in matrices), default=0)
    known = [[t.numel() for t in b.values() if not t.is_floating_point()] for b in batches]
    tokens = sum(max(counts, default=0) for counts in known)
    return {
        "a layer and its edits": (network.dtype.itemsize + 8) * weights,
        "hidden states": HELD * tokens * width * network.dtype.itemsize,
        "moments": 8 * inner**2 if needs else 0,
    }


def memory_to_rewrite(network: Network, steps: Sequence[Step]) -> dict[str, int]:
    """What is known of the inputs of a layer, all of it at once."""
    if not any(find(step.method, "rewrite").needs for step in steps):
        return {}
    widths = [{m.inputs: m.shape[1] for m in layer.matrices} for layer in network.layers()]
    sizes = (sum(width**2 for width in own.values()) for own in widths)
    return {"moments of a layer": 4 * max(sizes, default=0)}


def memory_of_models(network: Network, count: int) -> dict[str, int]:
    """Whole models in float32, and room for what they compute."""
    parameters = sum(p.numel() for p in network.module.parameters())
    return {f"{count} in float32 of the whole model": 4 * count * parameters}


def memory_to_heal(network: Network, how: Heal) -> dict[str, int]:
    """Both models and what is trained of one, or what a layer and its batches take."""
    if how.mode != "layers":
        return memory_of_models(network, 3 if how.mode == "adapters" else 7)
    layers = network.layers()
    widest = max(min(m.shape) for layer in layers for m in layer.matrices)
    weights = max(sum(m.size for m in layer.matrices) for layer in layers)
    return {
        "a layer in training": 4 * 7 * weights,
        "hidden states": 4 * 2 * how.samples * how.length * widest,
    }


def disk_to_apply(network: Network, plan: Plan) -> dict[str, int]:
    """The result, and the journal beside it: a code of a byte and its scales per weight."""
    target, itemsize = TARGETS[plan.target], network.stored.dtype.itemsize
    result, journal, chain_of = network.stored.nbytes, 0, chains_of(plan.edits)
    for layer in network.layers():
        for matrix in layer.matrices:
            chain = chain_of(matrix)
            result += target.nbytes(matrix, chain, itemsize) - matrix.size * itemsize
            journal += matrix.size * 5 // 4 if chain else 0
    return {"result": result, "journal": journal}
