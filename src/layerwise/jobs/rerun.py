"""Running a resident network again with the outputs of some layers replaced."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils._pytree import tree_map

from layerwise.core.lockstep import Batch, hidden
from layerwise.core.network import Network
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

        def look(key: str) -> Callable[..., Any]:
            def hook(module: Any, args: tuple, kwargs: dict, output: Any) -> Any:
                x, y = hidden((args, kwargs)), hidden(output)
                new = replace[key](x, y) if key in replace else y
                before[key], after[key] = x, new
                return tree_map(lambda leaf: new if leaf is y else leaf, output)

            return hook

        batch = {k: v.to(self.network.device) for k, v in self.batches[number].items()}
        hooks = [
            layer.module.register_forward_hook(look(layer.key), with_kwargs=True)
            for layer in self.network.layers()
        ]
        try:
            output = self.network.module(**forward_arguments(self.network.module, batch))
        finally:
            for hook in hooks:
                hook.remove()
        return Ran(before, after, output["logits"], batch.get("labels"))
