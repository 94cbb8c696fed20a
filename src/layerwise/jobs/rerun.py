"""Running a resident network again with the outputs of some layers replaced."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from layerwise.core.instead import instead, swapped
from layerwise.core.network import Network
from layerwise.core.sites import At, Cache, Edits
from layerwise.core.stack import Layer
from layerwise.core.stops import Batch, hidden
from layerwise.core.task import forward_arguments

#: a layer's input and output -> the output that takes its place
Replace = Callable[[Tensor, Tensor], Tensor]


class Ran(NamedTuple):
    """States before and after every layer by its key, the logits, and the wanted classes."""

    before: dict[str, Tensor]
    after: dict[str, Tensor]
    logits: Tensor
    labels: Tensor | None


class Rerun:
    """Runs one of some batches, with layers' outputs replaced; `count` says how many there are.

    The weights are brought in at the first run: a pass over the data before it drops them.
    """

    def __init__(self, network: Network, batches: Sequence[Batch]) -> None:
        self.network, self.batches, self.count = network, batches, len(batches)
        self.loaded = False

    def __call__(self, number: int, replace: Mapping[str, Replace] = {}) -> Ran:
        """Run a batch; gradients flow through what is replaced if they are enabled."""
        if not self.loaded:
            self.network, self.loaded = self.network.load(), True
        before: dict[str, Tensor] = {}
        after: dict[str, Tensor] = {}

        def look(layer: Layer) -> Callable[..., Any]:
            own = layer.module.forward

            def forward(*args: Any, **kwargs: Any) -> Any:
                output = own(*args, **kwargs)
                x, y = hidden((args, kwargs)), hidden(output)
                new = replace[layer.key](x, y) if layer.key in replace else y
                before[layer.key], after[layer.key] = x, new
                return swapped(output, y, new)

            return forward

        batch = {k: v.to(self.network.device) for k, v in self.batches[number].items()}
        with instead(self.network.layers(), look):
            output = self.network.module(**forward_arguments(self.network.module, batch))
        return Ran(before, after, output["logits"], batch.get("labels"))

    def edited(self, number: int, edits: Edits, where: Sequence[At]) -> Cache:
        """Run a batch with interventions, and keep what is at some sites."""
        if not self.loaded:
            self.network, self.loaded = self.network.load(), True
        return self.network.cache(self.batches[number], where, edits)
