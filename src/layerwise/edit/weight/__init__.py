"""Edits of one matrix."""

from layerwise.edit.weight.comq import comq, refine
from layerwise.edit.weight.gptq import gptq
from layerwise.edit.weight.rtn import rtn

__all__ = ["comq", "gptq", "refine", "rtn"]
