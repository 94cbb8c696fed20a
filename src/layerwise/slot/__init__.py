"""Modules that take the place of feed-forward parts, and are trained."""

from layerwise.slot.mixture import expert_parts, low_rank_experts

__all__ = ["expert_parts", "low_rank_experts"]
