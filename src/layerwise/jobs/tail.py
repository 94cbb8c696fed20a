"""The end of a network as a function: whatever stands between its last layer and its answer."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from layerwise.core.errors import LayerwiseError
from layerwise.core.hollow import ShortCircuit
from layerwise.core.instead import instead, swapped
from layerwise.core.network import Network
from layerwise.core.stack import Layer
from layerwise.core.stops import hidden
from layerwise.core.task import forward_arguments

#: tokens of the one short forward that shows what layers return
SHORT = 8
#: tasks whose answer is a word per position
WORDS = ("causal", "masked", "seq2seq")


class Tail:
    """Runs the network with all its layers handing on what they are told, and returns its logits.

    The network's own code does the rest, so that norms, scales, caps and heads need no table. What
    layers return beside their state is taken from one short forward.
    """

    def __init__(self, network: Network, batch: Mapping[str, Tensor]) -> None:
        self.network = network
        if network.task not in WORDS:
            raise LayerwiseError(
                "lens",
                allowed="networks that answer with a word per position",
                found=f"one for the task {network.task!r}",
                fix="leave lens, tuned_lens and voids out of --measures",
            )
        self.ids = {k: v[:1, :1] for k, v in batch.items() if k.endswith("input_ids")}
        self.shapes: dict[str, Any] = {}
        with instead(network.layers(), self._remember):
            self._run(1, SHORT)

    def __call__(self, states: Tensor) -> Tensor:
        """Logits `[..., classes]` of states `[tokens, dim]` or `[batch, seq, dim]`."""
        whole = states if states.ndim == 3 else states[None]
        given = whole.to(self.network.device, self.network.dtype)
        mine = network_end(self.network)

        def told(layer: Layer) -> Callable[..., Any]:
            output, own = self.shapes[layer.key]
            new = swapped(output, own, given) if layer.stack == mine else output
            return lambda *args, **kwargs: new

        with instead(self.network.layers(), told):
            logits = self._run(*given.shape[:2])
        return logits if states.ndim == 3 else logits[0]

    def _run(self, batch: int, seq: int) -> Tensor:
        module = self.network.module
        inputs = {k: v.expand(batch, seq).to(self.network.device) for k, v in self.ids.items()}
        with ShortCircuit():
            return module(**forward_arguments(module, inputs))["logits"]

    def _remember(self, layer: Layer) -> Callable[..., Any]:
        forward = layer.module.forward

        def run(*args: Any, **kwargs: Any) -> Any:
            with torch.no_grad():
                output = forward(*args, **kwargs)
            self.shapes[layer.key] = (output, hidden(output))
            return output

        return run


def network_end(network: Network) -> str:
    """The stack that the network's answer is made from."""
    return network.stacks[-1].name
