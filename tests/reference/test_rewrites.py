"""Rewrites as the papers write them, one channel at a time, beside ours."""

from typing import Any

import pytest
import torch
from torch import Tensor

from layerwise.core.chain import run_chain
from layerwise.core.method import find
from layerwise.core.mixing import Stream
from layerwise.core.plan import Step
from layerwise.core.rotation import hadamard
from layerwise.core.seam import Place

GRID = {"bits": 3, "group": 16}


def problem(outliers: int = 3) -> tuple[dict[str, Tensor], Tensor]:
    """Two matrices that read one input, some of whose channels are large."""
    generator = torch.Generator().manual_seed(0)
    weights = {key: 0.1 * torch.randn(12, 32, generator=generator) for key in ("gate", "up")}
    x = torch.randn(200, 32, generator=generator)
    x[:, :outliers] *= 30
    return weights, x


def rounded(weight: Tensor) -> Tensor:
    return run_chain(weight, {}, [Step("rtn", GRID)]).dense()


def chosen(weights: dict[str, Tensor], x: Tensor, name: str, **options: Any) -> Tensor:
    size = x.shape[1]
    place = Place(size, True, weights, dict.fromkeys(weights, torch.arange(size)))
    known = {"mean_magnitude": x.abs().mean(0), "largest_magnitude": x.abs().amax(0)}
    known["second_moment"] = x.T @ x / len(x)
    method = find(name, "rewrite").bind(options, rounded=dict.fromkeys(weights, rounded))
    return method(place, dict.fromkeys(weights, known))


def output_error(weights: dict[str, Tensor], x: Tensor, scale: Tensor) -> float:
    """`sum || (x / s) Q(W diag(s))^T - x W^T ||^2`, as in the paper, with the data itself."""
    return sum(
        ((x / scale) @ rounded(w * scale).T - x @ w.T).square().sum().item()
        for w in weights.values()
    )


@pytest.mark.parametrize("weigh", [False, True])
def test_awq_is_the_best_of_its_grid(weigh: bool) -> None:
    weights, x = problem()
    size = x.abs().mean(0)
    above = torch.cat(list(weights.values())).abs().amax(0)
    tried = []
    for step in range(20):
        scale = size ** (step / 20) / (above ** (1 - step / 20) if weigh else 1)
        scale = scale / (scale.max() * scale.min()).sqrt()
        tried.append((output_error(weights, x, scale), scale))
    found = chosen(weights, x, "awq", weigh=weigh)
    least, best = min(tried, key=lambda pair: pair[0])
    torch.testing.assert_close(found, best)
    assert least < 0.5 * output_error(weights, x, torch.ones(32)), "large channels: worth a lot"


def test_awq_leaves_alone_what_gains_nothing() -> None:
    weights, x = problem(0)
    x = x.sign()
    assert torch.equal(chosen(weights, x, "awq"), torch.ones(32))
    assert torch.equal(chosen(weights, problem()[1], "awq", points=1), torch.ones(32))


def test_awq_worked_example() -> None:
    """Errors 0.1604, 0.0124 and 0.0837 at exponents 0, 1/4 and 1/2: the best is inside."""
    w, x = torch.tensor([[0.3, -1.0, 0.8, 0.1]]), torch.tensor([9.0, 1, 1, 1])
    grid = {"bits": 3, "group": 4, "symmetric": False}
    errors = []
    for power in (0.0, 0.25, 0.5):
        s = x**power
        off = run_chain(w * s, {}, [Step("rtn", grid)]).dense() / s - w
        errors.append((off.square() * x.square()).sum().item())
    assert errors == pytest.approx([0.1604, 0.0124, 0.0837], abs=1e-4)


@pytest.mark.parametrize("alpha", [0.0, 0.25, 0.5, 0.85, 1.0])
def test_smoothquant_is_its_formula(alpha: float) -> None:
    weights, x = problem()
    found = chosen(weights, x, "smoothquant", alpha=alpha)
    for j in range(32):
        most = max(w[:, j].abs().max().item() for w in weights.values())
        wanted = x[:, j].abs().max().item() ** alpha / most ** (1 - alpha)
        assert found[j].item() == pytest.approx(wanted, rel=1e-5)
    if alpha == 0.5:
        inputs, columns = x / found, torch.cat([w * found for w in weights.values()])
        torch.testing.assert_close(inputs.abs().amax(0), columns.abs().amax(0))


def test_channels_that_never_come_are_left_alone() -> None:
    weights, x = problem()
    x[:, [5, 9]] = 0
    for name in ("awq", "smoothquant"):
        found = chosen(weights, x, name)
        assert found.isfinite().all()
        assert (found > 0).all()
        assert torch.equal(found[[5, 9]], torch.ones(2))


def test_a_rotation_spreads_every_channel_evenly() -> None:
    """Of a power of two every entry is `1 / sqrt(size)`; another seed gives other signs."""
    found = find("rotate_stream").bind({})(Stream(64), {})
    torch.testing.assert_close(found.abs(), torch.full((64, 64), 1 / 8))
    signs = found[:, 0].sign()[:, None]
    torch.testing.assert_close(found, signs * hadamard(64))
    other = find("rotate_stream").bind({"seed": 1})(Stream(64), {})
    assert not torch.equal(found, other)


def test_principal_axes_make_the_moment_diagonal() -> None:
    _, x = problem()
    moment = x.T @ x / len(x)
    found = find("principal_axes").bind({})(Stream(32), {"stream_moment": {"decoder/0": moment}})
    turned = found.T @ moment @ found
    sizes = turned.diagonal()
    assert (turned - torch.diag(sizes)).abs().max() < 1e-4 * sizes.max()
    assert torch.equal(sizes, sizes.sort(descending=True)[0])


def slow_clip(w: Tensor, moment: Tensor, group: int) -> Tensor:
    """Row by row and group by group, the share of the largest weight with the least error."""
    found = w.clone()
    for i in range(len(w)):
        for start in range(0, w.shape[1], group):
            here = slice(start, start + group)
            own, h, losses = w[i, here], moment[here, here], []
            for step in range(10):
                most = own.abs().max() * (1 - step / 20)
                cut = own.clamp(-most, most)
                e = (
                    run_chain(cut[None], {}, [Step("rtn", {"bits": 3, "group": 0})]).dense()[0]
                    - own
                )
                losses.append(((e @ h @ e).item(), step, cut))
            found[i, here] = min(losses, key=lambda loss: loss[:2])[2]
    return found


@pytest.mark.parametrize("group", [16, 13])
def test_clip_is_the_slow_one(group: int) -> None:
    """A last group that is shorter as well."""
    weights, x = problem()
    stats = {"second_moment": x.T @ x / len(x)}
    options = {"bits": 3, "group": group}
    found = run_chain(weights["up"], stats, [Step("clip", options)]).dense()
    wanted = slow_clip(weights["up"], stats["second_moment"], group)
    assert (found != wanted).float().mean() < 0.02
    assert not torch.equal(found, weights["up"])
    same = run_chain(weights["up"], stats, [Step("clip", options | {"least": 1.0})]).dense()
    assert torch.equal(same, weights["up"])
