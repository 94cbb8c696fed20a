"""Scores of layers and groups: the more, the more important."""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from layerwise.core.errors import LayerwiseError
from layerwise.core.method import method
from layerwise.core.stack import Stack
from layerwise.core.stats import Scores, Stats


@method("score", aliases=("shortgpt",), paper="arXiv:2403.03853", needs=("residual_cosine",))
def block_influence(stack: Stack, stats: Stats) -> Scores:
    """Block influence of every layer: `1 - mean_t cos(h_in[t], h_out[t])`.

    Args:
        stack: the layers.
        stats: with `residual_cosine` per layer.

    Returns:
        One score per layer; the layers with the smallest change the stream least.

    Example:
        >>> stats = Stats({"residual_cosine": {"decoder/0": 0.7071, "decoder/1": 0.9959}})
        >>> stack = Stack("decoder", "", (), ())
        >>> {k: round(v, 4) for k, v in block_influence(stack, stats).values.items()}
        {'decoder/0': 0.2929, 'decoder/1': 0.0041}

    Reference: Men et al., 2024, arXiv:2403.03853; taken at the layer's own output, never after
    the final norm.
    """
    values = {key: 1 - cosine for key, cosine in stats["residual_cosine"].items()}
    return Scores(values, "layer", "block_influence")


@method("score", aliases=("lim",), paper="arXiv:2406.17415", needs=("residual_cosine",))
def layer_input_modification(stack: Stack, stats: Stats) -> Scores:
    """LIM of every layer: `-mean_t cos(h_in[t], h_out[t])`, more where a layer changes more.

    Example:
        >>> stats = Stats({"residual_cosine": {"decoder/0": 0.5}})
        >>> layer_input_modification(Stack("decoder", "", (), ()), stats).values
        {'decoder/0': -0.5}

    Reference: Dumitru et al., 2024, arXiv:2406.17415.
    """
    values = {key: -cosine for key, cosine in stats["residual_cosine"].items()}
    return Scores(values, "layer", "layer_input_modification")


@method("score", aliases=("zd",), paper="arXiv:2406.17415")
def zscore_share(
    stack: Stack, stats: Stats, *, fetch: Callable[[str], Mapping[str, Tensor]]
) -> Scores:
    """ZD of every layer: minus the share of its weights more than one deviation above the mean.

    `-#{w : (w - mean) / std > 1} / #w` over all matrices of the layer pooled; needs no data.

    Args:
        stack: the layers.
        stats: not used.
        fetch: given; the matrices `[out, in]` of a layer by their key.

    Reference: Dumitru et al., 2024, arXiv:2406.17415; smaller shares are more important, so the
    sign is turned here.
    """
    values = {}
    for layer in stack.layers:
        pooled = [w.double() for w in fetch(layer.key).values()]
        values[layer.key] = -share_above(pooled) if pooled else 0.0
    return Scores(values, "layer", "zscore_share")


def share_above(pooled: list[Tensor], deviations: float = 1.0) -> float:
    """Share of the pooled values that lie more than so many deviations above their mean.

    Example:
        >>> share_above([torch.tensor([0.0, 0.0, 0.0, 0.0, 5.0])])
        0.2
    """
    count = sum(w.numel() for w in pooled)
    mean = sum(w.sum().item() for w in pooled) / count
    deviation = math.sqrt(sum((w - mean).square().sum().item() for w in pooled) / count)
    above = sum((w > mean + deviations * deviation).sum().item() for w in pooled)
    return above / count


@method("score", aliases=("deeper_layers",), paper="arXiv:2403.17887", needs=("last_states",))
def angular_distance(stack: Stack, stats: Stats, *, span: int = 1) -> Scores:
    r"""Angular distance across `span` layers at the last token of each sequence.

    `d(l, n) = mean arccos(cos(h_l[T], h_{l+n}[T])) / pi`; the block with the smallest distance
    is the one to drop.

    Args:
        stack: the layers.
        stats: with `last_states` per layer.
        span: how many layers `n` are taken together.

    Returns:
        One score per span, under the key of its first layer.

    Example:
        >>> h = torch.tensor([[1.0, 0.0], [1.0, 1.0], [1.0, 1.2], [0.0, 1.0]])
        >>> states = {f"decoder/{i}": torch.stack([h[i], h[i + 1]])[None] for i in range(3)}
        >>> stack = Stack("decoder", "", (), ())
        >>> found = angular_distance(stack, Stats({"last_states": states}), span=2)
        >>> {k: round(v, 4) for k, v in found.values.items()}
        {'decoder/0': 0.2789, 'decoder/1': 0.25}

    Reference: Gromov et al., 2024, arXiv:2403.17887.
    """
    mine = f"{stack.name}/"
    states = [(k, v) for k, v in stats["last_states"].items() if k.startswith(mine)]
    values = {}
    for start in range(len(states) - span + 1):
        before, after = states[start][1][:, 0], states[start + span - 1][1][:, 1]
        cosine = torch.cosine_similarity(before.double(), after.double(), dim=-1)
        values[states[start][0]] = (cosine.clamp(-1, 1).arccos() / math.pi).mean().item()
    return Scores(values, "span", f"angular_distance, span {span}")


@method("score", aliases=("llm_drop",), paper="arXiv:2406.15786", needs=("part_cosine",))
def part_influence(stack: Stack, stats: Stats) -> Scores:
    """Block influence of every part: `1 - mean_t cos(x[t], x[t] + f(x)[t])`.

    Args:
        stack: the layers.
        stats: with `part_cosine` per layer.

    Returns:
        One score per part, under `layer/part`. A cosine does not see rescaling: what adds a
        multiple of the stream scores 0.

    Raises:
        LayerwiseError: what a part adds cannot be followed.

    Example:
        >>> from torch.nn import Identity
        >>> from layerwise.core.stack import Layer, Part
        >>> parts = Part("attention", True, ()), Part("mlp", False, ())
        >>> stack = Stack("decoder", "", (Layer("decoder", 0, "", Identity(), parts, ()),), ())
        >>> stats = Stats({"part_cosine": {"decoder/0": {"attention": 0.7071, "mlp": 0.75}}})
        >>> {k: round(v, 4) for k, v in part_influence(stack, stats).values.items()}
        {'decoder/0/attention': 0.2929, 'decoder/0/mlp': 0.25}

    Reference: He et al., 2024, arXiv:2406.15786; `x` is the stream before the part's norm, and
    what a norm behind the part does is part of `f`.
    """
    values = {}
    for layer in stack.layers:
        found = stats["part_cosine"].get(layer.key, {})
        for part in layer.parts:
            if part.name not in found:
                raise LayerwiseError(
                    f"part_influence of {layer.key}",
                    allowed="parts whose addition to the stream can be followed",
                    found=f"none of {part.name}",
                    fix="use --score greedy, which measures what is lost without a part",
                )
            values[f"{layer.key}/{part.name}"] = 1 - found[part.name]
    return Scores(values, "part", "part_influence")


@method("score", aliases=("measured",))
def removal(
    stack: Stack, stats: Stats, *, without: Callable[[Sequence[tuple[str, ...]]], list[float]]
) -> Scores:
    """Measured rise of the loss when one layer is left out, layer by layer.

    Args:
        stack: the layers.
        stats: not used.
        without: given; for each trial, keys of left-out layers, the loss in nats per token.
    """
    keys = [layer.key for layer in stack.layers]
    base, *losses = without([(), *((key,) for key in keys)])
    values = {key: loss - base for key, loss in zip(keys, losses, strict=True)}
    return Scores(values, "layer", "removal")
