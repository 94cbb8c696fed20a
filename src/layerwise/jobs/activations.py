"""Edits of activations in force: as interventions, and the multiplications that they leave."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor

from layerwise.core.method import find
from layerwise.core.network import Network
from layerwise.core.sites import At, Intervention
from layerwise.core.stack import Matrix
from layerwise.core.stats import Stats, observe
from layerwise.core.stops import Batch
from layerwise.edit.activation.zeros import WRITERS


class Met(NamedTuple):
    """What matrices received while edits were in force, by their key: entries, and those not 0."""

    entries: dict[str, int]
    kept: dict[str, int]

    def left(self, matrices: Sequence[Matrix]) -> float:
        """Multiplications of matrices that are left: those with an entry that is 0 are not."""
        whole = {m.key: m.size for m in matrices if m.key in self.entries}
        kept = (size * self.kept[key] / self.entries[key] for key, size in whole.items())
        return sum(kept) / max(sum(whole.values()), 1)


def measured_for(network: Network, batches: Sequence[Batch], method: str) -> Stats:
    """What a method needs to know of what the matrices receive."""
    needs = find(method, "activation").needs
    return observe(network, batches, {name: find(name, "measure").bind()() for name in needs})


def activation_edits(
    network: Network,
    stats: Stats,
    method: str,
    options: Mapping[str, Any] = {},
    met: Met | None = None,
) -> list[Intervention]:
    """A method of family `activation` on every layer, for `network.edited` or `network.run`.

    Args:
        network: the opened model.
        stats: what the method needs, see `measured_for`.
        method: its name.
        options: of it.
        met: counts entries, and those that are not 0 in the basis in which they are chosen.

    Raises:
        LayerwiseError: there is no such method, or it refuses its options.

    Example:
        >>> import layerwise, torch
        >>> network = layerwise.open("demo")
        >>> edits = activation_edits(network, Stats({}), "top_k", {"basis": "none"})
        >>> ids = torch.arange(8)[None]
        >>> network.run({"input_ids": ids}, edits).logits.shape[:2]
        torch.Size([1, 8])
    """
    edit = find(method, "activation").bind(options)
    found = []
    for layer in network.layers():
        changes = edit(layer, stats)
        for matrix in layer.matrices:
            if matrix.key in changes:
                change = changes[matrix.key]
                if met is not None:
                    change = partial(_counted, change=change, key=matrix.key, met=met)
                found.append(Intervention(At(layer.key, f"{matrix.part}.{matrix.role}"), change))
    return found


def _counted(x: Tensor, change: Any, key: str, met: Met) -> Tensor:
    new = change(x)
    count, dim = x.numel(), x.shape[-1]
    kept = change.keywords.get("count", None) if isinstance(change, partial) else dim
    kept = int((new != 0).sum()) if kept is None else min(kept, dim) * count // dim
    met.entries[key] = met.entries.get(key, 0) + count
    met.kept[key] = met.kept.get(key, 0) + kept
    return new


def rotations(network: Network, method: str, options: Mapping[str, Any]) -> float:
    """Multiplications by rotations, one for every input that is rotated, over the matrices' own."""
    values = find(method, "activation").values(options)
    if values.get("basis", "none") == "none":
        return 0.0
    whole = turned = 0
    for layer in network.layers():
        whole += sum(m.size for m in layer.matrices)
        inputs = {m.inputs: m.shape[1] for m in layer.matrices if m.role not in WRITERS}
        turned += sum(width**2 for width in inputs.values())
    return turned / max(whole, 1)
