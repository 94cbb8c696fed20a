"""Interpolated modified Kneser-Ney trigrams (Chen & Goodman, 1999), vectorised."""

from typing import NamedTuple, final

import numpy as np

Array = np.ndarray


def codes_of(streams: list[Array], vocabulary: int) -> Array:
    """Every token but the first of each stream, as base-`vocabulary` number of its trigram.

    A stream begins with the end mark; its first trigram sees that mark twice.
    """
    codes = []
    for stream in streams:
        ids = np.concatenate([stream[:1], stream]).astype(np.int64)
        codes.append((ids[:-2] * vocabulary + ids[1:-1]) * vocabulary + ids[2:])
    return np.concatenate(codes)


def discounts(counts: Array) -> Array:
    """What n-grams of count 1, 2 and 3 or more give up (eq. 26 of the paper).

    The estimate needs n-grams of every count up to 4; without them 0.75 is given up. It is kept
    above zero, else an unseen token could become impossible.
    """
    n = np.bincount(np.minimum(counts, 5), minlength=6)[1:5]
    if (n == 0).any():
        return np.full(3, 0.75)
    k = np.arange(1, 4)
    return np.clip(k - (k + 1) * n[0] / (n[0] + 2 * n[1]) * n[1:] / n[:3], 0.1, k)


class Order(NamedTuple):
    """Discounted counts by n-gram; count and given-up mass by context. Codes are sorted."""

    grams: Array
    kept: Array
    contexts: Array
    totals: Array
    spared: Array


def order_of(grams: Array, counts: Array, vocabulary: int) -> Order:
    given_up = discounts(counts)[np.minimum(counts, 3) - 1]
    contexts, place = np.unique(grams // vocabulary, return_inverse=True)
    totals, spared = np.bincount(place, counts), np.bincount(place, given_up)
    return Order(grams, counts - given_up, contexts, totals, spared)


def look_up(keys: Array, values: Array, wanted: Array) -> Array:
    """Values by sorted key, zero where the key is missing."""
    place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[place] == wanted, values[place], 0.0)


@final
class Trigram:
    """p(w | u v) = (c(uvw) - d) / c(uv) + spared(uv) / c(uv) * p(w | v), down to uniform.

    Below the trigrams c counts distinct left neighbours in place of occurrences.
    """

    def __init__(self, streams: list[Array], vocabulary: int):
        self.vocabulary = vocabulary
        self.orders: list[Order] = []
        grams, counts = np.unique(codes_of(streams, vocabulary), return_counts=True)
        for size in (3, 2, 1):
            self.orders.insert(0, order_of(grams, counts, vocabulary))
            shorter = grams % vocabulary ** (size - 1)
            grams, counts = np.unique(shorter, return_counts=True)

    def probability(self, codes: Array) -> Array:
        p = np.full(len(codes), 1 / self.vocabulary)
        for size, order in enumerate(self.orders, 1):
            grams = codes % self.vocabulary**size
            total = look_up(order.contexts, order.totals, grams // self.vocabulary)
            spared = look_up(order.contexts, order.spared, grams // self.vocabulary)
            kept = look_up(order.grams, order.kept, grams)
            p = np.where(total > 0, (kept + spared * p) / np.maximum(total, 1), p)
        return p

    def check(self, pairs: list[tuple[int, int]]) -> None:
        """Assert that the probabilities after each pair of tokens sum to one."""
        for u, v in pairs:
            codes = (u * self.vocabulary + v) * self.vocabulary + np.arange(self.vocabulary)
            total = self.probability(codes).sum()
            assert abs(total - 1) < 1e-9, f"p(. | {u} {v}) sums to {total}"
