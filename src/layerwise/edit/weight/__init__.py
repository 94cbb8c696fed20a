"""Edits of one matrix."""

from layerwise.edit.weight.ggml import ggml
from layerwise.edit.weight.gptq import gptq
from layerwise.edit.weight.rtn import rtn

__all__ = ["ggml", "gptq", "rtn"]
