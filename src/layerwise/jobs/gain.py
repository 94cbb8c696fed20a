"""What options come to with statistics, where errors are told without."""

from collections.abc import Mapping
from contextlib import closing
from dataclasses import replace

from layerwise.core.chain import nearest, run_chain
from layerwise.core.damage import Damage, Menu
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
#: what errors are told of that lie in no direction
PLAIN: Chain = (Step("rtn", {"bits": 4}),)


def as_solved(
    damage: Damage, menus: Mapping[str, Menu], request: Request, network: Network
) -> Damage:
    """The damage of options as they are solved on their inputs, not as they are without."""
    chains = {o.label: o.chain for menu in menus.values() for o in menu.options if o.chain}
    gain = solver_gain(request, network, chains)
    values = {
        g: tuple(
            v * gain.get(o.label, 1.0) for v, o in zip(damage.values[g], menu.options, strict=True)
        )
        for g, menu in menus.items()
    }
    return replace(damage, values={**damage.values, **values})


def solver_gain(
    request: Request, network: Network, chains: Mapping[str, Chain]
) -> dict[str, float]:
    r"""What the inputs see of every chain over what its weights tell, on the middle layer.

    `(sum_m e_m(solved) / sum_m w_m(plain)) / (sum_m e_m(rounded) / sum_m w_m(rounded))` over the
    matrices of the layer, where `e_m = tr(E H E^T) / tr(W H W^T)` with the second moment `H` of the
    inputs of the matrix, and `w_m = |E|^2 / |W|^2`. Rounding to 4 bits is what errors without a
    direction are like: it comes to 1, solvers to less. So a matrix of low rank is weighed
    against bits by what it leaves out of the inputs that there are.

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
    asked = {**chains, "": PLAIN}
    errors = {name: [0.0, 0.0] for name in asked}
    clean = any(probe.clean for probe in probes.values())
    with closing(walk(network, batches, matrices="pause", clean=clean)) as stops:
        for stop in stops:
            if stop.layer.key == middle:
                gathering.look(stop)
                _compare(stop, gathering, asked, errors)
                if stop.kind == "leave":
                    break
    seen = {name: solved / plain if plain else 1.0 for name, (solved, plain) in errors.items()}
    return {name: seen[name] / (seen[""] or 1.0) for name in chains}


def _compare(
    stop: Stop,
    gathering: Gathering,
    chains: Mapping[str, Chain],
    errors: Mapping[str, list[float]],
) -> None:
    """Add the errors of the matrices at a stop: solved, as inputs see them, and plain."""
    for rows in stop.rows if stop.kind == "at" else ():
        stats = gathering.take(rows.inputs)
        for matrix in rows.matrices:
            weight = stop.weight(matrix)
            some = weight[:: max(1, matrix.size // WEIGHTS)].contiguous()
            for name, chain in chains.items():
                solved = run_chain(some, stats if name else {}, chain)
                errors[name][0] += relative_error(some, solved, stats["second_moment"])
                errors[name][1] += relative_error(some, run_chain(some, {}, nearest(chain)), None)
