"""Every edit of activations: neutral settings, promised counts, and what it is compared with."""

import pytest
import torch
from torch import Tensor

import layerwise
from layerwise.core.errors import LayerwiseError
from layerwise.core.method import Method, methods
from layerwise.core.network import Network
from layerwise.core.stats import Stats
from layerwise.edit.activation.zeros import keep_largest
from layerwise.jobs.activations import Met, activation_edits, measured_for, rotations

BATCH = {"input_ids": torch.arange(60).reshape(2, 30)}
every_method = pytest.mark.parametrize("method", methods("activation"), ids=lambda m: m.name)
kinds = pytest.mark.parametrize("kind", ["llama", "gpt2"])


def opened(tiny, kind: str) -> Network:
    return layerwise.open(tiny(kind), dtype="float32").load()


def logits(network: Network, edits: list) -> Tensor:
    return network.run(BATCH, edits).logits


@every_method
@kinds
def test_keeping_all_changes_nothing_and_less_changes_more(tiny, kind: str, method: Method) -> None:
    network = opened(tiny, kind)
    stats = measured_for(network, [BATCH], method.name)
    plain, off = logits(network, []), []
    for share in (1.0, 0.9, 0.6, 0.2):
        edits = activation_edits(network, stats, method.name, {"share": share})
        again = activation_edits(network, stats, method.name, {"share": share})
        found = logits(network, edits)
        assert torch.equal(found, logits(network, again))
        off.append((found - plain).square().mean().item())
    assert off[0] == 0
    assert off == sorted(off)


@every_method
def test_as_many_go_as_were_promised(tiny, method: Method) -> None:
    """On the calibration text itself; thresholds hold on average, counts for every token."""
    network = opened(tiny, "llama")
    stats, met = measured_for(network, [BATCH], method.name), Met({}, {})
    options = {"share": 0.5, "stream": 0.8, "inner": 1.2}
    logits(network, activation_edits(network, stats, method.name, options, met))
    matrices = [m for stack in network.stacks for m in stack.matrices()]
    assert met.entries.keys() == {m.key for m in matrices}
    for matrix in matrices:
        promised = 0.4 if matrix.role in ("o", "down") else 0.6
        found = met.kept[matrix.key] / met.entries[matrix.key]
        close = 0.02 if method.name == "top_k" else 0.1
        assert found == pytest.approx(promised, abs=close), matrix.key
    assert 0.45 < met.left(matrices) < 0.65


@every_method
def test_what_is_out_of_range_is_said(tiny, method: Method) -> None:
    network = opened(tiny, "llama")
    for options in ({"share": 1.5}, {"share": -0.1}, {"inner": -1.0}):
        with pytest.raises(LayerwiseError, match=f"{method.name}, options 'share'"):
            activation_edits(network, Stats({}), method.name, options)


def test_principal_axes_hold_more_than_others() -> None:
    """The worked example: on inputs along (1, 1) one rotated entry of two loses next to nothing."""
    rows = torch.tensor([[1.0, 1.0], [2.0, 2.0], [1.0, -1.0]])
    basis = torch.linalg.eigh(rows.T @ rows)[1]
    x = torch.tensor([2.0, 1.9])
    assert (keep_largest(x, 1, basis) - x).square().sum().item() == pytest.approx(0.005)
    assert (keep_largest(x, 1) - x).square().sum().item() == pytest.approx(3.61)
    assert keep_largest(x, 2, basis) is x


def test_every_token_keeps_its_own_largest_entries() -> None:
    x = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(0))
    found = keep_largest(x, 4)
    for row, kept in zip(x.flatten(0, 1), found.flatten(0, 1), strict=True):
        places = sorted(range(16), key=lambda i: -abs(row[i].item()))[:4]
        assert kept.nonzero().flatten().tolist() == sorted(places)
        assert torch.equal(kept[places], row[places])


def test_rotations_cost_what_they_cost(tiny) -> None:
    """In every layer one of 64 x 64 before q, k, v and one before gate, up."""
    network = opened(tiny, "llama")
    weights = sum(m.size for m in network.layers()[0].matrices)
    assert rotations(network, "top_k", {}) == pytest.approx(2 * 64**2 / weights)
    assert rotations(network, "top_k", {"basis": "none"}) == 0
    assert rotations(network, "magnitude_threshold", {}) == 0
