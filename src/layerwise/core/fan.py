"""Independent work, spread over threads, processes or a Ray cluster; no result tells which.

What could tell is the number of threads that an item computes with, because sums come out in
another order. It therefore follows from the number of items and of cores alone.
"""

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context
from typing import Any, Literal, NamedTuple, TypeVar

import torch

from layerwise.core.errors import LayerwiseError, first_line

T = TypeVar("T")
R = TypeVar("R")


class Engine(NamedTuple):
    """Where independent work is done.

    `threads` share this process's memory, `processes` open what they need themselves, `ray` uses
    the running cluster that `RAY_ADDRESS` or `ray start` names. `workers` of 0 stands for as many
    as the cores of this machine, or of the cluster, can feed.
    """

    kind: Literal["threads", "processes", "ray"] = "threads"
    workers: int = 0


def threads_each(count: int) -> int:
    """Threads for each of `count` items: those that torch may use here, shared out.

    Example:
        >>> threads_each(10_000)
        1
    """
    return max(1, torch.get_num_threads() // max(count, 1))


def fan_out(
    function: Callable[[T], R],
    items: Sequence[T],
    engine: Engine = Engine(),
    done: Callable[[], Any] = lambda: None,
) -> list[R]:
    """Apply a function to every item; results come in the order of the items.

    Args:
        function: pure. For processes and clusters it is pickled with each item.
        items: what it is applied to.
        engine: where that happens.
        done: called whenever an item is done.

    Returns:
        The same for every engine and number of workers.

    Raises:
        LayerwiseError: no Ray cluster is running, or Ray is not installed.

    Example:
        >>> fan_out(abs, [-1, 2, -3])
        [1, 2, 3]
    """
    threads = threads_each(len(items))
    workers = min(engine.workers or torch.get_num_threads() // threads, len(items))
    if engine.kind == "ray":
        return _ray(function, items, engine.workers, threads, done)
    if engine.kind == "processes":
        pool: Executor = ProcessPoolExecutor(
            max(workers, 1), get_context("spawn"), torch.set_num_threads, (threads,)
        )
        with pool:
            return _pooled(pool, function, items, workers, done)
    with _threads(threads):
        if workers <= 1:
            return [_one(function, item, done) for item in items]
        if torch.cuda.is_initialized():  # its solvers are loaded by one thread, not by several
            torch.linalg.cholesky(torch.ones(1, 1, device="cuda"))
        # OpenMP counts per thread: without its own count a worker asks for all cores
        with ThreadPoolExecutor(workers, "", torch.set_num_threads, (threads,)) as pool:
            return _pooled(pool, function, items, workers, done)


def _one(function: Callable[[T], R], item: T, done: Callable[[], Any]) -> R:
    result = function(item)
    done()
    return result


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _collect(
    submit: Callable[[T], Any],
    result: Callable[[Any], R],
    items: Sequence[T],
    most: int,
    done: Callable[[], Any],
) -> list[R]:
    """Results in order, with at most so many items on their way, so that few are in memory."""
    waiting: deque[Any] = deque()
    results: list[R] = []

    def take() -> None:
        results.append(result(waiting.popleft()))
        done()

    for item in items:
        waiting.append(submit(item))
        if len(waiting) > most:
            take()
    while waiting:
        take()
    return results


def _pooled(
    pool: Executor,
    function: Callable[[T], R],
    items: Sequence[T],
    workers: int,
    done: Callable[[], Any],
) -> list[R]:
    """Keep every worker of a pool busy with one more item in waiting."""
    try:
        return _collect(partial(pool.submit, function), Future.result, items, 2 * workers, done)
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        raise


def _ray(
    function: Callable[[T], R],
    items: Sequence[T],
    workers: int,
    threads: int,
    done: Callable[[], Any],
) -> list[R]:
    ray = _connected()
    count = workers or max(int(ray.cluster_resources().get("CPU", 1)) // threads, 1)
    shared = ray.put(function)
    remote = ray.remote(num_cpus=threads)(_with_threads)
    submit = lambda item: remote.remote(shared, item, threads)  # noqa: E731
    return _collect(submit, ray.get, items, count - 1, done)


def _with_threads(function: Callable[[T], R], item: T, threads: int) -> R:
    torch.set_num_threads(threads)
    return function(item)


def _connected() -> Any:
    """Ray, connected to the cluster that is running."""
    try:
        import ray
    except ImportError:
        raise LayerwiseError(
            "--engine ray", allowed="an installed ray", found="none", fix="pip install ray"
        ) from None
    if not ray.is_initialized():
        try:
            ray.init(os.environ.get("RAY_ADDRESS", "auto"), log_to_driver=False)
        except (ConnectionError, ValueError) as error:
            raise LayerwiseError(
                "--engine ray",
                allowed="a running Ray cluster",
                found=first_line(error),
                fix="start one with `ray start --head`, or set RAY_ADDRESS",
            ) from None
    return ray
