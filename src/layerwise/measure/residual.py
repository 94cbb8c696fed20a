"""What a layer does to the residual stream, measured between its input and its output."""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from layerwise.core.method import method
from layerwise.core.stats import Probe, Seen
from layerwise.core.stream import Added
from layerwise.core.tokens import by_token, kept


def _tokens(
    state: Float[Tensor, "batch ..."], mask: Tensor | None, which: str
) -> Float[Tensor, "tokens dim"]:
    """Rows of the tokens that count: all that are not masked, or the last of each sequence."""
    keep, rows = kept(state, mask), by_token(state)
    if which == "last":
        last = keep.long().cumsum(1).argmax(1)
        return rows[torch.arange(len(rows), device=rows.device), last].float()
    return rows[keep].float()


def counted(seen: Seen, which: str) -> Bool[Tensor, "batch seq"]:
    """All tokens that are not masked, or the last of each sequence."""
    keep = kept(seen.inputs, seen.mask)
    rank = keep.long().cumsum(1)
    return keep & (rank == rank[:, -1:]) if which == "last" else keep


def _more(
    state: tuple[float, int],
    values: Float[Tensor, "batch seq"],
    keep: Bool[Tensor, "batch seq"],
) -> tuple[float, int]:
    """A sum and a count with the values of the tokens that count."""
    return state[0] + values.masked_fill(~keep, 0).sum().item(), state[1] + int(keep.sum())


def _mean(state: tuple[float, int]) -> float:
    """The mean of what was summed; no number where a layer changes the shape of the state."""
    return state[0] / state[1] if state[1] else math.nan


@method("measure", paper="arXiv:2403.03853")
def residual_cosine(*, tokens: Literal["all", "last"] = "all") -> Probe:
    """Mean cosine between a layer's input and output, token by token.

    `mean_t cos(h_in[t], h_out[t])` from the norms and the inner product of the input and of the
    update, which keeps the digits of what is near 1; the layer's own output, before any final norm.

    Args:
        tokens: every token that is not masked, or the last of each sequence.

    Returns:
        A probe whose value per layer is a number from -1 to 1.

    Example:
        >>> seen = Seen(torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[1.0, 1.0]]]),
        ...             None, None, {}, None)
        >>> probe = residual_cosine()
        >>> round(probe.finish(probe.update(probe.init("decoder/0"), seen)), 4)
        0.7071

    Reference: Men et al., 2024, arXiv:2403.03853 (block influence is one minus this).
    """

    def update(state: tuple[float, int], seen: Seen) -> tuple[float, int]:
        if seen.output is None or seen.output.shape != seen.inputs.shape:
            return state
        return _more(state, _kept_direction(seen.update()), counted(seen, tokens))

    return Probe("layer", lambda key: (0.0, 0), update, _mean, figures=True)


def _kept_direction(added: Added) -> Float[Tensor, "batch seq"]:
    """`cos(x, x + a)` in float64."""
    x, a, dot = torch.stack(added).double()
    along = x * x + dot
    after = (along + dot + a * a).clamp_min(0).sqrt()
    return along / (x * after).clamp_min(1e-16)


@method("measure")
def update_norm() -> Probe:
    """Size of a layer's update relative to its input: mean of `|h_out - h_in| / |h_in|`.

    Returns:
        A probe whose value per layer is a positive number.

    Example:
        >>> seen = Seen(torch.tensor([[[2.0, 0.0]]]), torch.tensor([[[2.0, 1.0]]]),
        ...             None, None, {}, None)
        >>> probe = update_norm()
        >>> probe.finish(probe.update(probe.init("decoder/0"), seen))
        0.5
    """

    def update(state: tuple[float, int], seen: Seen) -> tuple[float, int]:
        if seen.output is None or seen.output.shape != seen.inputs.shape:
            return state
        stream, change, _ = seen.update()
        return _more(state, (change / stream.clamp_min(1e-20)).double(), counted(seen, "all"))

    return Probe("layer", lambda key: (0.0, 0), update, _mean, figures=True)


#: per part: tokens, sum of ratios, sum of cosines, largest ratio; of all tokens and of the rest
Use = dict[str, Float[Tensor, "two four"]]


@method("measure", aliases=("contribution",), paper="arXiv:2505.13898")
def depth_use() -> Probe:
    r"""How much each part adds to the stream and in which direction.

    Per token, then the mean over tokens: `|a| / |h|` and `cos(a, h)` for what a part adds, `a`,
    and the stream that it is added to, `h`; `layer` is the whole update `h_out - h_in` on `h_in`.
    Each also as `_rest`, without the first token of a document, whose norm is often huge.

    Returns:
        A probe whose value per layer has `<part>_ratio`, `<part>_cosine`, `<part>_largest` (the
        largest ratio) and the first two as `_rest`. A part whose addition cannot be followed, such
        as two that are merged before they are added, has no figures; the whole layer always has.

    Example:
        >>> h, out = torch.tensor([[[3.0, 4.0]]]), torch.tensor([[[0.0, 10.0]]])
        >>> probe = depth_use()
        >>> found = probe.finish(probe.update(probe.init(""), Seen(h, out, None, None, {}, None)))
        >>> round(found["layer_ratio"], 4), round(found["layer_cosine"], 4)
        (1.3416, 0.4472)

    Reference: Csordas et al., 2025, arXiv:2505.13898; denominators at least 1e-6, as there.
    """

    def update(state: Use, seen: Seen) -> Use:
        if seen.output is None or seen.output.shape != seen.inputs.shape:
            return state
        keep = kept(seen.inputs, seen.mask)
        if not keep.any():
            return state
        parts = {**seen.added, "layer": seen.update()}
        found = dict(state)
        for part, here in zip(parts, _summed(list(parts.values()), keep), strict=True):
            before = found.get(part, torch.zeros_like(here))
            largest = torch.maximum(before[:, 3:], here[:, 3:])
            found[part] = torch.cat([before[:, :3] + here[:, :3], largest], 1)
        return found

    def finish(state: Use) -> dict[str, float]:
        values: dict[str, float] = {}
        parts = sorted(state, key=lambda part: (part == "layer", part))
        for row, end in ((0, ""), (1, "_rest")):
            for column, name in ((1, "ratio"), (2, "cosine")):
                mean = {p: state[p][row, column] / state[p][row, 0] for p in parts}
                values |= {f"{p}_{name}{end}": x.item() for p, x in mean.items()}
        values |= {f"{p}_largest": state[p][0, 3].item() for p in parts}
        return values

    return Probe("layer", lambda key: {}, update, finish, watch=("added",), figures=True)


def _summed(
    parts: Sequence[Added], keep: Bool[Tensor, "batch seq"]
) -> Float[Tensor, "parts two four"]:
    every = torch.stack([value for added in parts for value in added]).double()
    every = every.unflatten(0, (-1, 3)).masked_fill(~keep, 0)
    stream, gift, dot = every.flatten(2).unbind(1)  # [parts, tokens]
    ratio = gift / stream.clamp_min(1e-6)
    cosine = dot / (gift * stream).clamp_min(1e-12)
    each = torch.stack([torch.ones_like(stream), ratio, cosine], 1)
    rows = torch.stack([keep, keep & (keep.long().cumsum(1) > 1)]).flatten(1).double()
    largest = (ratio[:, None] * rows).amax(2, keepdim=True)
    return torch.cat([(each @ rows.T).mT, largest], 2).cpu()


@method("measure", paper="arXiv:2406.15786")
def part_cosine() -> Probe:
    """Mean cosine between the stream before a part and after it, token by token.

    `mean_t cos(x[t], x[t] + a[t])`, where `a` is what the part adds to the stream `x`.

    Returns:
        A probe whose value per layer is a number from -1 to 1 per part; a part whose addition
        cannot be followed has none.

    Example:
        >>> from layerwise.core.stream import measured
        >>> x, a = torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[0.0, 1.0]]])
        >>> probe = part_cosine()
        >>> seen = Seen(x, x + a, None, None, {}, None, {"mlp": measured(x, a)})
        >>> {k: round(v, 4) for k, v in probe.finish(probe.update({}, seen)).items()}
        {'mlp': 0.7071}

    Reference: He et al., 2024, arXiv:2406.15786.
    """

    def update(state: dict[str, tuple[float, int]], seen: Seen) -> dict[str, tuple[float, int]]:
        found, keep = dict(state), kept(seen.inputs, seen.mask)
        for part, measures in seen.added.items():
            found[part] = _more(found.get(part, (0.0, 0)), _kept_direction(measures), keep)
        return found

    def finish(state: dict[str, tuple[float, int]]) -> dict[str, float]:
        return {part: _mean(state[part]) for part in sorted(state)}

    return Probe("layer", lambda key: {}, update, finish, watch=("added",), figures=True)


@method("measure")
def last_states() -> Probe:
    """Hidden states `[sequences, 2, dim]` of the last token, before and after each layer.

    Returns:
        A probe whose value per layer is a tensor; memory is that of one token per sequence.

    Example:
        >>> seen = Seen(torch.zeros(2, 3, 4), torch.ones(2, 3, 4), None, None, {}, None)
        >>> probe = last_states()
        >>> probe.finish(probe.update(probe.init("decoder/0"), seen)).shape
        torch.Size([2, 2, 4])
    """

    def update(state: tuple[Tensor, ...], seen: Seen) -> tuple[Tensor, ...]:
        assert seen.output is not None
        x = _tokens(seen.inputs, seen.mask, "last")
        y = _tokens(seen.output, seen.mask, "last")
        return (*state, torch.stack([x, y], 1).cpu())

    return Probe("layer", lambda key: (), update, lambda s: torch.cat(s))


@method("measure")
def output_error() -> Probe:
    """Relative squared error of a layer's output between the clean and the edited stream.

    `sum |y - y_clean|^2 / sum |y_clean|^2` over all tokens; needs a walk with a clean stream.

    Returns:
        A probe whose value per layer is a number, 0 where nothing was edited so far.

    Example:
        >>> y = torch.ones(1, 2, 4)
        >>> probe = output_error()
        >>> probe.finish(probe.update(probe.init(""), Seen(y, 1.1 * y, None, y, {}, None)))
        0.01...
    """

    def update(state: tuple[float, float], seen: Seen) -> tuple[float, float]:
        if seen.clean is None or seen.output is None:
            return state
        clean = _tokens(seen.clean, seen.mask, "all")
        edited = _tokens(seen.output, seen.mask, "all")
        error = (edited - clean).double().square().sum().item()
        return state[0] + error, state[1] + clean.double().square().sum().item()

    def finish(state: tuple[float, float]) -> float:
        return state[0] / max(state[1], 1e-300)

    return Probe("layer", lambda key: (0.0, 0.0), update, finish, clean=True)
