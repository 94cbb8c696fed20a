"""Rotating the residual stream of a whole network: every layer is tried, then what lies outside."""

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from layerwise.core.errors import LayerwiseError
from layerwise.core.fold import Fold, Folds, joined
from layerwise.core.lockstep import walk
from layerwise.core.mixing import find_ports, turns
from layerwise.core.network import Network
from layerwise.core.seam import Seam, find_seams
from layerwise.core.stops import Batch, hidden
from layerwise.core.trial import Trial


def turned(
    network: Network,
    batch: Batch,
    rotation: Callable[[int], Tensor],
    name: str,
    progress: Callable[[int, int], None],
) -> Folds:
    """What rotates the residual stream of a network.

    Args:
        network: as it is stored, or with earlier folds.
        batch: what layers are tried on.
        rotation: size of the stream -> an orthogonal matrix.
        name: of the rewrite, for errors.
        progress: called with the layers that are done, and all of them.

    Raises:
        LayerwiseError: the network has several stacks, or a layer or what lies outside of the
            layers does not rotate along; it is said which and why.
    """
    if len(network.stacks) != 1:
        names = ", ".join(stack.name for stack in network.stacks)
        raise _refused(network, name, f"several: {names}")
    layers = network.layers()
    found: dict[str, Folds] = {}
    mix: Tensor | None = None
    seams: list[Seam] = []
    for stop in walk(network, [batch]):
        path = network.origins.get(stop.layer.path, stop.layer.path)
        if stop.kind != "enter" or path in found:
            continue
        trial = Trial(stop.layer, stop.lanes[0].args, stop.lanes[0].kwargs)
        seams, _ = find_seams(trial, seams)
        mix = rotation(hidden(trial.call).shape[-1]).to(network.device) if mix is None else mix
        ports = find_ports(trial, seams, len(mix))
        why = ports if isinstance(ports, str) else turns(trial, ports, mix)
        if why is not None or isinstance(ports, str):
            raise _refused(network, name, f"{stop.layer.key}, where {why}")
        own = ports.folds(mix, dict(stop.layer.module.named_parameters()))
        found[path] = {f"{path}.{key}": changes for key, changes in own.items()}
        progress(len(found), len(layers))
    assert mix is not None
    return joined(*found.values(), _outside(network, mix, _norm_shift(seams), name))


def _norm_shift(seams: Sequence[Seam]) -> float:
    """What the norms of a network add to their weight."""
    return next((seam.givers[0].shift for seam in seams if seam.norm), 0.0)


def _outside(network: Network, mix: Tensor, shift: float, name: str) -> Folds:
    """Embeddings get the rotation on what they give, the head on what it reads, with its gain."""
    held = network.fetch_outside()
    size, head = len(mix), head_of(network)
    gains = [n for n, t in held.items() if t.shape == (size,)]
    if not head:
        raise _refused(network, name, "none: there is nothing behind its last norm to fold it into")
    if len(gains) > 1:
        raise _refused(network, name, f"several vectors outside of its layers: {', '.join(gains)}")
    found: dict[str, tuple[Fold, ...]] = {}
    for norm in gains:
        gain = held[norm].float() + shift
        found |= {norm: (Fold(-1, 1 / gain, shift),), head: (Fold(-1, gain),)}
    tables = {n for n, t in held.items() if t.ndim == 2 and t.shape[1] == size} | {head}
    return joined(found, {n: (Fold(-1, mix),) for n in sorted(tables)})


def head_of(network: Network) -> str:
    """The name of the weight that turns the last state into an answer; nothing without one."""
    head = network.model.get_output_embeddings()
    paths = [path for path, module in network.module.named_modules() if module is head]
    return f"{paths[0]}.weight" if head is not None and paths else ""


def untied(network: Network) -> Mapping[str, tuple[Fold, ...]]:
    """A fold of nothing for a head that is tied, so that it is written by itself."""
    head = head_of(network)
    return {head: ()} if head in (network.stored.model.all_tied_weights_keys or {}) else {}


def _refused(network: Network, name: str, found: str) -> LayerwiseError:
    return LayerwiseError(
        f"{name} of {type(network.module).__name__}",
        allowed="one stack whose layers read the stream through norms without mean and bias, and "
        "write into it by matrices",
        found=found,
        fix="leave it out; `--rewrite awq` and the step `rotate` of a chain have no such condition",
    )
