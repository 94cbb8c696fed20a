"""Every score: one finite value per unit, whatever the layers are called; worked examples."""

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Identity

import layerwise
from layerwise.core.errors import LayerwiseError
from layerwise.core.method import Method, find, methods
from layerwise.core.network import Network
from layerwise.core.plan import Step
from layerwise.core.stack import Layer, Matrix, Part, Stack, plain_wiring
from layerwise.core.stats import Scores, Seen, Stats, observe
from layerwise.core.stream import measured as measured_of

every_score = pytest.mark.parametrize("method", methods("score"), ids=lambda m: m.name)


@pytest.fixture(scope="module")
def network(tiny) -> Network:
    return layerwise.open(tiny("mixtral")).load()


@pytest.fixture(scope="module")
def stats(network: Network) -> Stats:
    needed = {name for method in methods("score") for name in method.needs}
    batch = {"input_ids": torch.arange(60).reshape(3, 20)}
    return observe(network, [batch], {name: find(name).function() for name in needed})


def score(method: Method, stats: Stats, stack: Stack, **options: Any) -> Scores:
    """With stand-ins for what the engine gives, which tell layers and groups apart."""

    def fetch(key: str) -> dict[str, Tensor]:
        layer = next(la for la in stack.layers if la.key == key)
        parameters = dict(layer.module.named_parameters())
        return {m.key: m.view(parameters[m.parameter]) for m in layer.matrices}

    def evaluate(trials: Sequence[Mapping[str, Any]]) -> list[tuple[float, float]]:
        return [(float(len(str(sorted(chains)))), 0.1) for chains in trials]

    def losses(trials: Sequence[Mapping[str, Any]]) -> list[float]:
        found = [next(iter(chains.items())) for chains in trials]
        return [2 + step.options["step"] * len(key) for key, (step,) in found]

    def without(trials: Sequence[tuple[str, ...]]) -> list[float]:
        return [2.0 + sum((int(k.split("/")[1]) - 1.5) ** 2 for k in gone) for gone in trials]

    def squares() -> dict[str, Tensor]:
        return {m.key: torch.full(m.shape, m.layer.count("0") + 1.0) for m in stack.matrices()}

    def tried(weight: Tensor, found: Mapping[str, Tensor], chain: tuple[Step, ...]) -> Tensor:
        return weight * 0.9

    given = {"fetch": fetch, "evaluate": evaluate, "without": without, "losses": losses}
    given |= {"squares": squares, "tried": tried}
    return method.bind(options, **given)(stack, stats)


@every_score
def test_one_finite_value_per_unit(method: Method, network: Network, stats: Stats) -> None:
    found = score(method, stats, network.stack)
    layers = [layer.key for layer in network.stack.layers]
    units = {"layer": layers, "span": layers, "group": [g.key for g in network.stack.groups()]}
    units["expert"] = [f"{key}[{expert}]" for key in layers for expert in range(4)]
    units["part"] = [f"{la.key}/{part.name}" for la in network.stack.layers for part in la.parts]
    assert list(found.values) == units[found.unit]
    assert torch.tensor(list(found.values.values())).isfinite().all()
    assert len(set(found.values.values())) > 1
    assert method.name in found.origin or found.nats
    assert not found.nats or found.trial.keys() == found.values.keys()


@pytest.mark.parametrize(
    "method", [m for m in methods("score") if not m.given], ids=lambda m: m.name
)
def test_layers_may_be_relabelled(method: Method, network: Network, stats: Stats) -> None:
    keys = [layer.key for layer in network.stack.layers]
    other = dict(zip(keys, [keys[2], keys[0], keys[1]], strict=True))
    moved = Stats(
        {p: {other.get(k, k): v for k, v in units.items()} for p, units in stats.values.items()}
    )
    before, after = score(method, stats, network.stack), score(method, moved, network.stack)

    def moved_to(key: str) -> str:
        layer = next(k for k in keys if key == k or key.startswith((f"{k}/", f"{k}[")))
        return other[layer] + key.removeprefix(layer)

    assert after.values == {moved_to(key): value for key, value in before.values.items()}


H = torch.tensor([[1.0, 0.0], [1.0, 1.0], [1.0, 1.2], [0.0, 1.0]])


def measured(states: Tensor, stack: str = "decoder") -> Stats:
    """What the probes say of layers between the given states of one token."""
    names = ("residual_cosine", "last_states")
    found: dict[str, dict[str, Any]] = {name: {} for name in names}
    for i in range(len(states) - 1):
        before, after = states[i][None, None], states[i + 1][None, None]
        for name in names:
            probe = find(name).function()
            seen = Seen(before, after, None, None, {}, None)
            found[name][f"{stack}/{i}"] = probe.finish(probe.update(probe.init(""), seen))
    return Stats(found)


def a_stack(depth: int) -> Stack:
    layers = tuple(Layer("decoder", i, "", Identity(), (), ()) for i in range(depth))
    return Stack("decoder", "", layers, plain_wiring(depth))


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("lim", {}, [-0.7071, -0.9959, -0.7682]),
        ("shortgpt", {}, [0.2929, 0.0041, 0.2318]),
        ("deeper_layers", {}, [0.2500, 0.0289, 0.2211]),
        ("deeper_layers", {"span": 2}, [0.2789, 0.2500]),
        ("deeper_layers", {"span": 3}, [0.5]),
    ],
)
def test_worked_examples(name: str, options: dict, expected: list[float]) -> None:
    found = score(find(name), measured(H), a_stack(3), **options)
    assert list(found.values) == [f"decoder/{i}" for i in range(len(expected))]
    assert list(found.values.values()) == pytest.approx(expected, abs=5e-5)


def test_worked_example_of_zd() -> None:
    """Layer 1: mean 2 and deviation 1.41, so that of 3 and 4 only 4 counts; layer 2 is flat."""
    rows = ([0.0, 0, 0, 0, 5], [0.0, 1, 2, 3, 4], [1.0, 1, 1, 1, 1])
    weights = {f"decoder/{i}": torch.tensor([row]) for i, row in enumerate(rows)}
    fetch = lambda key: {"a": weights[key][:, :2], "b": weights[key][:, 2:]}  # noqa: E731
    found = find("zd").bind({}, fetch=fetch)(a_stack(3), Stats({}))
    assert found.values == {"decoder/0": -0.2, "decoder/1": -0.2, "decoder/2": 0.0}


def test_removal_is_the_rise_of_the_loss() -> None:
    found = score(find("removal"), Stats({}), a_stack(3))
    assert list(found.values.values()) == [2.25, 0.25, 0.25]


def test_parts_are_scored_by_what_they_add() -> None:
    """`x = (1, 0)`, `f = (0, 1)` scores `1 - 1/sqrt(2)`; `f = 3x` scores 0, whatever it does."""
    x = torch.tensor([[[1.0, 0.0]]])
    added = {"attention": measured_of(x, x.flip(-1)), "mlp": measured_of(x, 3 * x)}
    probe = find("part_cosine").function()
    found = probe.finish(probe.update({}, Seen(x, x, None, None, {}, None, added)))
    parts = Part("attention", True, ()), Part("mlp", False, ())
    stack = Stack("decoder", "", (Layer("decoder", 0, "", Identity(), parts, ()),), ())
    scored = score(find("llm_drop"), Stats({"part_cosine": {"decoder/0": found}}), stack)
    assert list(scored.values) == ["decoder/0/attention", "decoder/0/mlp"]
    assert list(scored.values.values()) == pytest.approx([1 - 0.5**0.5, 0.0], abs=1e-6)
    with pytest.raises(LayerwiseError, match="none of attention"):
        score(find("llm_drop"), Stats({"part_cosine": {}}), stack)


def test_sensitivity_tries_one_group_at_a_time(network: Network) -> None:
    asked = []
    evaluate = lambda trials: (asked.extend(trials), [(0.5, 0.01)] * len(trials))[1]  # noqa: E731
    options = {"trial": "gptq", "bits": 2, "group": 32}
    found = find("sensitivity").bind(options, evaluate=evaluate)(network.stack, Stats({}))
    assert [list(chains) for chains in asked] == [[g.key] for g in network.stack.groups()]
    (step,) = next(iter(asked[0].values()))
    assert (step.method, step.options) == ("gptq", {"bits": 2, "group": 32})
    assert found.nats


def test_spans_end_with_their_stack() -> None:
    mine, other = measured(H), measured(H, "decoder2")
    both = Stats({"last_states": {**mine["last_states"], **other["last_states"]}})
    found = score(find("angular_distance"), both, a_stack(3), span=2)
    assert list(found.values) == ["decoder/0", "decoder/1"]


def test_pairs_are_shared_out_and_add_up(network: Network) -> None:
    """L(1) = L(2) = L(1, 2) = 0.01: the second edit is free once the first is made."""
    first, second = [group.key for group in network.stack.groups()][:2]
    stack = Stack("decoder", "", network.stack.layers[:1], plain_wiring(1))

    def evaluate(trials: Sequence[Mapping[str, Any]]) -> list[tuple[float, float]]:
        return [(0.01 if chains.keys() & {first, second} else 0.0, 0.1) for chains in trials]

    found = find("interactions").bind(evaluate=evaluate)(stack, Stats({}))
    assert found.values[first] == found.values[second] == pytest.approx(0.005)
    others = [value for key, value in found.values.items() if key not in (first, second)]
    assert others == pytest.approx([0.0] * len(others))


def test_slopes_are_fitted_over_all_trials(network: Network) -> None:
    given = {3: (0.08, 0.04), 4: (0.02, 0.01)}

    def evaluate(trials: Sequence[Mapping[str, Any]]) -> list[tuple[float, float]]:
        return [given[next(iter(chains.values()))[0].options["bits"]] for chains in trials]

    found = find("linearity").bind({"bits": (3, 4)}, evaluate=evaluate)(network.stack, Stats({}))
    assert list(found.values.values()) == pytest.approx([2.0] * len(found.values))


def test_errors_are_weighed_by_gradients_and_by_inputs(network: Network, stats: Stats) -> None:
    """Ten per cent off everywhere: half the squared weights, and the output's own square."""
    layer = network.stack.layers[0]
    matrix = next(m for m in layer.matrices if m.role == "o")
    weight = matrix.view(dict(layer.module.named_parameters())[matrix.parameter]).detach()
    fisher = score(find("fisher"), stats, network.stack)
    wanted = 0.5 * 2 * (0.1 * weight).square().sum().item()  # the stand-in is 2 in layer 0
    assert fisher.values[matrix.fusion] == pytest.approx(wanted, rel=1e-4)
    assert fisher.trial[matrix.fusion] == pytest.approx(0.01, rel=1e-4)
    moment = stats["second_moment"][matrix.inputs]
    outputs = 0.01 * torch.trace(weight @ moment @ weight.T).item()
    found = score(find("trial_error"), stats, network.stack)
    assert found.values[matrix.fusion] == pytest.approx(outputs, rel=1e-3)


def test_outliers_and_medians_of_a_layer() -> None:
    """Of 1, 1, 1, 1 and 6 one stands out at twice the mean; the medians are 1 and 3."""
    weights = {"decoder/0": [[1.0, 1, 1, 1, 6]], "decoder/1": [[3.0, 3, 3, 3, 3]]}
    layers = tuple(
        Layer(
            "decoder",
            i,
            "",
            Identity(),
            (),
            (Matrix(f"decoder/{i}", "", "w", "", None, (1, 5), False, f"in{i}", ""),),
        )
        for i in range(2)
    )
    stack = Stack("decoder", "", layers, plain_wiring(2))
    stats = Stats({"second_moment_diagonal": {"in0": torch.ones(5), "in1": torch.ones(5)}})
    fetch = lambda key: {f"{key}/.w": torch.tensor(weights[key])}  # noqa: E731
    owl = find("owl").bind({"factor": 2.0}, fetch=fetch)(stack, stats)
    assert owl.values == pytest.approx({"decoder/0": 20.0, "decoder/1": 0.0})
    dlp = find("dlp").bind({}, fetch=fetch)(stack, stats)
    assert dlp.values == pytest.approx({"decoder/0": 0.75, "decoder/1": 0.25})


def test_slopes_along_noise(network: Network) -> None:
    """A loss that rises by 3 per step has slope 3, in every draw; a layer's groups share it."""
    losses = lambda trials: [3 * s.options["step"] for t in trials for (s,) in t.values()]  # noqa: E731
    found = find("ecoflap").bind({"draws": 2}, losses=losses)(network.stack, Stats({}))
    first = [g for g in network.stack.groups() if g.key.startswith("decoder/0/")]
    assert sum(found.values[g.key] for g in first) == pytest.approx(6.0 * len(first))
    assert found.values[first[0].key] / first[0].size == pytest.approx(
        found.values[first[1].key] / first[1].size
    )
