"""layerwise opens any deep network as a stack of layers.

    import layerwise
    network = layerwise.open("demo")

Nothing here imports torch before it is used.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

#: what is public, and where it lives
PUBLIC = {
    "open": ("layerwise.core.open", "open_network"),
    "observe": ("layerwise.core.stats", "observe"),
    "walk": ("layerwise.core.lockstep", "walk"),
    "method": ("layerwise.core.method", "method"),
    "inspect": ("layerwise.jobs.against", "inspect_models"),
    "Texts": ("layerwise.core.data", "Texts"),
    "Wanted": ("layerwise.jobs.wanted", "Wanted"),
    "methods": ("layerwise.families", "methods"),
    "find": ("layerwise.families", "find"),
    "Plan": ("layerwise.core.plan", "Plan"),
    "read_plan": ("layerwise.core.plan", "read_plan"),
    "make_plan": ("layerwise.api", "make_plan"),
    "apply_plan": ("layerwise.api", "apply_plan"),
    "verify": ("layerwise.api", "verify"),
    "LayerwiseError": ("layerwise.core.errors", "LayerwiseError"),
}

__all__ = ["__version__", *PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in PUBLIC:
        raise AttributeError(f"module 'layerwise' has no attribute {name!r}")
    module, attribute = PUBLIC[name]
    return getattr(import_module(module), attribute)
