"""Reports: what was found or decided, as one page that needs nothing else."""

from layerwise.report.html import page

__all__ = ["page"]
