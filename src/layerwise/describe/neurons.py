"""Which neurons stand for which label, and whether those of a label fire together."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from layerwise.core.method import Size, method
from layerwise.core.quality import divergence
from layerwise.core.sites import At, Intervention
from layerwise.core.stack import Stack
from layerwise.core.stats import Figures, Stats


@method("describe", paper="arXiv:2409.02877", needs=("neuron_means",))
def specialisation(
    stack: Stack,
    stats: Stats,
    *,
    labels: Tensor,
    of: str = "mlp.down",
    quantile: float = 0.99,
    edge: float = 0.3,
) -> Figures:
    r"""How well single neurons tell the documents of a label from others, and their partition.

    A neuron's precision for a label is the average precision of its mean size per document, less
    the share of documents with that label. It is specialised if that exceeds the `quantile` of the
    same with shuffled labels. Specialised neurons are grouped by their best label; `modularity` is
    `Q = sum_ij (A_ij - k_i k_j / 2m) [same group] / 2m` of the graph of neurons whose sizes
    correlate by more than `edge`.

    Args:
        stack: the layers.
        stats: with `neuron_means`.
        labels: given; the class of every document.
        of: the input group that the neurons are, the down projection of the feed-forward part.
        quantile: of the shuffled labels; one less it is the share of specialised ones by chance.
        edge: smallest correlation of neighbours.

    Returns:
        Per layer `best`, the largest precision above chance, `specialised`, the share of neurons,
        `modularity`, and `modularity_chance`, that of the same groups dealt out at random.

    Reference: Xiao et al., 2024, arXiv:2409.02877, the experiment of the survey.
    """
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(labels), generator=generator)
    found: dict[str, dict[str, float]] = {}
    for layer in stack.layers:
        x = stats["neuron_means"].get(f"{layer.key}/{of}", torch.zeros(0)).double()
        found[layer.key] = {}
        if x.ndim != 2 or len(x) != len(labels):
            continue
        precision, shuffled = advantage(x, labels), advantage(x, labels[order])
        threshold = shuffled.flatten().quantile(quantile) if shuffled.numel() < 2**24 else 0.5
        chosen = precision.amax(0) > threshold
        graph = coactivation(x[:, chosen], edge)
        groups = precision[:, chosen].argmax(0)
        dealt = groups[torch.randperm(len(groups), generator=generator)]
        found[layer.key] = {
            "best": precision.max().item(),
            "specialised": chosen.double().mean().item(),
            "modularity": modularity(graph, groups),
            "modularity_chance": modularity(graph, dealt),
        }
    return Figures(found, f"{len(labels)} documents; specialised by chance: {1 - quantile:.2g}")


def _forwards(size: Size, chosen: Mapping[str, Any]) -> str:
    each = f"{1 + 2 * size.layers} times for each label"
    return f"runs the network {each} on {chosen['documents']} documents"


@method("describe", paper="arXiv:2409.02877", needs=("neuron_means",), cost=_forwards)
def pruning(
    stack: Stack,
    stats: Stats,
    *,
    labels: Tensor,
    rerun: Any,
    of: str = "mlp.down",
    share: float = 0.05,
    documents: int = 16,
) -> Figures:
    r"""What silencing the neurons that stand for a label does to its documents, and to others.

    In one layer the `share` of neurons with the largest precision for a label (`specialisation`)
    is set to 0; the change is `KL(p || p')` of the network's answers in nats, mean over tokens. It
    stands beside that of as many other neurons, each as active as one of these.

    Args:
        stack: the last stack of the network.
        stats: with `neuron_means`.
        labels: given; the class of every document.
        rerun: given; runs a document with changes.
        of: the input group that the neurons are.
        share: of the layer's neurons.
        documents: that are run, about as many of every label.

    Returns:
        Means over labels: `own` and `other`, the change on documents of the label and on others;
        `matched_own` and `matched_other`, those of the other neurons.

    Reference: Xiao et al., 2024, arXiv:2409.02877, who prune a language model's capabilities.
    """
    tried = spread_over(labels[: rerun.count], documents)
    plain = {d: _answer(rerun, d, []) for d in tried}
    found: dict[str, dict[str, float]] = {layer.key: {} for layer in stack.layers}
    for layer in stack.layers:
        x = stats["neuron_means"].get(f"{layer.key}/{of}", torch.zeros(0)).double()
        if x.ndim != 2 or len(x) != len(labels):
            continue
        precision, count = advantage(x, labels), max(1, round(share * x.shape[1]))
        sums: dict[str, list[float]] = {}
        for label in labels[tried].unique().tolist():
            mine = precision[label].topk(count).indices
            for name, chosen in (("", mine), ("matched_", as_active(x.mean(0), mine))):
                edit = silenced(At(layer.key, of), chosen)
                for d in tried:
                    kind = "own" if labels[d] == label else "other"
                    change = _change(plain[d], _answer(rerun, d, [edit]))
                    sums.setdefault(name + kind, []).append(change)
        found[layer.key] = {k: sum(v) / len(v) for k, v in sums.items()}
    return Figures(found, f"{len(tried)} documents, {share:.0%} of the neurons of a layer")


def spread_over(labels: Tensor, count: int) -> list[int]:
    """Documents of every label in turn, at most so many.

    Example:
        >>> spread_over(torch.tensor([0, 0, 0, 1, 1]), 3)
        [0, 1, 3]
    """
    rank = torch.stack([(labels[: i + 1] == labels[i]).sum() for i in range(len(labels))])
    return sorted(rank.argsort(stable=True)[:count].tolist())


def as_active(means: Float[Tensor, " neurons"], chosen: Tensor) -> Tensor:
    """For each of some neurons another one whose mean size is nearest, none of them twice.

    Example:
        >>> as_active(torch.tensor([1.0, 5.0, 1.1, 9.0]), torch.tensor([0]))
        tensor([2])
    """
    distance = (means[chosen][:, None] - means[None]).abs()
    distance[:, chosen] = torch.inf
    found = []
    for row in distance:
        row[found] = torch.inf
        found.append(int(row.argmin()))
    return torch.tensor(found)


def silenced(at: At, neurons: Tensor) -> Intervention:
    """Some columns of what is at a site set to 0."""
    return Intervention(at, lambda here: here.index_fill(-1, neurons.to(here.device), 0))


def _answer(rerun: Any, document: int, edits: list[Intervention]) -> Tensor:
    """Log-probabilities of the tokens of a document that are no padding."""
    batch = rerun.batches[document]
    logits = rerun.edited(document, edits, []).output["logits"].double().log_softmax(-1)
    mask = batch.get("attention_mask")
    if mask is None or mask.shape != logits.shape[:2]:
        return logits.flatten(0, 1)
    return logits[mask.bool()]


def _change(plain: Tensor, changed: Tensor) -> float:
    return divergence(plain, changed).mean().item()


def advantage(
    x: Float[Tensor, "documents neurons"], labels: Tensor
) -> Float[Tensor, "labels neurons"]:
    """Average precision of every neuron for every label, less the label's share.

    Example:
        >>> advantage(torch.tensor([[3.0], [2.0], [1.0]]), torch.tensor([0, 1, 1]))[0]
        tensor([0.6667])
    """
    ranked = x.argsort(0, descending=True)
    places = torch.arange(1, len(x) + 1, dtype=x.dtype)[:, None]
    rows = []
    for label in range(int(labels.max()) + 1):
        hit = (labels == label)[ranked].to(x.dtype)
        precision = (hit.cumsum(0) / places * hit).sum(0) / hit.sum(0).clamp_min(1)
        rows.append(precision - (labels == label).to(x.dtype).mean())
    return torch.stack(rows)


def coactivation(
    x: Float[Tensor, "documents neurons"], edge: float
) -> Bool[Tensor, "neurons neurons"]:
    """Which neurons' sizes correlate over documents by more than `edge`."""
    if x.shape[1] < 2:
        return torch.zeros(x.shape[1], x.shape[1], dtype=torch.bool)
    return (torch.corrcoef(x.T).nan_to_num() > edge).fill_diagonal_(False)


def modularity(graph: Bool[Tensor, "nodes nodes"], groups: Tensor) -> float:
    """Newman's Q of a partition of a graph; 0 of one without edges.

    Example:
        >>> two = torch.block_diag(torch.ones(3, 3), torch.ones(3, 3)).bool().fill_diagonal_(False)
        >>> round(modularity(two, torch.tensor([0, 0, 0, 1, 1, 1])), 6)
        0.5
    """
    degree = graph.sum(1).double()
    edges = degree.sum().item()
    if edges == 0:
        return 0.0
    same = groups[:, None] == groups[None]
    expected = torch.outer(degree, degree) / edges
    return ((graph.double() - expected) * same).sum().item() / edges
