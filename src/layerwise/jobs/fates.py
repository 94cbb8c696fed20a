"""What becomes of every layer, or part, in an order."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from layerwise.core.absent import absent
from layerwise.core.adapters import nbytes_of
from layerwise.core.errors import first_few
from layerwise.core.network import Network
from layerwise.core.plan import GONE, Plan, chains_of, label
from layerwise.core.stack import Layer, LowRank, Matrix
from layerwise.core.stats import Scores
from layerwise.jobs.units import orders, units_of


def depth_rows(
    network: Network,
    wiring: Mapping[str, list[Any]],
    parts: Sequence[str],
    scores: Scores | None,
    sizes: Mapping[str, int],
    runs: Sequence[str],
    own: Mapping[str, int],
) -> list[dict[str, Any]]:
    """What becomes of every layer, or of every part.

    Their bytes are `sizes` of those that run at all, and `own` of what is added to shared ones.
    """
    into = fates(network, wiring, runs)
    silent = {
        f"{layer.key}/{part.name}"
        for layer in network.layers()
        for part in layer.parts
        for entry in wiring.get(layer.stack, ())
        if isinstance(entry, dict) and entry["layer"] == layer.index
        if part.name not in entry.get("parts", [part.name])
    }
    rows = []
    for key in units_of(network, parts):
        layer = key.rpartition("/")[0] if parts else key
        stays = layer in runs and key not in silent
        rows.append(
            {
                "part" if parts else "layer": key,
                "option": into.get(key, "as is" if stays else "dropped"),
                "bytes": None if parts else sizes[key] * stays + own.get(key, 0),
                "importance": scores.values.get(key) if scores else None,
            }
        )
    return rows


def fates(network: Network, wiring: Mapping[str, list[Any]], runs: Sequence[str]) -> dict[str, str]:
    """What becomes of the layers that are merged, tied, or run several times."""
    times = Counter(runs).items()
    found = {key: f"runs {count} times" for key, count in times if count > 1}
    for name, visits in orders(network, wiring).items():
        for visit in visits:
            merged = [f"{name}/{index}" for index, _ in visit.mix or ()]
            found |= dict.fromkeys(merged, f"merged into {name}/{visit.layer}")
        for visit in visits:
            if isinstance(visit.adapter, LowRank):
                own = f"{name}/{visit.layer} + rank {visit.adapter.rank}"
                found[f"{name}/{visit.adapter.of}"] = own
    return found


def labels_of(network: Network, layer: Layer, plan: Plan) -> dict[Matrix, str]:
    """What every matrix of a layer got, in words; those of parts that do not run are left out."""
    gone, chain_of = absent(layer, network.visits.get(layer.path)), chains_of(plan.edits)
    return {m: GONE if m in gone else label(chain_of(m)) for m in layer.matrices}


def experts_told(plan: Plan, layer: str) -> list[str]:
    """Which experts of a layer of the original stay, in words; nothing where all do.

    Example:
        >>> from layerwise.core.plan import Identity
        >>> plan = Plan(Identity("", ""), units={"num_experts": {"decoder/0": [0, 2, 5, 6, 7]}})
        >>> experts_told(plan, "decoder/0"), experts_told(plan, "decoder/1")
        (['experts 0, 2, 5 and 2 more stay'], [])
    """
    held = (kept[layer] for kept in plan.units.values() if layer in kept)
    return [f"experts {first_few([str(n) for n in numbers])} stay" for numbers in held]


def own_bytes(ordered: Network) -> dict[str, int]:
    """Bytes of every adapter, by the layer that it is computed from."""
    found = {}
    for layer in ordered.layers():
        visit = ordered.visits.get(layer.path)
        if visit is not None and isinstance(visit.adapter, LowRank):
            key = f"{layer.stack}/{visit.adapter.of}"
            found[key] = found.get(key, 0) + nbytes_of(ordered.adapters[layer.path])
    return found
