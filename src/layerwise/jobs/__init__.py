"""The main job, a file per step: inspect, plan, apply, verify."""

import layerwise.families as families

__all__ = ["families"]
