"""What a network keeps of the text that it has read, and how it goes back to an earlier place."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import Cache, DynamicCache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, LinearAttentionCacheLayerMixin


class Past:
    """A cache that is cut back, one that is copied before it runs on, or the text alone.

    Keys and values by position are cut. States that are overwritten, such as those of Mamba, cannot
    be taken back, so a copy of the cache from before is put in its place. A network without a cache
    reads the whole text again.
    """

    def __init__(self, output: Mapping[str, Any], tokens: Sequence[int]) -> None:
        caches = [(name, value) for name, value in output.items() if isinstance(value, Cache)]
        held = [(name, value) for name, value in caches if len(value)]
        self.place, self.cache = held[0] if held else ("", None)
        self.text = list(tokens)
        self.marked: Cache | None = None
        #: of a cache that can be cut, by layer; none of any other
        self.slots = _that_can_be_cut(self.cache)

    @property
    def cuts(self) -> bool:
        """Whether the cache is cut back; a text is, too."""
        return self.cache is None or bool(self.slots)

    @property
    def arguments(self) -> dict[str, Any]:
        """What a call that goes on is given beside its tokens."""
        return {self.place: self.cache} if self.cache is not None else {}

    def will_be_cut(self) -> None:
        """Let slots that forget, such as those of a sliding window, remember what is cut off."""
        if self.slots and self.cache is not None:
            self.cache.activate_past_recording()

    def mark(self) -> None:
        """Come back here later, where the cache is no longer than now."""
        if not self.cuts:
            self.marked = _copied(self.cache)

    def back(self, length: int) -> None:
        """Back to the first `length` tokens, where the mark is, if there is one."""
        if not self.cuts:
            self.cache, self.marked = self.marked, None
        for slot in self.slots:
            if isinstance(slot, CacheLayerMixin):
                slot.crop(-max(slot.get_seq_length() - length, 0))  # type: ignore[attr-defined]
        del self.text[length:]


def _that_can_be_cut(cache: Cache | None) -> list[Any]:
    """All slots, if they hold keys and values by position alone; what is derived may hold more."""
    slots = cache.layers if type(cache) is DynamicCache else []
    alone = all(type(slot).__module__ == DynamicCache.__module__ for slot in slots)
    states = any(isinstance(slot, LinearAttentionCacheLayerMixin) for slot in slots)
    able = alone and not states and all(slot.is_croppable for slot in slots)
    return list(slots) if able else []


def _copied(cache: Cache | None) -> Cache | None:
    """A cache that runs on alone; keys and values are never overwritten, and need no copies."""
    slots = [slot for slot in getattr(cache, "layers", ()) if isinstance(slot, DynamicLayer)]
    held = [tensor for slot in slots for tensor in (slot.keys, slot.values)]
    return copy.deepcopy(cache, {id(tensor): tensor for tensor in held if tensor is not None})
