"""What tests of engines write: tiny models, the plans of GGUF files, and what these must hold."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from pytest import TempPathFactory
from transformers import PreTrainedModel

from layerwise.core.checkpoint import Checkpoint
from layerwise.core.folder import find_folder
from layerwise.core.network import Network
from layerwise.core.plan import DataSpec, Edit, Identity, Plan, Step
from layerwise.export import TARGETS
from layerwise.export._gguf_file import GgufFile

SMALL = DataSpec(samples=4, length=64)


def made_once(
    places: TempPathFactory,
    tokenizer_into: Callable[[Path], None],
    build: Callable[..., PreTrainedModel],
) -> Callable[..., Path]:
    """The folders of what `build` makes, each once, from the same random numbers every time."""

    @cache
    def make(*words: Any) -> Path:
        folder = places.mktemp("model")
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = build(*words)
        model.save_pretrained(folder)
        tokenizer_into(folder)
        return folder

    return make


def plan_of(model: str | Path, type_: str = "Q8_0", select: str = "*", **fields: Any) -> Plan:
    """One type for what is selected; without, nothing is edited."""
    held = Checkpoint(find_folder(model))
    edits = (Edit(select, (Step("ggml", {"type": type_}),)),) if type_ else ()
    identity = Identity(held.structure, held.weights)
    return Plan(identity, target="gguf", data=SMALL, edits=edits, **fields)


def given_back(file: GgufFile, network: Network) -> None:
    """Every matrix comes back as it is in the network, but for the rounding of eight bits."""
    network = TARGETS["gguf"].folded(network)
    for layer in network.layers():
        tensors, back = network.fetch(layer), file.records(network, layer)
        for matrix in layer.matrices:
            weight = matrix.view(tensors[matrix.parameter])
            off = (back[matrix.key].dense() - weight).abs().max()
            assert off <= 0.01 * weight.abs().max(), matrix.key
