"""What looking and changing costs: forwards with captures and edits over plain ones."""

from functools import partial
from typing import Any

import torch

from benchmarks.timing import interleaved, over, rounds, summary, table
from layerwise.core.network import Network
from layerwise.core.open import open_network
from layerwise.intervene import activation_patching, keeping, scale, sites

BATCH, LENGTH = 8, 256


def _plain(network: Network, batch: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        network.module(**batch, use_cache=False)


def main() -> None:
    """Print the tables; the goal is 1.05 for the stream after every layer."""
    network = open_network("demo", dtype="float32").load()
    generator = torch.Generator().manual_seed(0)
    batch = {"input_ids": torch.randint(0, 1000, (BATCH, LENGTH), generator=generator)}

    def captured(*parts: str) -> None:
        where = sites(network, *parts)
        network.run(batch, [keeping(at, {}) for at in where])

    parts = ("in", "attention", "mlp", "out")
    tasks: dict[str, Any] = {
        "plain forward": partial(_plain, network, batch),
        "no edits": partial(network.run, batch),
        "stream after every layer": partial(captured, "out"),
        "what every part adds": partial(captured, "attention", "mlp"),
        "what every projection receives": partial(captured, "attention.o", "mlp.down"),
        "all of these": partial(captured, *parts, "attention.o", "mlp.down"),
        "stream, with gradient": partial(network.cache, batch, grad=True),
        "every MLP scaled": partial(
            network.run, batch, [scale(a, 1.5) for a in sites(network, "mlp")]
        ),
    }
    found = rounds(tasks, repeats=30)
    plain = found["plain forward"]
    rows = []
    for name, seconds in found.items():
        middle, spread = summary(seconds)
        rows.append((name, f"{1e3 * middle:.0f} ms", f"{1e3 * spread:.0f}", over(seconds, plain)))
    title = f"Capturing and changing, demo model, float32, {BATCH} x {LENGTH} tokens"
    table(title, ("what", "time", "spread", "ratio, round by round"), rows)
    _sweeps(network)


def _sweeps(network: Network) -> None:
    """Patching over a grid, against as many forwards one by one."""
    one, other = ({"input_ids": torch.arange(3, 35)[None] + shift} for shift in (0, 7))
    where = sites(network, "in", positions=range(32))
    answer = lambda output: output.logits[:, -1, 5]  # noqa: E731
    alone = partial(network.run, other, [scale(where[0], 1)])
    tasks: dict[str, Any] = {f"{len(where)} sites, one forward": alone}
    for rows in (16, 64, 256):
        sweep = partial(activation_patching, network, one, other, answer, where, rows)
        tasks[f"{len(where)} sites, {rows} rows a forward"] = sweep
    found = interleaved(tasks, repeats=2)
    each = next(iter(found.values()))[0] * len(where)
    rows = [(n, f"{s:.2f} s", f"{s / each:.2f}") for n, (s, _) in found.items()]
    table("Activation patching, 32 tokens", ("what", "time", "of one by one"), rows)


if __name__ == "__main__":
    main()
