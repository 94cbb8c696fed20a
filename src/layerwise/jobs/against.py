"""Two models side by side: the figures of both, how alike their layers are, how far they turned."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from layerwise.core.data import Texts
from layerwise.core.network import Network
from layerwise.core.open import open_network
from layerwise.core.stats import Stats
from layerwise.core.stops import Batch
from layerwise.core.tokens import Sample
from layerwise.describe.similarity import boundaries, cka_map, match_map
from layerwise.jobs.inspect import inspect_model
from layerwise.jobs.inspected import Inspected
from layerwise.jobs.session import Progress, silent
from layerwise.jobs.wanted import MEASURES, Wanted


def inspect_models(
    model: Any,
    against: Any = "",
    texts: Texts | Sequence[Batch] = Texts(),
    wanted: Wanted = Wanted(),
    *,
    device: str = "auto",
    dtype: str = "auto",
    progress: Progress = silent,
    say: Callable[[str], None] = lambda line: None,
) -> Inspected:
    """Inspect a model, alone or beside another one.

    Args:
        model: a folder, hub id, `demo`, or an opened network.
        against: another one of these; nothing without it.
        texts: the calibrate part of it is read, by both; or batches.
        wanted: names of measures and descriptions, their options, labelled documents.
        device: where to compute.
        dtype: in which type to compute.
        progress: called with what is done, how far, and out of how much.
        say: told what costs more than the pass, before it starts.

    Returns:
        The first model's layers; beside each its partner at the same relative depth in the other
        model, whose figures end in ` (B)`. Where both read the same tokens, maps of CKA and of the
        error of the best affine map between their layers; where a layer's matrices have the
        shapes of its partner's, their rotation.
    """
    if not against:
        options = {"device": device, "dtype": dtype, "progress": progress, "say": say}
        return inspect_model(model, texts, wanted, **options)
    first, second = (
        m if isinstance(m, Network) else open_network(m, device=device, dtype=dtype)
        for m in (model, against)
    )
    alike = same_shapes(first, second)
    mine = wanted
    if alike and wanted.measures == MEASURES:
        mine = replace(wanted, measures=(*MEASURES, "rotation"))
    reference = second if alike else None
    a = inspect_model(first, texts, mine, reference=reference, progress=progress, say=say)
    b = inspect_model(second, texts, wanted, progress=progress, say=say)
    maps = cross_maps(first, second, a.stats, b.stats)
    warnings = a.warnings + (() if maps else ("no maps between layers: other tokens or no sample",))
    columns = tuple(c for name in a.columns[:3] for c in (name, f"{name} (B)"))
    turned = ("rotation.rotation",) if alike else ()
    return replace(
        a,
        model=str(model),
        rows=beside(a.rows, b.rows),
        columns=(*columns, *turned),
        warnings=warnings,
        more={**a.more, "against": {**b.more, "maps": maps}},
    )


def same_shapes(first: Network, second: Network) -> bool:
    """Whether the first layers of two networks hold the same matrices."""
    a, b = (network.layers()[0] for network in (first, second))
    return {m.key: m.shape for m in a.matrices} == {m.key: m.shape for m in b.matrices}


def beside(rows: list[dict[str, Any]], others: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every row with the figures of its partner at the same relative depth.

    Example:
        >>> beside([{"layer": "a/0", "x": 1.0}], [{"layer": "b/0", "x": 2.0}])
        [{'layer': 'a/0', 'x': 1.0, 'layer (B)': 'b/0', 'x (B)': 2.0}]
    """
    found = []
    for i, row in enumerate(rows):
        place = round(i * (len(others) - 1) / max(len(rows) - 1, 1))
        partner = {f"{k} (B)": v for k, v in others[place].items() if k not in ("parts",)}
        found.append({**row, **partner})
    return found


def cross_maps(first: Network, second: Network, a: Stats, b: Stats) -> dict[str, list]:
    """CKA and direct matching between the layers of two networks, on the same tokens."""
    sides: list[list[Sample]] = []
    for network, stats in ((first, a), (second, b)):
        found: Mapping[str, Sample] = stats.values.get("token_sample", {})
        mine = [la.key for la in network.stacks[-1].layers if la.key in found]
        sides.append([found[key] for key in mine])
    if not all(sides) or not torch.equal(sides[0][0].where, sides[1][0].where):
        return {}
    states = [boundaries(side) for side in sides]
    held_out = sides[0][0].where[:, 0] % 2 == 1
    maps = {"cka": cka_map(states[0], states[1]).tolist()}
    if 1 < int(held_out.sum()) < len(held_out) - 1:
        maps["error"] = match_map(states[0], states[1], held_out, 0.001)[1].tolist()
    return maps
