"""What can be read off the layers: probes on labelled documents, one state per document."""

from itertools import pairwise
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from layerwise.core.errors import LayerwiseError
from layerwise.core.method import method
from layerwise.core.stack import Stack
from layerwise.core.stats import Figures, Stats

TEST = 0.4


class Split(NamedTuple):
    """Documents to fit and to test on, by number, and the labels of all."""

    labels: np.ndarray
    train: np.ndarray
    test: np.ndarray

    @property
    def chance(self) -> float:
        """Share of the commonest class in the test part."""
        return float(np.bincount(self.labels[self.test]).max() / len(self.test))


def split_of(labels: Tensor, seed: int) -> Split:
    """60% of every class to fit, 40% to test.

    Raises:
        LayerwiseError: fewer than two classes, or a class of fewer than three documents.

    Example:
        >>> len(split_of(torch.tensor([0, 1] * 5), 0).test)
        4
    """
    counts = torch.bincount(labels)
    if len(counts) < 2 or counts.min() < 3:
        raise LayerwiseError(
            "labels",
            allowed="two classes or more, each with three documents or more",
            found=f"{len(counts)} of them with {counts.tolist()} documents",
            fix="give more labelled documents with --labels",
        )
    order = np.random.default_rng(seed).permutation(len(labels))
    y = labels.numpy()
    test = [order[y[order] == c][: max(1, round(TEST * int(n)))] for c, n in enumerate(counts)]
    held = np.sort(np.concatenate(test))
    return Split(y, np.setdiff1d(np.arange(len(y)), held), held)


def states_of(stats: Stats, stack: Stack, probe: str = "pooled_states") -> dict[str, np.ndarray]:
    """One row per document and layer, in float64; `input` is what enters the stack."""
    samples = stats.along(probe, stack)
    found = {key: s.after.double().numpy() for key, s in samples.items()}
    first = next(iter(samples.values())).before
    return {"input": first.double().numpy(), **found} if first.numel() else found


def standardised(x: np.ndarray, train: np.ndarray) -> np.ndarray:
    """Every dimension with mean 0 and deviation 1 over the documents that are fitted on."""
    spread = x[train].std(0)
    return (x - x[train].mean(0)) / np.where(spread > 1e-12 * (1 + np.abs(x).max()), spread, 1.0)


def fitted(
    kind: str, x: np.ndarray, split: Split, seed: int = 0, shown: np.ndarray | None = None
) -> np.ndarray:
    """Probabilities `[test documents, classes]` of a classifier fitted on the train part.

    Args:
        kind: `linear` or `mlp`.
        x: a row per document.
        split: which of them are fitted on.
        seed: of the hidden layer.
        shown: what it is asked about instead of `x`, with the same columns.

    Raises:
        LayerwiseError: scikit-learn is not installed.
    """
    try:
        from sklearn.linear_model import LogisticRegression
        from sklearn.neural_network import MLPClassifier
    except ImportError:
        raise LayerwiseError(
            "probes",
            allowed="scikit-learn installed",
            found="none",
            fix="pip install scikit-learn",
        ) from None
    if kind == "linear":
        model: Any = LogisticRegression(C=1.0, max_iter=2000)
    else:
        model = MLPClassifier((64,), alpha=1e-2, max_iter=300, random_state=seed)
    model.fit(x[split.train], split.labels[split.train])
    return model.predict_proba((x if shown is None else shown)[split.test])


def bits(probabilities: np.ndarray, split: Split) -> np.ndarray:
    """`-log2 q(y)` of every test document."""
    wanted = probabilities[np.arange(len(split.test)), split.labels[split.test]]
    return -np.log2(np.clip(wanted, 1e-12, None))


def quality(probabilities: np.ndarray, null: np.ndarray, split: Split) -> dict[str, float]:
    """Accuracy, macro F1, AUC, and usable information with its standard error, in bits."""
    from sklearn.metrics import f1_score, roc_auc_score

    y, guess = split.labels[split.test], probabilities.argmax(1)
    gain = bits(null, split) - bits(probabilities, split)
    scores = probabilities[:, 1] if probabilities.shape[1] == 2 else probabilities
    return {
        "accuracy": float((guess == y).mean()),
        "f1": float(f1_score(y, guess, average="macro")),
        "auc": float(roc_auc_score(y, scores, multi_class="ovr")),
        "information": float(gain.mean()),
        "information_error": float(gain.std() / len(gain) ** 0.5),
    }


@method(
    "describe",
    aliases=("concept_depth", "usable_information"),
    paper="arXiv:2404.07066",
    needs=("pooled_states",),
)
def probe(
    stack: Stack,
    stats: Stats,
    *,
    labels: Tensor,
    kind: Literal["linear", "mlp"] = "linear",
    seed: int = 0,
    jump: float = 1.1,
    flat: float = 0.03,
) -> Figures:
    r"""A classifier on the documents' states after every layer: what it reads, and from where on.

    `information = H(Y | nothing) - H(Y | X)` in bits, where `H` is the mean of `-log2 q(y)` on test
    documents and `nothing` is the same classifier on inputs that are 0. It is at most
    `log2(classes)`, and negative where the probe overfits. States are standardised.

    Args:
        stack: the layers.
        stats: with `pooled_states`; how they are pooled is its option.
        labels: given; the class of every document.
        kind: logistic regression (L2, C 1), or one hidden layer of 64.
        seed: of the split into 60% and 40% of every class.
        jump: rise of accuracy that counts as a jump.
        flat: change of accuracy that counts as none.

    Returns:
        `accuracy`, `f1` (mean over classes), `auc`, `information` and its standard error per layer;
        for the stack `chance`, and as shares of depth `jump`, `converging` and `settled`
        (`depth_of`).

    Reference: Jin et al., 2024, arXiv:2404.07066 (depth); Ju et al., 2024, arXiv:2402.16061
    (information, without the second softmax of their code).
    """
    split = split_of(labels, seed)
    found: dict[str, dict[str, float]] = {}
    for key, x in states_of(stats, stack).items():
        clean = standardised(x, split.train)
        null = fitted(kind, np.zeros_like(clean), split, seed)
        found[key] = quality(fitted(kind, clean, split, seed), null, split)
    entered = found.pop("input", None)
    curve = [row["accuracy"] for row in ([entered] if entered else []) + list(found.values())]
    found[stack.name] = {"chance": split.chance, **depth_of(curve, jump, flat)}
    note = f"{len(split.train)} documents fitted, {len(split.test)} tested"
    return Figures(found, f"{note}; chance {split.chance:.3f}, information 0")


def depth_of(curve: list[float], jump: float = 1.1, flat: float = 0.03) -> dict[str, float]:
    """Where a curve of accuracies jumps and where it settles, as shares of its length.

    With `b_i = a_i / a_{i-1}`: `jump` is the first `i` with `b_i >= jump`; `converging` the last
    with `|b_i - 1| < flat`, as published, which is nearly always the end; `settled` the first after
    the steepest rise from which on all are that flat. What does not occur is left out.

    Example:
        >>> depth_of([0.5, 0.52, 0.60, 0.80, 0.90, 0.91, 0.91, 0.90])
        {'jump': 0.25, 'converging': 0.875, 'settled': 0.625}
    """
    ratio = [b / max(a, 1e-12) for a, b in pairwise(curve)]
    calm = [abs(b - 1) < flat for b in ratio]
    steepest = max(range(len(ratio)), key=lambda i: ratio[i], default=0)
    later = range(steepest + 1, len(ratio))
    places = {
        "jump": next((i for i, b in enumerate(ratio) if b >= jump), None),
        "converging": max((i for i, c in enumerate(calm) if c), default=None),
        "settled": next((i for i in later if all(calm[i:])), None),
    }
    return {k: (i + 1) / len(curve) for k, i in places.items() if i is not None}


@method("describe", paper="arXiv:2603.02293", needs=("pooled_states",))
def truncation(
    stack: Stack,
    stats: Stats,
    *,
    labels: Tensor,
    noise: float = 0.3,
    seed: int = 0,
    head: Literal["refitted", "old"] = "refitted",
) -> Figures:
    """Whether fewer principal directions read better when some training labels are wrong.

    A linear probe on the first `d` principal directions of the training documents, for `d` a power
    of two, fitted on labels of which a share is replaced by another class, tested on true ones.

    Args:
        stack: the layers.
        stats: with `pooled_states`.
        labels: given; the class of every document.
        noise: share of the training labels that are wrong.
        seed: of the split, the wrong labels and the random directions.
        head: `refitted` to the `d` directions, or the `old` one, fitted to all of them and shown
            states in which only `d` are left.

    Returns:
        `accuracy` with all directions, `best` with the best number of them, `kept`, that number
        (chosen on the test documents, so `best` flatters), and `random`, as many random ones.

    Reference: arXiv:2603.02293, withdrawn by its author; the operation, none of its claims.
    """
    split, generator = split_of(labels, seed), np.random.default_rng(seed)
    noisy = mislabelled(split, noise, generator)
    found: dict[str, dict[str, float]] = {}
    for key, x in states_of(stats, stack).items():
        x = x - x[split.train].mean(0)
        basis = np.linalg.svd(x[split.train], full_matrices=False)[2].T
        counts = [2**i for i in range(basis.shape[1].bit_length())]
        scores = {d: _read(x, basis[:, :d], noisy, split, head) for d in counts}
        kept = max(scores, key=lambda d: (scores[d], -d))
        turned = np.linalg.qr(generator.standard_normal((x.shape[1], kept)))[0]
        found[key] = {
            "accuracy": _read(x, basis, noisy, split, head),
            "best": scores[kept],
            "kept": float(kept),
            "random": _read(x, turned, noisy, split, head),
        }
    found.pop("input", None)
    note = f"{noise:.0%} of the training labels are wrong; {head} head; chance {split.chance:.3f}"
    return Figures(found, note)


def mislabelled(split: Split, noise: float, generator: np.random.Generator) -> Split:
    """The split with a share of the labels replaced by another class."""
    wrong = split.labels.copy()
    flipped = generator.random(len(wrong)) < noise
    wrong[flipped] += generator.integers(1, wrong.max() + 1, int(flipped.sum()))
    return Split(wrong % (split.labels.max() + 1), split.train, split.test)


def _read(x: np.ndarray, basis: np.ndarray, noisy: Split, split: Split, head: str) -> float:
    """Accuracy on true labels of a probe fitted on noisy ones, within some directions."""
    shown = x @ basis @ basis.T if head == "old" else x @ basis
    guess = fitted("linear", x if head == "old" else shown, noisy, shown=shown).argmax(1)
    return float((guess == split.labels[split.test]).mean())


def equal_error_rate(scores: np.ndarray, positive: np.ndarray) -> float:
    """Where as many positives are missed as negatives are let through, between two thresholds.

    Example:
        >>> equal_error_rate(np.array([1.0, 2.0, 3.0, 4.0]), np.array([False, False, True, True]))
        0.0
    """
    cuts = np.concatenate([[-np.inf], np.unique(scores), [np.inf]])
    missed = np.array([(scores[positive] < c).mean() for c in cuts])
    passed = np.array([(scores[~positive] >= c).mean() for c in cuts])
    after = int(np.argmax(missed >= passed))
    gap = (passed - missed)[[after - 1, after]]
    share = gap[0] / (gap[0] - gap[1])
    return float(missed[after - 1] + share * (missed[after] - missed[after - 1]))
