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
    weights, _ = weighted_probe(normed(layers), split, steps)
    found = {}
    for i, key in enumerate(states):
        scores = _scores(weighted_probe(normed(layers[: i + 1]), split, steps)[1], split)
        found[key] = {"weight": weights[i].item(), **scores}
    return Figures(found, f"weights sum to 1; chance {split.chance:.3f}")


@method(
    "describe",
    aliases=("earlybird",),
    paper="arXiv:2305.04940",
    needs=("first_states", "largest_states", "pooled_states"),
)
def combinations(
    stack: Stack, stats: Stats, *, labels: Tensor, steps: int = 200, seed: int = 0
) -> Figures:
    """Twelve ways to make a document's features out of early layers, the network frozen.

    Per layer: its first token (`first`, which frozen is also the network cut off there), the
    largest or the mean token (`largest`, `mean`). Over all layers up to it: the largest of, and a
    learned weighting of, each of these three (`first_max`, `first_weighted` and so on). The last
    layer's `first` is the baseline, which makes twelve with its cut-off twin.

    Args:
        stack: the layers.
        stats: with `first_states`, `largest_states` and `pooled_states`.
        labels: given; the class of every document.
        steps: of training the weights.
        seed: of the split.

    Returns:
        Accuracy per layer and combination.

    Reference: Grishina et al., 2023, arXiv:2305.04940. They tune the encoder and learn a weight
    per token position too; here tokens are weighed equally. Maxima leave padding out.
    """
    split = split_of(labels, seed)
    found: dict[str, dict[str, float]] = {}
    for name, probe in zip(
        ("first", "largest", "mean"),
        ("first_states", "largest_states", "pooled_states"),
        strict=True,
    ):
        states = states_of(stats, stack, probe)
        states.pop("input", None)
        layers = list(states.values())
        for i, key in enumerate(states):
            many = np.max(layers[: i + 1], axis=0)
            mixed = weighted_probe(normed(layers[: i + 1]), split, steps)[1]
            row = found.setdefault(key, {})
            for how, x in ((name, layers[i]), (f"{name}_max", many)):
                guess = fitted("linear", standardised(x, split.train), split)
                row[how] = _scores(guess, split)["accuracy"]
            row[f"{name}_weighted"] = _scores(mixed, split)["accuracy"]
    return Figures(found, f"accuracy; chance {split.chance:.3f}, one seed")
