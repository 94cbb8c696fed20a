"""What the atlas shows of an inspected model, beyond its rows."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from layerwise.core.method import methods
from layerwise.core.network import Network
from layerwise.core.quality import ratio
from layerwise.core.spectra import smaller_gram
from layerwise.core.stack import Layer, Stack
from layerwise.core.stats import Stats
from layerwise.core.task import takes_images
from layerwise.jobs.inspected import Inspected
from layerwise.jobs.pages import write_page
from layerwise.jobs.reading import Read
from layerwise.report.figures import size
from layerwise.report.shapes import Spectrum
from layerwise.report.standout import Relation, stand_out

#: points of a spectrum that are drawn
POINTS = 32
#: what a map is called
TITLES = {"cka": "CKA", "error": "Error of the best affine map"}
#: documents that an interval needs
FEW = 4


class Ends(NamedTuple):
    """Tensors outside of the layers: the modules before the first layer, and after it; bytes."""

    before: tuple[str, ...]
    before_bytes: int
    after: tuple[str, ...]
    after_bytes: int


def write_atlas(found: Inspected, path: Path, reads: Sequence[Read] = ()) -> None:
    """Write the page of an inspected model, with prompts that were read layer by layer."""
    name = "/".join(Path(found.model).parts[-2:])
    sections = atlas_sections(found, reads)
    write_page(path, f"{name}, layer by layer", sections)


def atlas_sections(found: Inspected, reads: Sequence[Read] = ()) -> list[dict[str, Any]]:
    """The sections of the page: stack, what stands out, figures, readings, likeness, spectra.

    Args:
        found: what `inspect` found.
        reads: prompts, read layer by layer.

    Returns:
        Sections for `layerwise.report.page`; a part without figures is left out.
    """
    certain = {k: v for s in found.network.stacks for k, v in intervals(found.stats, s).items()}
    rows = [_with_interval(row, certain) for row in found.rows]
    inside = by_matrix(found)
    keys = [row["layer"] for row in rows]
    maps = relations(found)
    findings = stand_out(found.model, rows, maps)
    maps += beside(found)
    stack = {
        "kind": "stack",
        "title": "The stack",
        "layers": [
            {**row, "parts": shares_of(layer)}
            for row, layer in zip(rows, found.network.layers(), strict=True)
        ],
        "ends": outside(found.network)._asdict(),
        "findings": findings,
        "facts": facts_of(found.network),
        "note": note_of(found, bool(certain)),
    }
    sections = [
        stack,
        {"kind": "standout", "title": "What stands out", "findings": findings, "layers": keys},
        {
            "kind": "figures",
            "title": "Every figure of every layer",
            "layers": [{**row, **inside.get(row["layer"], {})} for row in rows],
            "groups": {m.name: m.summary for f in ("measure", "describe") for m in methods(f)},
        },
    ]
    if reads:
        sections.append(
            {"kind": "reading", "title": "Prompts, read layer by layer", "reads": reads}
        )
    if maps:
        sections.append({"kind": "alike", "title": "Which layers are alike", "maps": maps})
    drawn = spectra(found)
    if drawn:
        sections.append({"kind": "spectra", "title": "Spectra", "spectra": drawn})
    return sections


def by_matrix(found: Inspected) -> dict[str, dict[str, float]]:
    """Figures of single matrices as figures of their layers, experts by their mean.

    A figure is named after its method and itself, then the role: `spectrum alpha.mlp down`.
    """
    held: dict[str, dict[str, list[float]]] = {}
    for method, table in found.figures.items():
        for key, figures in table.values.items():
            layer, slash, role = key.rpartition("/")
            if not slash or "." not in role:
                continue
            role = role.partition("[")[0].replace(".", " ")
            for name, value in figures.items():
                row = held.setdefault(layer, {})
                row.setdefault(f"{method} {name}.{role}", []).append(value)
    return {k: {n: sum(v) / len(v) for n, v in row.items()} for k, row in held.items()}


def _with_interval(row: Mapping[str, Any], certain: Mapping[str, Any]) -> dict[str, Any]:
    if row["layer"] not in certain or "block_influence" not in row:
        return dict(row)
    low, high = certain[row["layer"]]
    return {**row, "block_influence": [row["block_influence"], low, high]}


def intervals(stats: Stats, stack: Stack) -> dict[str, tuple[float, float]]:
    """95% bootstrap interval over documents of one less the cosine of input and output.

    It is centred where the sample is, and shifted to the mean over all tokens, whose documents
    are the same.
    """
    found: dict[str, tuple[float, float]] = {}
    if "token_sample" not in stats.values:
        return found
    means = stats.values.get("residual_cosine", {})
    for key, sample in stats.along("token_sample", stack).items():
        documents = sample.where[:, 0].numpy()
        if sample.before.shape != sample.after.shape or len(set(documents)) < FEW:
            continue
        cosine = torch.cosine_similarity(sample.before.float(), sample.after.float(), dim=1)
        counts = np.bincount(documents)
        sums = np.bincount(documents, cosine.double().numpy())[counts > 0]
        drawn = ratio(sums, counts[counts > 0].astype(float))
        middle = means.get(key, drawn.value)
        found[key] = (
            max(1 - middle - (drawn.high - drawn.value), 0.0),
            1 - middle + drawn.value - drawn.low,
        )
    return found


def shares_of(layer: Layer) -> dict[str, float]:
    """The share of every part in the weights of a layer, in the order of the parts."""
    sizes = {part.name: 0 for part in layer.parts}
    for matrix in layer.matrices:
        sizes[matrix.part] = sizes.get(matrix.part, 0) + matrix.size
    total = sum(sizes.values())
    return {name: size / total for name, size in sizes.items() if size} if total else {}


def outside(network: Network) -> Ends:
    """What stands before and after the layers, by the order in which modules are registered."""
    layers = tuple(f"{layer.path}." for layer in network.layers())
    stored: dict[str, int] = {}
    if network.source is not None:
        for name, owner in network.stored.owner.items():
            size = network.checkpoint.tensors[name].nbytes
            stored[owner] = stored.get(owner, 0) + size
    sides: tuple[dict[str, int], dict[str, int]] = ({}, {})
    inside, seen = 0, set[int]()
    for name, parameter in network.module.named_parameters(remove_duplicate=False):
        if name.startswith(layers):
            inside = 1
            continue
        owner = name.split(".")[-2] if "." in name else name
        size = stored.get(name, parameter.numel() * parameter.element_size())
        if id(parameter) in seen:
            owner, size = f"{owner} (tied)", 0
        seen.add(id(parameter))
        sides[inside][owner] = sides[inside].get(owner, 0) + size
    before, after = sides
    return Ends(tuple(before), sum(before.values()), tuple(after), sum(after.values()))


def facts_of(network: Network) -> list[str]:
    """What the model is, in a few words each."""
    count = sum(p.numel() for p in network.module.parameters())
    sizes = [(1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"), (1, "")]
    unit, letter = next((u, x) for u, x in sizes if count >= u or u == 1)
    stacks = [f"{s.name} of {counted(len(s.layers), 'layer')}" for s in network.stacks]
    total = network.checkpoint.nbytes if network.source is not None else 0
    held = [size(total)] if total else []
    kind = str(network.dtype).removeprefix("torch.")
    return [f"{count / unit:.3g}{letter} parameters", *held, *stacks, f"computed in {kind}"]


def counted(count: int, name: str) -> str:
    """A number of things.

    Example:
        >>> counted(1, "layer"), counted(2, "layer")
        ('1 layer', '2 layers')
    """
    return f"{count} {name}{'s' * (count != 1)}"


def note_of(found: Inspected, certain: bool) -> str:
    """What the figures are computed on, and how sure they are."""
    said = f"Measured in one pass over {found.data}, the network unchanged"
    samples = list(found.stats.values.get("token_sample", {}).values())
    if samples:
        where = samples[-1].where
        kind = "image" if takes_images(found.network.module) else "document"
        documents = counted(len(set(where[:, 0].tolist())), kind)
        said += f"; CKA, ranks, spectra and lens on a sample of {len(where)} tokens of {documents}"
    if not certain:
        return f"{said}. All figures are point estimates, without intervals."
    return (
        f"{said}. Block influence, one less the cosine between what enters and what leaves a "
        "layer, has a 95% bootstrap interval over the documents of the sample, which is rather too "
        "wide than too narrow; all else is a point estimate on the same data."
    )


def relations(found: Inspected) -> list[Relation]:
    """CKA between all layers of each stack."""
    table = found.figures.get("similarity")
    result = []
    for name, map_ in (table.maps if table else {}).items():
        stack = next((s for s in found.network.stacks if name.startswith(f"{s.name} ")), None)
        layers = [la.key for la in (stack.layers if stack else found.network.layers())]
        keys = ["input", *layers][-len(map_) :]
        if len(keys) == len(map_):
            result.append(Relation(name.replace("cka", TITLES["cka"]), keys, keys, _rounded(map_)))
    return result


def beside(found: Inspected) -> list[Relation]:
    """Maps between the layers of two models, by their numbers."""
    result = []
    for name, map_ in found.more.get("against", {}).get("maps", {}).items():
        rows, columns = (["input", *map(str, range(n - 1))] for n in (len(map_), len(map_[0])))
        title = f"{TITLES.get(name, name)} with the other model (across)"
        result.append(Relation(title, rows, columns, _rounded(torch.tensor(map_))))
    return result


def _rounded(map_: Tensor) -> list[list[float]]:
    return [[round(x, 3) for x in row] for row in map_.tolist()]


def variances(x: Tensor) -> Tensor:
    """Shares of the variance of rows along their principal directions, largest first.

    Example:
        >>> variances(torch.tensor([[2.0, 0.0], [-2.0, 0.0], [0.0, 1.0], [0.0, -1.0]]))
        tensor([0.8000, 0.2000])
    """
    centred = x - x.mean(0)
    found = torch.linalg.eigvalsh(smaller_gram(centred)).clamp_min(0).flip(0)
    return found / found.sum().clamp_min(1e-300)


def spectra(found: Inspected) -> list[Spectrum]:
    """Of the states after every layer, and of its matrices where `spectrum` was measured."""
    result = []
    states: dict[str, list[tuple[int, float]]] = {}
    for stack in found.network.stacks if "token_sample" in found.stats.values else ():
        for key, sample in found.stats.along("token_sample", stack).items():
            p = variances(sample.after.double())
            ranks = sorted({round(x) for x in np.geomspace(1, len(p), POINTS)})
            states[key] = _positive((r, p[r - 1].item()) for r in ranks)
    if states:
        result.append(Spectrum("States after every layer", "share of variance", states))
    table = found.figures.get("spectrum")
    for name, map_ in (table.maps if table else {}).items():
        stack, _, role = name.rpartition(" ")
        layers = [la.key for la in found.network.layers() if stack in ("", la.stack)]
        ranks, *rows = map_.tolist()
        curves = {
            key: _positive(zip(map(int, ranks), row, strict=True))
            for key, row in zip(layers, rows, strict=True)
        }
        title = f"{stack} {role}".strip()
        result.append(Spectrum(title, "singular value", {k: v for k, v in curves.items() if v}))
    return result


def _positive(points: Iterable[tuple[int, float]]) -> list[tuple[int, float]]:
    return [(rank, float(f"{value:.3g}")) for rank, value in points if value > 1e-12]
