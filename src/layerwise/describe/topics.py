"""Whether documents of one topic lie together after a layer."""

import torch
from jaxtyping import Float
from torch import Tensor

from layerwise.core.errors import LayerwiseError
from layerwise.core.method import method
from layerwise.core.stack import Stack
from layerwise.core.stats import Figures, Stats


@method("describe", paper="arXiv:2310.04861", needs=("pooled_states",))
def topics(stack: Stack, stats: Stats, *, labels: Tensor, directions: int = 20) -> Figures:
    r"""How alike the context parts of documents are within a topic and between two.

    `ctx_c` is a document's mean state less that of all documents. Its row in the first left
    singular vectors, each times its singular value, is normed; similarity is the mean absolute
    cosine of two documents' rows. Topics are the labels.

    Args:
        stack: the layers.
        stats: with `pooled_states`.
        labels: given; the topic of every document.
        directions: singular vectors that are kept.

    Returns:
        `within` topics, no document with itself; `between` two; and `gap`, their difference, 0
        where topics do not matter.

    Raises:
        LayerwiseError: there are fewer than two topics, or none of two documents.

    Reference: Song and Zhong, 2023, arXiv:2310.04861; they count a document with itself as within.
    """
    counts = torch.bincount(labels)
    if len(counts) < 2 or counts.max() < 2:
        raise LayerwiseError(
            "topics",
            allowed="two labels or more, one of them with two documents or more",
            found=f"{len(counts)} of them with {counts.tolist()} documents",
            fix="give more labelled documents with --labels",
        )
    found = {}
    for key, sample in stats.along("pooled_states", stack).items():
        cosine = context_cosines(sample.after.double(), directions).abs()
        same = labels[:, None] == labels[None]
        within = cosine[same & ~torch.eye(len(labels), dtype=torch.bool)].mean().item()
        between = cosine[~same].mean().item()
        found[key] = {"within": within, "between": between, "gap": within - between}
    return Figures(found, f"{len(labels)} documents, {len(counts)} topics; no topics: gap 0")


def context_cosines(
    means: Float[Tensor, "documents dim"], directions: int
) -> Float[Tensor, "documents documents"]:
    """Cosines between documents in the leading directions in which their means differ.

    Example:
        >>> x = torch.tensor([[1.0, 0], [2, 0], [0, 1], [0, 2]]) + 5
        >>> context_cosines(x, 2)[0, 1] > 0
        tensor(True)
    """
    u, s, _ = torch.linalg.svd(means - means.mean(0), full_matrices=False)
    rows = torch.nn.functional.normalize((u * s)[:, :directions], dim=1)
    return rows @ rows.T
