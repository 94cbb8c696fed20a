"""Which neurons stand for which label, and whether those of a label fire together."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from layerwise.core.method import method
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
