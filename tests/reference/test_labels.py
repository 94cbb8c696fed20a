"""Probes on planted labels: what must be found, what must not, and slow references."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import layerwise
from layerwise.core.errors import LayerwiseError
from layerwise.core.method import find
from layerwise.core.sites import At
from layerwise.core.stack import Layer, Stack, plain_wiring
from layerwise.core.stats import Figures, Stats, observe
from layerwise.core.tokens import Sample
from layerwise.describe.combine import normed, place_probe, weighted_probe
from layerwise.describe.labels import (
    depth_of,
    equal_error_rate,
    fitted,
    mislabelled,
    split_of,
    standardised,
)
from layerwise.describe.neurons import advantage, as_active, coactivation, modularity, silenced
from layerwise.describe.topics import context_cosines
from layerwise.jobs.rerun import Rerun


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


LABELS = torch.arange(120) % 2


def planted(strength: float, seed: int, dim: int = 8) -> Tensor:
    """States in which the label is a direction of this strength among noise."""
    x = random(len(LABELS), dim, seed=seed)
    x[:, 0] += strength * (2 * LABELS.float() - 1)
    return x


def described(name: str, *states: Tensor, labels: Tensor = LABELS, **options: Any) -> Figures:
    layers = tuple(Layer("decoder", i, "", nn.Identity(), (), ()) for i in range(len(states)))
    where = torch.stack([torch.arange(len(labels)), torch.ones_like(labels)], 1)
    samples = {
        f"decoder/{i}": Sample(where, states[max(i - 1, 0)], x) for i, x in enumerate(states)
    }
    probes: dict[str, Any] = dict.fromkeys(
        ("pooled_states", "first_states", "largest_states"), samples
    )
    probes["place_states"] = {key: s.after[:, None] for key, s in samples.items()}
    bound = find(name, "describe").bind(options, labels=labels)
    return bound(Stack("decoder", "", layers, plain_wiring(len(layers))), Stats(probes))


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_a_label_is_read_where_it_is(kind: str) -> None:
    states = (planted(0, 1), planted(1, 2), planted(8, 3), planted(0, 4))
    found = described("probe", *states, kind=kind).values
    assert found["decoder/2"]["accuracy"] == found["decoder/2"]["auc"] == 1
    assert found["decoder/2"]["information"] == pytest.approx(1, abs=0.15)
    assert found["decoder/0"]["information"] < 0.1 > found["decoder/3"]["information"]
    assert 0.65 < found["decoder/1"]["accuracy"] < 1
    assert found["decoder"]["chance"] == 0.5


def test_constant_states_hold_no_information() -> None:
    row = described("probe", torch.ones(120, 4)).values["decoder/0"]
    assert row["information"] == pytest.approx(0, abs=1e-6)
    assert row["accuracy"] == 0.5


def test_information_is_the_mean_of_differences_in_bits() -> None:
    """Against a probe written out: one weight, fitted by Newton steps."""
    x = planted(0.8, 5, dim=1)
    split = split_of(LABELS, 0)
    z = torch.from_numpy(standardised(x.double().numpy(), split.train))
    design = torch.cat([torch.ones_like(z), z], 1)
    a, y = design[split.train], LABELS[split.train].double()
    w = torch.zeros(2, dtype=torch.float64)
    for _ in range(30):  # L2 with C = 1 on the slope
        p = torch.sigmoid(a @ w)
        penalty = torch.tensor([0.0, 1.0]).double()
        hessian = (a * (p * (1 - p))[:, None]).T @ a + penalty.diag()
        w = w - torch.linalg.solve(hessian, a.T @ (p - y) + penalty * w)
    q = torch.sigmoid(design[split.test] @ w)
    wanted = LABELS[split.test].double()
    slow = 1 + (wanted * q.log2() + (1 - wanted) * (1 - q).log2()).mean()
    found = described("probe", x).values["decoder/0"]["information"]
    assert found == pytest.approx(slow.item(), abs=1e-3)


def test_depth_of_the_worked_example() -> None:
    curve = [0.5, 0.52, 0.60, 0.80, 0.90, 0.91, 0.91, 0.90]
    assert depth_of(curve) == {"jump": 2 / 8, "converging": 7 / 8, "settled": 5 / 8}
    assert depth_of([0.5, 0.4, 0.3]) == {}


@pytest.mark.parametrize(("labels", "found"), [([0] * 9, "1 of them"), ([0] * 9 + [1], "9, 1")])
def test_labels_that_cannot_be_learned(labels: list[int], found: str) -> None:
    with pytest.raises(LayerwiseError, match=found):
        described("probe", random(len(labels), 3), labels=torch.tensor(labels))


def test_the_split_is_stratified_and_apart() -> None:
    split = split_of(torch.tensor([0] * 50 + [1] * 10), 3)
    assert (split.labels[split.test] == 1).sum() == 4 and len(split.test) == 24
    assert not set(split.train) & set(split.test) and len({*split.train, *split.test}) == 60


def test_truncation_helps_where_noise_is_coded_in_small_directions() -> None:
    """The class in one loud direction, every document's own (wrong) label in many quiet ones."""
    loud = planted(6, 1, dim=3) * 3
    states = torch.cat([loud, random(120, 60, seed=2)], 1)
    row = described("truncation", states, noise=0.3).values["decoder/0"]
    assert row["best"] > 0.95 > row["accuracy"] + 0.05
    assert row["kept"] <= 4 and row["random"] <= row["best"]
    clean = described("truncation", states, noise=0.0).values["decoder/0"]
    assert clean["accuracy"] > row["accuracy"]


def test_the_layer_with_the_label_has_the_weight_however_loud_the_others() -> None:
    states = [random(120, 8, seed=i) for i in range(4)]
    states[2] = planted(4, 9)
    states[0] *= 100
    found = described("layer_weights", *states).values
    assert max(found, key=lambda key: found[key]["weight"]) == "decoder/2"
    assert sum(row["weight"] for row in found.values()) == pytest.approx(1)
    assert found["decoder/1"]["accuracy"] < 0.75 < found["decoder/2"]["accuracy"]
    assert found["decoder/2"]["eer"] < 0.15 < found["decoder/1"]["eer"]


def test_one_layer_is_all_the_weight() -> None:
    split = split_of(LABELS, 0)
    weights, _ = weighted_probe(normed([planted(2, 1).double().numpy()]), split, 5)
    assert weights.tolist() == [1.0]


def test_twelve_combinations_and_the_layer_that_has_the_label() -> None:
    found = described("combinations", random(120, 8, seed=2), planted(3, 1), random(120, 8)).values
    names = set(found["decoder/0"]) - {"compute"}
    assert len(names) + 1 == 12  # the twelfth is the baseline
    assert found["decoder/1"]["first"] == found["decoder/1"]["cutoff"] > 0.9
    assert max(found["decoder/0"][name] for name in names) < 0.75
    assert min(found["decoder/1"][name] for name in ("weighted", "largest")) > 0.9
    # not `weighted_max`: the surest of the layers may be sure of noise, whatever the label
    for name in ("first_weighted", "weighted_weighted", "weighted_swapped"):
        assert found["decoder/2"][name] > 0.75
    assert found["decoder"]["baseline"] == found["decoder/2"]["first"] < 0.75
    assert found["decoder"]["earliest"] <= 2 / 3
    assert [found[f"decoder/{i}"]["compute"] for i in range(3)] == [1 / 3, 2 / 3, 1]


def test_combinations_of_one_layer_are_that_layer() -> None:
    row = described("combinations", planted(3, 1)).values["decoder/0"]
    assert row["first"] == row["first_max"] == row["largest"] == row["largest_max"]
    assert row["weighted"] == row["weighted_weighted"] == row["weighted_max"]


def test_a_weighting_of_places_finds_the_place_of_the_label() -> None:
    """The label is a direction at one place of four, with the other sign at another."""
    places = torch.stack([planted(0, i) for i in range(4)], 1)
    places[:, 1, 0] += 6 * (2 * LABELS.float() - 1)
    places[:, 2, 0] -= 6 * (2 * LABELS.float() - 1)
    split = split_of(LABELS, 0)
    guess = place_probe(places[:, None], split, 200, "places").argmax(1)
    assert (guess == split.labels[split.test]).mean() > 0.9
    blind = fitted("linear", places.mean(1).double().numpy(), split).argmax(1)
    assert (blind == split.labels[split.test]).mean() < 0.75


def test_an_old_head_on_all_directions_is_the_probe_itself() -> None:
    loud = planted(6, 1, dim=3) * 3
    states = torch.cat([loud, random(120, 60, seed=2)], 1)
    old, new = (
        described("truncation", states, head=h).values["decoder/0"] for h in ("old", "refitted")
    )
    assert old["accuracy"] == pytest.approx(new["accuracy"], abs=0.05)
    assert old["best"] > 0.95 > old["accuracy"] + 0.05 and old["kept"] <= 4


def test_mislabelled_documents_get_another_class() -> None:
    split = split_of(torch.arange(300) % 3, 0)
    noisy = mislabelled(split, 0.3, np.random.default_rng(0))
    assert 0.2 < (noisy.labels != split.labels).mean() < 0.4
    assert set(noisy.labels) == {0, 1, 2}
    assert (mislabelled(split, 1.0, np.random.default_rng(0)).labels != split.labels).all()


def test_documents_of_a_topic_lie_together() -> None:
    """Three topics in orthogonal directions; then labels that states know nothing of."""
    kinds = torch.arange(120) % 3
    x = torch.nn.functional.one_hot(kinds, 6) * (random(120, 1, seed=3).abs() / 4 + 1)
    row = described("topics", x + 0.01 * random(120, 6), labels=kinds, directions=2).values
    assert row["decoder/0"]["within"] > 0.95
    assert row["decoder/0"]["between"] == pytest.approx(0.5, abs=0.1)
    noise = described("topics", random(120, 6)).values["decoder/0"]
    assert abs(noise["gap"]) < 0.05
    cosine = context_cosines(random(10, 4).double(), 20)
    centred = nn.functional.normalize(
        random(10, 4).double() - random(10, 4).double().mean(0), dim=1
    )
    torch.testing.assert_close(cosine, centred @ centred.T)  # all directions: plain cosines
    with pytest.raises(LayerwiseError, match="two labels"):
        described("topics", x, labels=torch.zeros(120).long())


def slow_rate(scores: np.ndarray, positive: np.ndarray) -> float:
    """Least of the larger error over a fine grid of thresholds."""
    grid = np.linspace(scores.min() - 1, scores.max() + 1, 20001)
    return min(max((scores[positive] < t).mean(), (scores[~positive] >= t).mean()) for t in grid)


def test_equal_error_rates() -> None:
    positive = np.arange(400) % 2 == 0
    scores = random(400).numpy().astype(float) + positive
    assert equal_error_rate(scores, positive) == pytest.approx(
        slow_rate(scores, positive), abs=0.006
    )
    assert equal_error_rate(positive * 1.0, positive) == 0
    assert equal_error_rate(np.zeros(400), positive) == 0.5


def slow_precision(values: list[float], hits: list[bool]) -> float:
    order = sorted(range(len(values)), key=lambda i: -values[i])
    found = [sum(hits[j] for j in order[: r + 1]) / (r + 1) for r, i in enumerate(order) if hits[i]]
    return sum(found) / len(found)


def test_precision_of_neurons() -> None:
    x, labels = random(30, 4), torch.arange(30) % 3
    found = advantage(x, labels)
    for k in range(3):
        for n in range(4):
            slow = slow_precision(x[:, n].tolist(), (labels == k).tolist()) - 1 / 3
            assert found[k, n].item() == pytest.approx(slow, abs=1e-6)


def test_planted_groups_of_neurons_are_found() -> None:
    """Two groups of five that fire on one label each, among forty that fire at random."""
    x = random(120, 50, seed=7).abs()
    x[:, :5] += 4 * LABELS[:, None] * (1 + random(120, 1, seed=8).abs())
    x[:, 5:10] += 4 * (1 - LABELS[:, None]) * (1 + random(120, 1, seed=9).abs())
    layer = Layer("decoder", 0, "", nn.Identity(), (), ())
    stats = Stats({"neuron_means": {"decoder/0/mlp.down": x}})
    stack = Stack("decoder", "", (layer,), plain_wiring(1))
    row = find("specialisation").bind({}, labels=LABELS)(stack, stats).values["decoder/0"]
    assert row["best"] == pytest.approx(0.5, abs=0.01)
    assert row["specialised"] == pytest.approx(0.2, abs=0.05)
    assert row["modularity"] == pytest.approx(0.5, abs=0.05) and row["modularity_chance"] < 0.2
    none = find("specialisation").bind({}, labels=LABELS[torch.randperm(120)])(stack, stats)
    assert none.values["decoder/0"]["best"] < 0.3


def test_modularity_of_cliques_and_edges_of_correlation() -> None:
    two = torch.block_diag(torch.ones(4, 4), torch.ones(4, 4)).bool().fill_diagonal_(False)
    groups = torch.arange(8) // 4
    assert modularity(two, groups) == pytest.approx(0.5)
    assert modularity(two, torch.zeros(8).long()) == pytest.approx(0)
    x = torch.stack([torch.arange(9.0), 2 * torch.arange(9.0), -torch.arange(9.0)], 1)
    assert coactivation(x, 0.3).tolist() == [
        [False, True, False],
        [True, False, False],
        [False] * 3,
    ]
    assert math.isclose(modularity(torch.zeros(2, 2).bool(), torch.tensor([0, 1])), 0)


def test_silencing_the_neurons_of_a_label_hurts_its_documents(tiny) -> None:
    """Labels are which half of the vocabulary a text is of; the neurons are those of one layer."""
    network = layerwise.open(tiny("llama")).load()
    labels = torch.arange(12) % 2
    ids = torch.randint(3, 60, (12, 10), generator=torch.Generator().manual_seed(0))
    batches = [{"input_ids": (row + 60 * k)[None]} for row, k in zip(ids, labels, strict=True)]
    stats = observe(network, batches, {"neuron_means": find("neuron_means", "measure").function()})
    rerun = Rerun(network, batches)
    method = find("pruning", "describe")
    with torch.no_grad():
        found = method.bind({"share": 0.1}, labels=labels, rerun=rerun)(network.stack, stats).values
        none = method.bind({"of": "mlp.nothing"}, labels=labels, rerun=rerun)(network.stack, stats)
    assert all(row["own"] > 0 and row["matched_other"] > 0 for row in found.values())
    assert sum(r["own"] - r["other"] for r in found.values()) > 0
    assert all(row == {} for row in none.values.values())
    means = stats["neuron_means"]["decoder/1/mlp.down"].double()
    mine = advantage(means, labels)[0].topk(10).indices
    other = as_active(means.mean(0), mine)
    assert not set(mine.tolist()) & set(other.tolist()) and len(set(other.tolist())) == 10


def test_silencing_by_hand(tiny) -> None:
    network = layerwise.open(tiny("llama")).load()
    batch = {"input_ids": torch.arange(3, 13)[None]}
    edit = silenced(At("decoder/2", "mlp.down"), torch.tensor([1, 5]))
    found = Rerun(network, [batch]).edited(0, [edit], []).output.logits
    down = network.layers()[2].module.get_submodule("mlp.down_proj")
    with torch.no_grad():
        plain = network.module(**batch).logits
        down.weight[:, [1, 5]] = 0
        torch.testing.assert_close(found, network.module(**batch).logits, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found, plain)
