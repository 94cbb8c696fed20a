"""Independent work gives the same bytes wherever it is done."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from layerwise.core import fan
from layerwise.core.errors import LayerwiseError
from layerwise.core.fan import Engine, fan_out
from layerwise.jobs.apply import apply_plan
from layerwise.jobs.plan import Request, make_plan
from layerwise.jobs.session import Budget

ENGINES = [Engine("threads", 1), Engine("threads", 3), Engine("processes", 2), Engine("ray", 2)]


def summed(size: int) -> float:
    generator = torch.Generator().manual_seed(size)
    return torch.randn(size, size, generator=generator).matmul(torch.ones(size)).sum().item()


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """A Ray cluster on this machine with two workers."""
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.mark.parametrize("engine", ENGINES, ids=str)
def test_order_and_values_are_those_of_a_loop(engine: Engine, cluster: None) -> None:
    sizes = [300, 5, 200, 1, 40, 7, 90]
    done: list[None] = []
    assert fan_out(summed, sizes, engine, lambda: done.append(None)) == [summed(s) for s in sizes]
    assert len(done) == len(sizes)
    assert fan_out(summed, [], engine) == []


@pytest.mark.parametrize("engine", ENGINES, ids=str)
def test_an_error_of_an_item_is_raised(engine: Engine, cluster: None) -> None:
    with pytest.raises(RuntimeError, match="negative"):
        fan_out(summed, [3, -1, 3], engine)


def test_threads_depend_on_items_and_cores_alone() -> None:
    torch.set_num_threads(8)
    try:
        assert [fan.threads_each(n) for n in (1, 2, 3, 8, 100)] == [8, 4, 2, 1, 1]
        seen: set[int] = set()
        fan_out(lambda _: seen.add(torch.get_num_threads()), [1, 2, 3, 4], Engine("threads", 1))
        assert seen == {2}
        assert torch.get_num_threads() == 8
    finally:
        torch.set_num_threads(1)


def test_as_many_at_once_as_there_are_workers() -> None:
    barrier = threading.Barrier(3, timeout=20)
    assert len(fan_out(lambda _: barrier.wait(), [0] * 6, Engine("threads", 3))) == 6


@pytest.fixture(scope="module")
def planned(tiny, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """The plan of the engine that is the loop, and the bytes of what it makes."""
    request = _request(tiny("llama"), Engine("threads", 1))
    plan = make_plan(request).plan
    out = tmp_path_factory.mktemp("loop") / "out"
    apply_plan(request.model, plan, out, engine=request.engine, check=False)
    return {"plan": plan, "bytes": _contents(out)}


@pytest.mark.parametrize("engine", ENGINES[1:], ids=str)
def test_plans_and_checkpoints_are_the_same_bytes(
    engine: Engine, planned, tiny, tmp_path: Path, cluster: None
) -> None:
    request = _request(tiny("llama"), engine)
    assert make_plan(request).plan.to_yaml() == planned["plan"].to_yaml()
    apply_plan(request.model, planned["plan"], tmp_path / "out", engine=engine, check=False)
    assert _contents(tmp_path / "out") == planned["bytes"]


def test_without_a_cluster_there_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray")
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    monkeypatch.setattr(ray, "init", _refuse)
    with pytest.raises(LayerwiseError, match="ray start --head"):
        fan_out(summed, [1], Engine("ray"))


def _refuse(*args: object, **kwargs: object) -> None:
    raise ConnectionError("Could not find any running Ray instance.")


def _request(model: Path, engine: Engine) -> Request:
    from layerwise.core.plan import DataSpec

    data = DataSpec(samples=4, length=32)
    settings = {"menu": {"group": [32], "bits": [3, 4, 8]}}
    return Request(model, Budget(bits=5.0), data=data, settings=settings, engine=engine)


def _contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
