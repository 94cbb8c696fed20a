"""What one does at a site; every one is a site and a function of the value there."""

from jaxtyping import Float
from torch import Tensor

from layerwise.core.network import Network
from layerwise.core.sites import At, Cache, Intervention, Runs, step_of


def replace(at: At, value: Tensor) -> Intervention:
    """Put a value in the place of what is there.

    Args:
        at: the site.
        value: of the shape that is there, or one that broadcasts to it.

    Example:
        >>> import torch
        >>> replace(At(3), torch.ones(2)).change(torch.zeros(1, 1, 2))
        tensor([1., 1.])
    """
    return Intervention(at, lambda here: value)


def add(at: At, vector: Tensor, amount: float = 1.0) -> Intervention:
    """Add `amount` times a vector: steering.

    Example:
        >>> import torch
        >>> add(At(3), torch.ones(2), 0.5).change(torch.zeros(1, 1, 2))
        tensor([[[0.5000, 0.5000]]])
    """
    return Intervention(at, lambda here: here + amount * vector.to(here))


def scale(at: At, factor: float) -> Intervention:
    """Multiply what is there.

    Example:
        >>> import torch
        >>> scale(At(3, "mlp"), 2).change(torch.ones(1, 1, 2))
        tensor([[[2., 2.]]])
    """
    return Intervention(at, lambda here: here * factor)


def ablate(at: At, direction: Float[Tensor, " dim"] | None = None) -> Intervention:
    """Set what is there to zero, or remove one direction `d` of it: `x - (x . d) d / |d|^2`.

    Another value to ablate to, such as a mean, is `replace(at, mean)`.

    Example:
        >>> import torch
        >>> ablate(At(3), torch.tensor([2.0, 0.0])).change(torch.ones(1, 1, 2))
        tensor([[[0., 1.]]])
    """
    if direction is None:
        return scale(at, 0)

    def removed(here: Tensor) -> Tensor:
        unit = (direction / direction.norm()).to(here)
        return here - (here @ unit)[..., None] * unit

    return Intervention(at, removed)


def patch(at: At, cache: Cache, source: At | None = None) -> Intervention:
    """Put there what was at the same place, or another one, in a run that was cached.

    Args:
        at: the site.
        cache: of another prompt, or of the same.
        source: the place in the cache, such as a later layer; `at` if None.

    Raises:
        LayerwiseError: the cache does not hold it.
    """
    return replace(at, cache[source or at])


def skip(layer: int | str) -> Runs:
    """The layer hands its input on.

    Example:
        >>> skip(3)
        Runs(layer=3, times=0)
    """
    return Runs(layer, 0)


def repeat(layer: int | str, times: int = 2) -> Runs:
    """The layer runs again on its own output, `times` times in all.

    Example:
        >>> repeat(3)
        Runs(layer=3, times=2)
    """
    return Runs(layer, times)


def stop(network: Network, layer: int | str) -> list[Runs]:
    """The state after a layer goes to the network's end: all later layers hand it on.

    Example:
        >>> import layerwise
        >>> stop(layerwise.open("demo"), 9)
        [Runs(layer='decoder/10', times=0), Runs(layer='decoder/11', times=0)]
    """
    name, last = step_of(network, layer)
    stack = next(s for s in network.stacks if s.name == name)
    return [skip(f"{name}/{i}") for i in range(last + 1, len(stack.wiring))]
