"""Rows that are nearly the same: what they share of their runs of three words, not all pairs compared.

Similarity is the Jaccard index of the sets of runs (shingles). MinHash (Broder 1997) makes a signature of a
set; rows whose signatures agree in one band are candidates, and each candidate is then compared exactly.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

SHINGLE = 3
# 20 bands of 4: of pairs with a similarity of 0.85 one in 10^7 is missed, of those with 0.7 one in 250.
BANDS, ROWS = 20, 4
# Two rows share no band by chance, and more than these of one band are alike anyway.
MOST_CANDIDATES = 50
PRIME = np.uint64((1 << 61) - 1)


# Of long rows a changed word leaves 0.9; short ones are alike by chance, and must nearly agree.
LONG, LEAST_LONG, LEAST_SHORT = 30, 0.8, 0.95


@dataclass(frozen=True, slots=True)
class Near:
    """Row `one` of the first rows is nearly row `other` of the second."""

    one: int
    other: int
    similarity: float


def shingles(ids: Array) -> Array:
    """The distinct runs of three words as 64-bit numbers, ascending; of a shorter row the row itself."""
    numbers = ids.astype(np.uint64) + np.uint64(1)
    if len(numbers) < SHINGLE:
        numbers = np.concatenate([numbers, np.zeros(SHINGLE - len(numbers), np.uint64)])
    with np.errstate(over="ignore"):
        mixed = np.zeros(len(numbers) - SHINGLE + 1, np.uint64)
        for place in range(SHINGLE):
            part = numbers[place : len(numbers) - SHINGLE + 1 + place]
            mixed = (mixed ^ part) * np.uint64(0x9E3779B97F4A7C15)
            mixed ^= mixed >> np.uint64(29)
    return np.unique(mixed)


def similarity(one: Array, other: Array) -> float:
    """The Jaccard index of two sets of shingles."""
    shared = len(np.intersect1d(one, other, assume_unique=True))
    return shared / max(1, len(one) + len(other) - shared)


def words(text: str) -> Array:
    """A text's words as numbers, whatever their case and what stands between them."""
    found = re.findall(r"\w+", text.casefold())
    return np.array([zlib.crc32(word.encode()) for word in found] or [0], dtype=np.uint32)


def near_prompts(ones: Sequence[str], others: Sequence[str]) -> list[Near]:
    """Texts of `others` that are nearly one of `ones`."""
    asked = [words(text) for text in others]
    found = near_rows([words(text) for text in ones], asked, LEAST_LONG)
    return [near for near in found if near.similarity >= enough(len(asked[near.other]))]


def _bands(found: Array, factors: Array, addends: Array) -> list[bytes]:
    with np.errstate(over="ignore"):
        hashed = found[:, None] * factors + addends
        hashed ^= hashed >> np.uint64(32)
    lowest = hashed.min(axis=0)
    return [lowest[band * ROWS : (band + 1) * ROWS].tobytes() for band in range(BANDS)]


class Index:
    """Rows to look for similar ones among."""

    def __init__(self) -> None:
        random = np.random.Generator(np.random.PCG64(0))
        self._factors = random.integers(1, 1 << 63, BANDS * ROWS, dtype=np.uint64) | np.uint64(1)
        self._addends = random.integers(0, 1 << 63, BANDS * ROWS, dtype=np.uint64)
        self._sets: list[Array] = []
        self._tables: list[dict[bytes, list[int]]] = [{} for _ in range(BANDS)]

    def add(self, ids: Array) -> None:
        """The next row; rows are numbered from 0."""
        found = shingles(ids)
        for table, key in zip(self._tables, _bands(found, self._factors, self._addends), strict=True):
            members = table.setdefault(key, [])
            if len(members) < MOST_CANDIDATES:
                members.append(len(self._sets))
        self._sets.append(found)

    def most_similar(self, ids: Array) -> tuple[float, int]:
        """How similar the most similar row is, and its number; (0, -1) if none is near."""
        found = shingles(ids)
        keys = _bands(found, self._factors, self._addends)
        candidates = {
            one for table, key in zip(self._tables, keys, strict=True) for one in table.get(key, ())
        }
        best, one = max(
            ((similarity(self._sets[one], found), -one) for one in candidates), default=(0.0, 1)
        )
        return best, -one


def near_rows(ones: Sequence[Array], others: Sequence[Array], least: float) -> Iterator[Near]:
    """For each of `others`, the most similar of `ones`, if it is at least so similar.

    Rows are numbers of words. What all rows of a set begin with should be left out before: it makes all
    alike.
    """
    index = Index()
    for row in ones:
        index.add(row)
    for number, row in enumerate(others):
        best, one = index.most_similar(row)
        if best >= least:
            yield Near(one, number, best)


def enough(size: int) -> float:
    """From which similarity on a row of so many words counts as nearly another."""
    return LEAST_LONG if size > LONG else LEAST_SHORT
