"""Edits of one matrix."""

from layerwise.edit.weight.before import clip, qep, rotate, scale_channels, token_importance
from layerwise.edit.weight.codes import gaussian, trit_planes
from layerwise.edit.weight.comq import comq, refine
from layerwise.edit.weight.floats import minifloat
from layerwise.edit.weight.ggml import ggml
from layerwise.edit.weight.gptq import gptq
from layerwise.edit.weight.learn import learned_rounding
from layerwise.edit.weight.low_rank import low_rank, quantized_factors
from layerwise.edit.weight.noise import noise
from layerwise.edit.weight.rtn import rtn
from layerwise.edit.weight.sparsify import magnitude, sparsegpt, wanda

__all__ = [
    "clip",
    "comq",
    "gaussian",
    "ggml",
    "gptq",
    "learned_rounding",
    "low_rank",
    "magnitude",
    "minifloat",
    "noise",
    "qep",
    "quantized_factors",
    "refine",
    "rotate",
    "rtn",
    "scale_channels",
    "sparsegpt",
    "token_importance",
    "trit_planes",
    "wanda",
]
