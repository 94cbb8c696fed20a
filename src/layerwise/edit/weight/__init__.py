"""Edits of one matrix."""

from layerwise.edit.weight.gptq import gptq
from layerwise.edit.weight.rtn import rtn

__all__ = ["gptq", "rtn"]
