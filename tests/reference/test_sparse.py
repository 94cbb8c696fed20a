"""Sparsity and low rank against slow, obvious forms of the papers, and their worked examples."""

import numpy as np
import pytest
import torch
from torch import Tensor

from layerwise.core.chain import run_chain
from layerwise.core.damage import Damage, Menu, Option
from layerwise.core.method import find
from layerwise.core.plan import Step
from layerwise.edit.weight.low_rank import truncation_curve


def problem(rows: int = 6, columns: int = 16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(rows, columns, generator=generator)
    x = torch.randn(3 * columns, columns, generator=generator) @ torch.randn(
        columns, columns, generator=generator
    )
    return weight, x.T @ x / len(x)


def test_wanda_of_the_paper() -> None:
    weight = torch.tensor([[4.0, 0, 1, -1], [3, -2, -1, -3]])
    stats = {"second_moment_diagonal": torch.tensor([1.0, 4, 64, 9])}
    kept = find("wanda").function(weight, stats).dense() != 0
    assert (~kept).nonzero().tolist() == [[0, 1], [0, 3], [1, 0], [1, 1]]
    plain = run_chain(weight, {}, [Step("magnitude", {"pattern": "row"})]).dense()
    assert plain[0].nonzero().flatten().tolist()[0] == 0


def slow_sparsegpt(weight: Tensor, moment: Tensor, width: int, rows_too: bool) -> Tensor:
    """Column by column with the inverse of what remains, in float64."""
    w = weight.double().numpy().copy()
    h = moment.double().numpy() + 0.01 * moment.diagonal().mean().item() * np.eye(len(moment))
    mask = np.zeros(w.shape, dtype=bool)
    for j in range(w.shape[1]):
        inverse = [np.linalg.inv(h[i:, i:]) for i in range(j, min(j - j % width + width, len(h)))]
        if j % width == 0:
            sizes = np.array([rest[0, 0] for rest in inverse])
            scores = w[:, j : j + width] ** 2 / sizes
            groups = scores.reshape(1, -1) if rows_too else scores
            gone = np.argsort(groups, axis=1, kind="stable")[:, : groups.shape[1] // 2]
            flags = np.zeros(groups.shape, dtype=bool)
            np.put_along_axis(flags, gone, True, axis=1)
            mask[:, j : j + width] = flags.reshape(scores.shape)
        error = np.where(mask[:, j], w[:, j], 0.0) / inverse[0][0, 0]
        w[:, j:] -= np.outer(error, inverse[0][0])
        w[mask[:, j], j] = 0.0
    return torch.from_numpy(np.where(mask, 0.0, w))


@pytest.mark.parametrize(("pattern", "width"), [("2:4", 4), ("block", 16)])
def test_sparsegpt_by_hand(pattern: str, width: int) -> None:
    weight, moment = problem()
    step = Step("sparsegpt", {"pattern": pattern})
    found = run_chain(weight, {"second_moment": moment}, [step]).dense()
    wanted = slow_sparsegpt(weight, moment, width, pattern == "block")
    torch.testing.assert_close(found, wanted.float(), rtol=2e-3, atol=2e-3)


def test_sparsegpt_of_the_paper() -> None:
    """Removing the first of (1, 1.2) leaves 1.7 and an error of 1.5, where plain zeroing has 2."""
    moment, weight = torch.tensor([[2.0, 1.0], [1.0, 2.0]]), torch.tensor([[1.0, 1.2]])
    step = Step("sparsegpt", {"damping": 0.0})
    error = run_chain(weight, {"second_moment": moment}, [step]).dense() - weight
    assert (error @ moment @ error.T).item() == pytest.approx(1.5)


def test_the_curve_is_what_every_rank_loses() -> None:
    weight, moment = problem()
    stats = {"second_moment": moment}
    curve = truncation_curve(weight, stats)
    for rank in range(1, 7):
        found = run_chain(weight, stats, [Step("low_rank", {"rank": rank})])
        error = (found.dense() - weight).double()
        lost = ((error @ moment.double()) * error).sum().item()
        assert lost == pytest.approx(curve[rank].item(), rel=1e-3, abs=1e-3)


def test_no_product_of_the_rank_is_nearer() -> None:
    """Against the best that a Cholesky root gives, and against perturbed factors."""
    weight, moment = problem()
    lower = torch.linalg.cholesky(moment.double())
    u, s, vh = torch.linalg.svd(weight.double() @ lower, full_matrices=False)
    best = (u[:, :3] * s[:3]) @ vh[:3] @ torch.linalg.inv(lower)
    found = run_chain(weight, {"second_moment": moment}, [Step("low_rank", {"rank": 3})])
    torch.testing.assert_close(found.dense(), best.float(), rtol=1e-3, atol=1e-3)


def test_the_inputs_decide_which_rank_stays() -> None:
    weight = torch.diag(torch.tensor([1.0, 2.0]))
    stats = {"second_moment": torch.diag(torch.tensor([100.0, 1.0]))}
    full = run_chain(weight, stats, [Step("low_rank", {"rank": 1})]).dense()
    plain = run_chain(weight, stats, [Step("low_rank", {"rank": 1, "metric": "none"})]).dense()
    torch.testing.assert_close(full, torch.diag(torch.tensor([1.0, 0.0])))
    torch.testing.assert_close(plain, torch.diag(torch.tensor([0.0, 2.0])))


@pytest.mark.parametrize(("one_rank", "winner"), [(True, "factors"), (False, "bits")])
def test_factors_against_bits_at_the_same_bytes(one_rank: bool, winner: str) -> None:
    """A matrix of rank one is better held as factors, an orthogonal one in bits."""
    generator = torch.Generator().manual_seed(0)
    square = torch.randn(64, 64, generator=generator)
    weight = square[:, :1] @ square[:1] if one_rank else torch.linalg.qr(square)[0]
    chains = {
        "factors": [Step("quantized_factors", {"share": 0.25, "bits": 4})],
        "bits": [Step("rtn", {"bits": 2, "group": 0, "shrink": True})],
    }
    found = {name: run_chain(weight, {}, chain) for name, chain in chains.items()}
    assert found["factors"].nbytes <= 1.1 * found["bits"].nbytes
    lost = {n: (r.dense() - weight).square().sum().item() for n, r in found.items()}
    assert min(lost, key=lambda n: lost[n]) == winner


def slow_lamp(layers: dict[str, list[float]], goes: int) -> dict[str, int]:
    """How many weights of every layer stay, by the score of every weight."""
    scores = []
    for name, weights in layers.items():
        squares = sorted(w**2 for w in weights)
        scores += [(u / sum(squares[i:]), name) for i, u in enumerate(squares)]
    gone = [name for _, name in sorted(scores)[:goes]]
    return {name: len(weights) - gone.count(name) for name, weights in layers.items()}


def test_one_threshold_is_lamp() -> None:
    generator = torch.Generator().manual_seed(0)
    layers = {
        n: (s * torch.randn(20, generator=generator)).tolist()
        for n, s in zip("abc", (1, 3, 9), strict=True)
    }
    menus, errors = {}, {}
    for name, weights in layers.items():
        squares = np.sort(np.square(weights))
        lost = np.concatenate([[0.0], squares.cumsum()]) / squares.sum()
        menus[name] = Menu(name, tuple(Option((), 20 - i, f"{i}") for i in range(20)))
        errors[name] = tuple(lost[:20].tolist())
    damage = Damage(errors, dict.fromkeys(menus, 1.0))
    choice = find("lamp").bind()(damage, menus, 25)
    assert {n: 20 - i for n, i in choice.items()} == slow_lamp(layers, 35)


@pytest.mark.parametrize(
    ("scores", "width", "kept"),
    [((0.5, 1.5, 1.0), 0.08, (22, 38, 30)), ((4 / 6, 5 / 6, 0.5), 0.15, (30, 45, 15))],
)
def test_ratios_of_owl_and_dlp(scores: tuple, width: float, kept: tuple) -> None:
    options = tuple(Option((), size, f"{size}") for size in range(100, 0, -1))
    menus = {name: Menu(name, options) for name in "abc"}
    damage = Damage({}, dict(zip("abc", scores, strict=True)))
    choice = find("spread_ratios").bind({"width": width})(damage, menus, 90)
    assert tuple(100 - i for i in choice.values()) == kept
