"""Layers in another order: where their weights come from, and what has to hold of the result."""

from collections.abc import Callable, Iterable, Mapping, Sequence

from layerwise.core.absent import leave_out
from layerwise.core.adapters import Adapter, adapt, load_adapters, low_rank
from layerwise.core.errors import LayerwiseError
from layerwise.core.network import Network
from layerwise.core.stack import Layer, LowRank, Stack, Visit
from layerwise.core.together import run_together


def stored_as(network: Network) -> Callable[[str], bool]:
    """Whether a parameter comes from the checkpoint, by its name in a rewired network."""
    longest = sorted(network.origins, key=len, reverse=True)

    def stored(name: str) -> bool:
        path = next((path for path in longest if name.startswith(f"{path}.")), "")
        return network.stored.is_stored(network.origins.get(path, path) + name[len(path) :])

    return stored


def arrange(network: Network) -> None:
    """Let layers run as their visits say."""
    for stack in network.stacks:
        visits = [network.visits.get(layer.path, Visit(layer.index)) for layer in stack.layers]
        leave_out(network.module, stack.layers, visits)
        for layer in () if network.unrolled else stack.layers:
            adapt(layer, network.adapters.get(layer.path, {}), network.device)
        run_together(stack.layers, visits)


def adapters_of(network: Network) -> dict[str, Adapter]:
    """What the visits of a rewired network have of their own: computed, or as its folder holds it.

    Raises:
        LayerwiseError: the folder has no adapter of that name.
    """
    found: dict[str, Adapter] = {}
    held: Mapping[str, Adapter] | None = None
    for layer in network.layers():
        visit = network.visits.get(layer.path)
        if visit is None or visit.adapter is None:
            continue
        if isinstance(visit.adapter, LowRank):
            of, rank = visit.adapter
            own, shared = network.fetch_other(layer, of), network.fetch_shared(layer)
            found[layer.path] = low_rank(own, shared, rank)
            continue
        held = load_adapters(network.checkpoint.folder) if held is None else held
        key = f"{layer.stack}/{visit.adapter}"
        if key not in held:
            raise LayerwiseError(
                f"wiring, adapter {visit.adapter!r}",
                allowed=", ".join(held) or "none in this folder; {of: 5, rank: 8} is computed",
                found=key,
                fix="apply the plan again",
            )
        found[layer.path] = held[key]
    return found


def stacks_named(stacks: Sequence[Stack], names: Iterable[str]) -> list[Stack]:
    """The stacks of these names.

    Raises:
        LayerwiseError: there is none of a name.
    """
    known = {stack.name: stack for stack in stacks}
    for name in names:
        if name not in known:
            raise LayerwiseError(
                f"wiring of {name!r}", allowed=", ".join(known), found=name, fix="name a stack"
            )
    return [known[name] for name in names]


def check_rebuilt(stacks: Sequence[Stack], origins: Mapping[str, Layer]) -> None:
    """A layer of the rebuilt network must hold the tensors of the one that it stands for.

    Raises:
        LayerwiseError: the architecture decides by the index what a layer is.
    """
    for layer in (layer for stack in stacks for layer in stack.layers):
        before = origins.get(layer.path)
        if before is None or layer.shapes != before.shapes:
            name = before.key if before else "no layer"
            raise LayerwiseError(
                f"wiring, layer {layer.key}",
                allowed="layers that are of the same kind at their new place",
                found=f"{name} has other tensors than the architecture wants at {layer.path}",
                fix="drop layers so that the kinds keep their rhythm, such as whole periods",
            )
