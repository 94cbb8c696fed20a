"""Models as stock transformers loads them."""

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from layerwise.core.calls import tensors_in
from layerwise.core.config import model_class, read_config
from layerwise.core.dense import unpacked
from layerwise.core.errors import refusing
from layerwise.core.instead import instead, swapped
from layerwise.core.lockstep import walk
from layerwise.core.network import Network
from layerwise.core.open import open_network
from layerwise.core.stack import Layer
from layerwise.core.stops import hidden
from layerwise.core.task import answer, forward_arguments
from layerwise.core.visits import FOLDED
from layerwise.core.weight import Weight
from layerwise.export.compressed_tensors import packed_linears
from layerwise.run.kernels import Quickened, quicken

DENSE = "choose --target hf where weights are packed, and another size where layers are narrower"


def load_stock(folder: Path, dtype: str, device: torch.device) -> nn.Module:
    """The model as stock transformers loads it, or layerwise where the folder names an order.

    Raises:
        LayerwiseError: it cannot.
    """
    if (folder / FOLDED).exists():  # an order that layerwise itself runs
        return open_network(folder, device=str(device), dtype=dtype).load().module
    kind = model_class(read_config(folder))
    with refusing(
        f"{folder} in stock transformers", allowed=f"a folder that {kind.__name__} loads", fix=DENSE
    ):
        module = kind.from_pretrained(folder, dtype=getattr(torch, dtype))
    # some formats unpack to bfloat16, whatever was asked for
    return nn.Module.to(unpacked(module), device, getattr(torch, dtype)).eval()


def compute_packed(module: nn.Module, folder: Path, network: Network) -> Quickened:
    """Let the linear modules of a folder compute on the integers that it holds packed.

    They do where that is faster, as `quicken` has it; nothing is read for other models than those
    in bfloat16 on a processor, for which there are no fast kernels.

    Args:
        module: the folder's model, loaded.
        folder: what `apply` wrote.
        network: opened from the same structure, for the places of its matrices.
    """
    first = next(module.parameters())
    fitting = first.dtype == torch.bfloat16 and first.device.type == "cpu"
    return quicken(module, packed_linears(folder, network) if fitting else {})


def standing_in(
    layers: Iterable[Layer], given: Mapping[str, Tensor | None]
) -> AbstractContextManager[None]:
    """Let layers, by their keys, hand on a tensor, or their input, instead of computing it.

    A layer that returns more than its hidden state still runs when it hands its input on, for
    the rest of what it returns.
    """
    chosen = [layer for layer in layers if layer.key in given]
    return instead(
        chosen, lambda layer: partial(_hand_on, layer, given[layer.key], layer.module.forward)
    )


def _hand_on(
    layer: Layer, value: Tensor | None, forward: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    if value is not None:
        return value
    if layer.alone:
        return hidden((args, kwargs))
    output = forward(*args, **kwargs)
    replaced = hidden(output)
    handed = next(t for t in tensors_in((args, kwargs)) if t.shape == replaced.shape)
    return swapped(output, replaced, handed)


@contextmanager
def streamed(
    network: Network,
    batches: Sequence[Any],
    records: Callable[[Layer], Mapping[str, Weight]] = lambda layer: {},
    read: Callable[[Any, Any], Tensor] = answer,
) -> Iterator[Callable[[Any], Tensor]]:
    """Batch -> answer like `answers_of`, of a network with one layer in memory.

    The batches must be asked for in their order, once each: they walk together. `records` are
    what edits made of a layer, and `read` says what is wanted of an output and its batch.
    """
    found: list[Tensor] = []

    def walked() -> Generator[Tensor, None, None]:
        finish = lambda i, clean, output: found.append(read(output, batches[i]))  # noqa: E731
        with closing(walk(network, batches, finish=finish)) as stops:
            for stop in stops:
                if stop.kind == "enter":
                    stop.substitute_all(records(stop.layer))
                elif stop.kind == "done":
                    yield found.pop()

    with torch.no_grad(), closing(walked()) as answers:
        yield lambda batch: next(answers)


def answers_of(
    module: nn.Module, read: Callable[[Any, Any], Tensor] = answer
) -> Callable[[Any], Tensor]:
    """Batch -> answer `[rows, classes]`, or what else is read off an output, without a cache.

    Raises:
        LayerwiseError: stock transformers cannot run the model as it was written.
    """
    device = next(module.parameters()).device

    def run(batch: Any) -> Tensor:
        inputs = {k: v.to(device) for k, v in batch.items()}
        with refusing(
            f"{type(module).__name__} in stock transformers",
            allowed="a model that runs as it was written",
            fix=DENSE,
        ):
            return read(module(**forward_arguments(module, inputs)), batch)

    return run
