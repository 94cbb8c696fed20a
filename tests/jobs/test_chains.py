"""Chains in whole jobs: what they need is measured, resumed work has the same bytes."""

from pathlib import Path

import pytest
import torch

import layerwise
from layerwise.core.journal import Journal
from layerwise.core.plan import Edit, Step
from layerwise.core.weight import flatten
from layerwise.export import TARGETS
from layerwise.jobs.bits import plan_bits
from layerwise.jobs.request import Request
from layerwise.jobs.session import Budget, silent
from layerwise.jobs.solve import solve

GPTQ = Step("gptq", {"bits": 3, "group": 32})
CHAINS = {
    "qep": (Step("qep"), GPTQ),
    "rsq": (Step("rotate"), Step("token_importance"), GPTQ),
    "higgs": (Step("rotate"), Step("gaussian", {"levels": 8}), Step("refine")),
}


class Stopped(Exception):
    """What stops a job in its middle."""


def solved(folder: Path, where: Path, chain: tuple[Step, ...], stop: int = 99) -> dict:
    network = layerwise.open(folder)
    generator = torch.Generator().manual_seed(0)
    batches = [{"input_ids": torch.randint(3, 128, (1, 24), generator=generator)} for _ in range(4)]

    def progress(what: str, done: int, total: int) -> None:
        if done >= stop:
            raise Stopped

    with Journal(where, {}) as journal:
        solver = solve(network, [Edit("*", chain)], batches, journal, progress)
        return {
            f"{key}.{name}": tensor
            for layer in network.layers()
            for key, record in solver.finished(layer).items()
            for name, tensor in flatten(record)[1].items()
        }


@pytest.mark.parametrize("kind", ["llama", "mixtral", "gpt2", "mamba"])
@pytest.mark.parametrize("name", CHAINS)
def test_a_job_that_was_stopped_has_the_same_bytes(
    tiny, tmp_path: Path, name: str, kind: str
) -> None:
    folder, chain = tiny(kind), CHAINS[name]
    whole = solved(folder, tmp_path / "whole", chain)
    with pytest.raises(Stopped):
        solved(folder, tmp_path / "parts", chain, stop=1)
    again = solved(folder, tmp_path / "parts", chain)
    assert whole.keys() == again.keys()
    assert all(torch.equal(tensor, again[key]) for key, tensor in whole.items())


def test_the_first_layer_has_nothing_to_make_up_for(tiny, tmp_path: Path) -> None:
    """Error propagation starts where something was edited; token weights change every layer."""
    folder = tiny("llama")
    plain = solved(folder, tmp_path / "plain", (GPTQ,))
    propagated = solved(folder, tmp_path / "qep", CHAINS["qep"])
    weighed = solved(folder, tmp_path / "rsq", (Step("token_importance"), GPTQ))
    same = {k for k in plain if torch.equal(plain[k], propagated[k])}
    assert {k for k in plain if "decoder/0/attention.q" in k} <= same
    assert not any("decoder/1" in k and k.endswith("codes") for k in same)
    assert not any(torch.equal(plain[k], weighed[k]) for k in plain if k.endswith("codes"))


def test_a_plan_of_joined_methods(tiny) -> None:
    """The grid goes to the steps that have one; integers in a frame cannot be packed."""
    request = Request(
        tiny("llama"),
        Budget(bits=4),
        method="qep+gptq",
        allocator="uniform",
        settings={"menu": {"group": [32]}, "qep": {"alpha": 0.25}},
    )
    network = layerwise.open(tiny("llama"))
    planned = plan_bits(request, network, TARGETS["compressed-tensors"], silent)
    chains = [edit.chain for edit in planned.plan.edits]
    assert chains
    for first, second in chains:
        assert first == Step("qep", {"alpha": 0.25})
        assert (second.method, second.options["group"]) == ("gptq", 32)
    turned = request._replace(method="rotate+gptq")
    menus = plan_bits(
        turned._replace(budget=Budget(size=1.0)), network, TARGETS["compressed-tensors"], silent
    ).menus
    assert all(len(menu.options) == 1 for menu in menus.values())
