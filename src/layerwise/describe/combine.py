"""Reading several layers at once: learned weights of layers, and ways to combine early ones."""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from layerwise.core.method import method
from layerwise.core.stack import Stack
from layerwise.core.stats import Figures, Stats
from layerwise.describe.labels import (
    Split,
    equal_error_rate,
    fitted,
    split_of,
    standardised,
    states_of,
)


def normed(layers: list[np.ndarray]) -> Float[Tensor, "documents layers dim"]:
    """States with mean 0 and deviation 1 over their dimensions, so that no layer is loud."""
    x = torch.from_numpy(np.stack(layers, 1)).float()
    return torch.nn.functional.layer_norm(x, x.shape[-1:])


def alike(layers: list[np.ndarray]) -> bool:
    """Whether the states of all layers have the same shape."""
    return len({x.shape for x in layers}) == 1


def weighted_probe(
    x: Float[Tensor, "documents layers dim"], split: Split, steps: int
) -> tuple[Float[Tensor, " layers"], np.ndarray]:
    """`softmax(s)` over layers and a linear classifier on the weighted sum, trained together.

    Returns:
        The weights, and probabilities of the test documents.
    """
    classes = int(split.labels.max()) + 1
    s = torch.zeros(x.shape[1], requires_grad=True)
    head = torch.zeros(x.shape[2] + 1, classes, requires_grad=True)
    y, train = torch.from_numpy(split.labels).long(), torch.from_numpy(split.train)
    chosen = torch.optim.Adam([{"params": [s], "lr": 0.1}, {"params": [head], "lr": 0.02}])

    def logits(rows: Tensor) -> Tensor:
        mixed = torch.einsum("nld,l->nd", rows, s.softmax(0))
        return mixed @ head[1:] + head[0]

    with torch.enable_grad():
        for _ in range(steps):
            chosen.zero_grad()
            loss = torch.nn.functional.cross_entropy(logits(x[train]), y[train])
            (loss + 1e-3 * head[1:].square().sum()).backward()
            chosen.step()
    with torch.no_grad():
        return s.softmax(0), logits(x[torch.from_numpy(split.test)]).softmax(-1).double().numpy()


def _scores(probabilities: np.ndarray, split: Split) -> dict[str, float]:
    y = split.labels[split.test]
    found = {"accuracy": float((probabilities.argmax(1) == y).mean())}
    if probabilities.shape[1] == 2:
        found["eer"] = equal_error_rate(probabilities[:, 1], y == 1)
    return found


@method("describe", paper="arXiv:2502.03559", needs=("pooled_states",))
def layer_weights(
    stack: Stack, stats: Stats, *, labels: Tensor, steps: int = 200, seed: int = 0
) -> Figures:
    r"""Which layers a classifier on `sum_l softmax(s)_l norm(h_l)` listens to.

    Every layer's state is normed first, so that a weight is no matter of scale. Neighbouring
    layers say nearly the same, so weights are not unique: the figures of the stack cut after
    every layer stand beside them.

    Args:
        stack: the layers.
        stats: with `pooled_states`.
        labels: given; the class of every document.
        steps: of training.
        seed: of the split.

    Returns:
        `weight` per layer, and of the layers up to it `accuracy` and, of two classes, `eer`, the
        equal error rate.

    Reference: El Kheir et al., 2025, arXiv:2502.03559, with a linear back end.
    """
    split = split_of(labels, seed)
    states = states_of(stats, stack)
    states.pop("input", None)
    layers = list(states.values())
    found: dict[str, dict[str, float]] = {key: {} for key in states}
    if not alike(layers):
        return Figures(found, "needs layers whose states have one width")
    weights, _ = weighted_probe(normed(layers), split, steps)
    for i, key in enumerate(states):
        scores = _scores(weighted_probe(normed(layers[: i + 1]), split, steps)[1], split)
        found[key] = {"weight": weights[i].item(), **scores}
    return Figures(found, f"weights sum to 1; chance {split.chance:.3f}")


@method(
    "describe",
    aliases=("earlybird",),
    paper="arXiv:2305.04940",
    needs=("first_states", "largest_states", "place_states"),
    cost=lambda size, chosen: f"trains {5 * size.layers} small heads, {chosen['steps']} steps each",
)
def combinations(
    stack: Stack, stats: Stats, *, labels: Tensor, steps: int = 100, seed: int = 0
) -> Figures:
    """Twelve ways to make a document's features out of early layers, the network frozen.

    Of one layer: its first token (`first`), the largest of its tokens (`largest`), a learned
    weighting of them by position (`weighted`). Of all layers up to it: the largest of, and a
    learned weighting of, each of these three (`first_max`, `first_weighted`, ...); the weightings
    of layers and positions in the other order, layers first (`weighted_swapped`). `cutoff` is the
    network with all later layers deleted, which a frozen one reads like `first`; the last layer's
    `first` is the `baseline`.

    Args:
        stack: the layers.
        stats: with `first_states`, `largest_states` and `place_states`.
        labels: given; the class of every document.
        steps: of training weights and heads.
        seed: of the split.

    Returns:
        Accuracy per layer and combination, and `compute`, the share of layers that have to run;
        for the stack the `baseline`, and `earliest`, the share of layers after which the best
        combination is at least as good.

    Reference: Grishina et al., 2023, arXiv:2305.04940. They tune the encoder too, which alone makes
    `cutoff` another thing than `first`, and let padding count as 0 in maxima.
    """
    split, depth = split_of(labels, seed), len(stack.layers)
    first, largest = (
        [x for key, x in states_of(stats, stack, probe).items() if key != "input"]
        for probe in ("first_states", "largest_states")
    )
    places = list(stats.along("place_states", stack).values())
    found: dict[str, dict[str, float]] = {layer.key: {} for layer in stack.layers}
    if not alike(first):
        return Figures(found, "needs layers whose states have one width")
    for i, layer in enumerate(stack.layers):
        upto = {"first": first[: i + 1], "largest": largest[: i + 1]}
        row = found[layer.key]
        for name, states in upto.items():
            for how, x in ((name, states[i]), (f"{name}_max", np.max(states, axis=0))):
                guess = fitted("linear", standardised(x, split.train), split)
                row[how] = _scores(guess, split)["accuracy"]
            mixed = weighted_probe(normed(states), split, steps)[1]
            row[f"{name}_weighted"] = _scores(mixed, split)["accuracy"]
        row["cutoff"] = row["first"]
        grid = torch.stack(places[: i + 1], 1)  # [documents, layers, bins, dim]
        for name, x, order in (
            ("weighted", grid[:, i:], "places"),
            ("weighted_max", grid, "max"),
            ("weighted_weighted", grid, "places"),
            ("weighted_swapped", grid, "layers"),
        ):
            row[name] = _scores(place_probe(x, split, steps, order), split)["accuracy"]
        row["compute"] = (i + 1) / depth
    baseline = found[stack.layers[-1].key]["first"]
    best = [max(v for k, v in row.items() if k != "compute") for row in found.values()]
    earliest = next(i for i, value in enumerate(best) if value >= baseline)
    found[stack.name] = {"baseline": baseline, "earliest": (earliest + 1) / depth}
    return Figures(found, f"accuracy; chance {split.chance:.3f}, one seed")


def place_probe(
    x: Float[Tensor, "documents layers bins dim"], split: Split, steps: int, order: str
) -> np.ndarray:
    """A linear classifier on weighted places and layers, all trained together.

    Args:
        x: sums of states by place.
        split: which documents are fitted on.
        steps: of training.
        order: `places` weighs places, norms, then weighs layers; `layers` norms, weighs layers,
            then places; `max` weighs places, norms, and takes the largest over layers.

    Returns:
        Probabilities of the test documents.
    """
    classes = int(split.labels.max()) + 1
    over = torch.zeros(x.shape[1], requires_grad=True)
    along = torch.ones(x.shape[2], requires_grad=True)
    head = torch.zeros(x.shape[3] + 1, classes, requires_grad=True)
    y, train = torch.from_numpy(split.labels).long(), torch.from_numpy(split.train)
    rates = [{"params": [over, along], "lr": 0.1}, {"params": [head], "lr": 0.02}]
    chosen = torch.optim.Adam(rates)
    width = x.shape[-1:]

    def logits() -> Tensor:
        if order == "layers":
            flat = torch.nn.functional.layer_norm(x, width)
            mixed = torch.einsum("nlbd,l,b->nd", flat, over.softmax(0), along)
        else:
            pooled = torch.einsum("nlbd,b->nld", x, along)
            rows = torch.nn.functional.layer_norm(pooled, width)
            weighed = torch.einsum("nld,l->nd", rows, over.softmax(0))
            mixed = rows.amax(1) if order == "max" else weighed
        return (mixed - mixed[train].mean(0)) @ head[1:] + head[0]

    with torch.enable_grad():
        for _ in range(steps):
            chosen.zero_grad()
            loss = torch.nn.functional.cross_entropy(logits()[train], y[train])
            (loss + 1e-3 * head[1:].square().sum()).backward()
            chosen.step()
    with torch.no_grad():
        return logits()[torch.from_numpy(split.test)].softmax(-1).double().numpy()
