"""What experts are asked for and give, against a slow reference that follows the paper."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu
from torch.testing import assert_close

import layerwise
from layerwise.core.lockstep import walk
from layerwise.core.stats import observe

BATCH = {"input_ids": torch.arange(48).reshape(2, 24)}


def slowly(rows: Tensor, router: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Tokens, sums of gate times norm, and sums of norms, token by token (two of four experts)."""
    found = torch.zeros(len(router), 3, dtype=torch.float64)
    for x in rows:
        shares = (router @ x).softmax(0)
        gates, chosen = shares.topk(2)
        for gate, e in zip(gates / gates.sum(), chosen.tolist(), strict=True):
            gated, linear = (up[e] @ x).chunk(2)
            norm = (down[e] @ (silu(gated) * linear)).norm()
            found[e] += torch.stack([torch.ones(()), gate * norm, norm]).double()
    return found


def test_use_and_saliency_of_experts(tiny: Callable[..., Path]) -> None:
    network = layerwise.open(tiny("mixtral"))
    found = observe(network, [BATCH], {"expert_use": layerwise.find("expert_use").function()})
    rows: dict[str, Tensor] = {}
    for stop in walk(network, [BATCH], matrices="watch"):
        for given in stop.rows:
            if given.matrices[0].role == "router":
                x, held = given.edited[0], dict(stop.layer.module.named_parameters())
                names = ("mlp.gate.weight", "mlp.experts.gate_up_proj", "mlp.experts.down_proj")
                rows[stop.layer.key] = slowly(x, *(held[name] for name in names))
    assert len(rows) == 3
    for key, wanted in rows.items():
        assert_close(found["expert_use"][key], wanted, rtol=1e-4, atol=1e-6)
    for by, column in (("gated", 1), ("norm", 2)):
        score = layerwise.find("reap", "score").bind({"by": by})(network.stack, found)
        mine = rows["decoder/1"]
        means = mine[:, column] / (mine[:, 0] if by == "gated" else 1)
        own = [score.values[f"decoder/1[{e}]"] for e in range(4)]
        assert own == pytest.approx(means.tolist(), rel=1e-4)


@pytest.mark.parametrize("kind", ["mixtral", "dbrx"])
def test_the_parts_of_a_mixture_add_up(kind: str, tiny: Callable[..., Path]) -> None:
    from layerwise.measure.experts import routed_calls

    network = layerwise.open(tiny(kind)).load()
    with torch.no_grad(), routed_calls() as calls:
        network.module(**BATCH)
    assert len(calls) == 3
    with torch.no_grad():
        for call in calls:
            whole = call.module.forward(call.x, call.chosen, call.gates)
            wanted = whole.flatten(0, -2)
            assert_close(call.apart().sum(1), wanted, rtol=1e-4, atol=1e-5)
