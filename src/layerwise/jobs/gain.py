"""What solving gains over plain rounding, which errors of options are told by."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from layerwise.core.chain import nearest, run_chain
from layerwise.core.lockstep import walk
from layerwise.core.method import find
from layerwise.core.network import Network
from layerwise.core.plan import Step
from layerwise.core.reader import windows
from layerwise.core.stats import Gathering
from layerwise.core.stops import Stop
from layerwise.jobs.request import Request
from layerwise.jobs.session import load_reader, texts_of
from layerwise.jobs.solve import relative_error

Chain = tuple[Step, ...]
#: windows of text on which it is measured, and weights of a matrix
SAMPLES, WEIGHTS = 16, 1 << 17


def solver_gain(
    request: Request, network: Network, chains: Mapping[str, Chain]
) -> dict[str, float]:
    r"""Error of every chain with statistics over that of its plain rounding, on the middle layer.

    `sum_m e_m(solved) / sum_m e_m(plain)` over the matrices of the layer, where
    `e_m = tr(E H E^T) / tr(W H W^T)` with the second moment `H` of the matrix's inputs.

    Args:
        request: says on which data.
        network: the original.
        chains: what menus offer, by name.
    """
    names = dict.fromkeys(
        n for chain in chains.values() for s in chain for n in find(s.method, "weight").needs
    )
    if not names:
        return dict.fromkeys(chains, 1.0)
    probes = {name: find(name, "measure").bind()() for name in (*names, "second_moment")}
    texts = texts_of(request.data)
    few = texts._replace(samples=min(texts.samples, SAMPLES))
    batches = windows(load_reader(network), few, "calibrate")
    gathering = Gathering(probes, batches)
    layers = network.layers()
    middle = layers[len(layers) // 2].key
    errors = {name: [0.0, 0.0] for name in chains}
    clean = any(probe.clean for probe in probes.values())
    for stop in walk(network, batches, matrices="pause", clean=clean):
        if stop.layer.key == middle:
            gathering.look(stop)
            _compare(stop, gathering, chains, errors)
            if stop.kind == "leave":
                break
    return {name: solved / plain if plain else 1.0 for name, (solved, plain) in errors.items()}


def _compare(
    stop: Stop,
    gathering: Gathering,
    chains: Mapping[str, Chain],
    errors: Mapping[str, list[float]],
) -> None:
    """Add the errors of the matrices at a stop, solved and plain."""
    for rows in stop.rows if stop.kind == "at" else ():
        stats = gathering.take(rows.inputs)
        for matrix in rows.matrices:
            weight = stop.weight(matrix)
            some = weight[:: max(1, matrix.size // WEIGHTS)].contiguous()
            for name, chain in chains.items():
                errors[name][0] += _error(some, stats, chain, stats)
                errors[name][1] += _error(some, {}, nearest(chain), stats)


def _error(
    weight: Tensor, given: Mapping[str, Any], chain: Chain, stats: Mapping[str, Any]
) -> float:
    record = run_chain(weight, given, chain)
    return relative_error(weight, record, stats["second_moment"])
