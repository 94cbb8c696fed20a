"""A tiny model of an architecture, saved, and what was made of it."""

import re
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from build import Entry, example
from torch import nn

from layerwise.core.checkpoint import Checkpoint
from layerwise.core.network import Network
from layerwise.core.open import open_network
from layerwise.core.plan import DataSpec, Identity, Plan
from layerwise.jobs.checks import reload_checks
from layerwise.jobs.stock import load_stock


class StockFails(Exception):
    """The untouched model of stock transformers does not do this either."""


class Subject:
    """A saved tiny model and what was made of it so far."""

    def __init__(self, entry: Entry, model: nn.Module, folder: Path) -> None:
        self.entry, self.folder = entry, folder
        self.inputs = example(entry, model)
        model.save_pretrained(folder / "model")  # type: ignore[operator]
        self.stock = load_stock(folder / "model", "float32", torch.device("cpu"))
        self.dropped: nn.Module | None = None

    @cached_property
    def network(self) -> Network:
        """The streamed network; a walk leaves it as it was."""
        return open_network(self.folder / "model", dtype="float32")

    @cached_property
    def loaded(self) -> Network:
        """The same with all its weights."""
        return open_network(self.folder / "model", dtype="float32").load()

    def plan(self, **fields: Any) -> Plan:
        held = Checkpoint(self.folder / "model")
        identity = Identity(held.structure, held.weights)
        return Plan(model=identity, data=DataSpec(samples=1, length=16), **fields)

    def sound(self, out: Path) -> nn.Module:
        """The written folder, loaded by stock transformers, after its own check."""
        edited = load_stock(out, "float32", torch.device("cpu"))
        for check in reload_checks(out, edited):
            assert check["ok"], check["found"]
        return edited


def told(error: Exception) -> str:
    """An exception on one line, without what changes from run to run."""
    text = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {re.sub(r'/[^ ]*/(model|dropped|rounded)', '', text)}"[:160]
