"""Figures against scikit-learn, which computes them in its own way."""

import numpy as np
import pytest
import torch
from sklearn.cross_decomposition import CCA
from sklearn.decomposition import PCA
from sklearn.linear_model import LinearRegression, Ridge
from sklearn.metrics import average_precision_score, roc_curve
from sklearn.neighbors import NearestNeighbors
from torch import Tensor, nn

from layerwise.core.method import find
from layerwise.core.stack import Layer, Stack, plain_wiring
from layerwise.core.stats import Stats
from layerwise.core.tokens import Sample, moments_of
from layerwise.describe.geometry import affine, leading, neighbours
from layerwise.describe.labels import equal_error_rate
from layerwise.describe.neurons import advantage
from layerwise.describe.similarity import correlations, match_map


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_average_precision() -> None:
    x, labels = random(60, 5), torch.arange(60) % 3
    found = advantage(x, labels)
    for k in range(3):
        mine = (labels == k).numpy()
        for n in range(5):
            theirs = average_precision_score(mine, x[:, n].numpy()) - mine.mean()
            assert found[k, n].item() == pytest.approx(theirs, abs=1e-9)


def test_equal_error_rate_on_the_curve() -> None:
    positive = np.arange(300) % 3 == 0
    scores = random(300).numpy() + positive
    passed, hit, _ = roc_curve(positive, scores, drop_intermediate=False)
    missed = 1 - hit
    theirs = passed[np.argmin(np.abs(passed - missed))]
    assert equal_error_rate(scores, positive) == pytest.approx(theirs, abs=0.01)


def test_rank_is_that_of_the_explained_variance() -> None:
    x = random(200, 6) @ random(6, 20, seed=1)
    layer = Layer("decoder", 0, "", nn.Identity(), (), ())
    stack = Stack("decoder", "", (layer,), plain_wiring(1))
    where = torch.stack([torch.arange(200), torch.zeros(200).long()], 1)
    stats = Stats({"token_sample": {"decoder/0": Sample(where, x, x)}})
    row = find("spread").bind({})(stack, stats).values["decoder/0"]
    p = PCA().fit(x.numpy()).explained_variance_ratio_[:6]
    assert row["rank"] == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-9)
    assert row["top_share"] == pytest.approx(p[0], rel=1e-9)


def test_leading_directions_of_either_shape() -> None:
    for rows, width in ((40, 8), (8, 40)):
        x = random(rows, width)
        theirs = np.linalg.svd(x.numpy())[2][:3]
        mine = leading(x, 3).numpy()
        np.testing.assert_allclose(mine @ mine.T, theirs.T @ theirs, atol=1e-9)


def test_nearest_tokens() -> None:
    x = random(50, 4)
    model = NearestNeighbors(n_neighbors=6).fit(x.numpy())
    theirs = model.kneighbors(x.numpy(), return_distance=False)[:, 1:]
    assert np.array_equal(neighbours(x, x, 5).numpy(), theirs)
    assert np.array_equal(neighbours(x[:7].clone(), x, 5).numpy(), theirs[:7])


def test_canonical_correlations() -> None:
    x, y = random(400, 3), random(400, 3, seed=1)
    y[:, 0] += 2 * x[:, 0]
    y[:, 1] -= x[:, 1]
    a, b = CCA(3, scale=False, max_iter=5000, tol=1e-12).fit_transform(x.numpy(), y.numpy())
    theirs = [np.corrcoef(a[:, i], b[:, i])[0, 1] for i in range(3)]
    found = correlations(moments_of(x, y), keep=1.0)
    assert found["cca"] == pytest.approx(np.mean(theirs), abs=1e-4)


def test_maps_between_states() -> None:
    x, y = random(80, 5), random(80, 4, seed=1) + 3
    held_out = torch.arange(80) % 2 == 1
    train, test = ~held_out.numpy(), held_out.numpy()
    plain = LinearRegression().fit(x.numpy()[train], y.numpy()[train])
    error = ((plain.predict(x.numpy()[test]) - y.numpy()[test]) ** 2).sum()
    raw, _ = match_map([x], [y], held_out, ridge=0.0)
    assert raw.item() == pytest.approx(error / (y.numpy()[test] ** 2).sum(), rel=1e-6)
    m = moments_of(x, y)
    weight, offset = affine(m, ridge=0.1)
    damp = 0.1 * float(m.covariance(0, 0).diagonal().mean()) * 80
    damped = Ridge(alpha=damp).fit(x.numpy(), y.numpy())
    np.testing.assert_allclose(weight.numpy().T, damped.coef_, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(offset.numpy(), damped.intercept_, rtol=1e-6)
