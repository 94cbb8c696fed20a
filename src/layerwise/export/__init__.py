"""Export: checkpoints that stock engines load."""

from layerwise.export import compact as _compact
from layerwise.export import compressed_tensors as _ct
from layerwise.export import gguf as _gguf
from layerwise.export import hf as _hf
from layerwise.export.compressed_tensors import PACKED, compressed_tensors
from layerwise.export.gguf import gguf
from layerwise.export.hf import hf

TARGETS = {t.name: t for t in (_hf.TARGET, _ct.TARGET, _gguf.TARGET, _compact.TARGET)}

__all__ = ["PACKED", "TARGETS", "compressed_tensors", "gguf", "hf"]
