"""Rows that are nearly the same: what they share of their runs of three tokens, not all pairs compared.

Similarity is the Jaccard index of the sets of runs (shingles). MinHash (Broder 1997) makes a signature of a
set; rows whose signatures agree in one band are candidates, and each candidate is then compared exactly.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lorimer.data.pack import shared_prefix
from lorimer.data.template import Example

Array = np.ndarray[Any, Any]

SHINGLE = 3
# 20 bands of 4: of pairs with a similarity of 0.85 one in 10^7 is missed, of those with 0.7 one in 250.
BANDS, ROWS = 20, 4
# Two rows share no band by chance, and more than these of one band are alike anyway.
MOST_CANDIDATES = 50
PRIME = np.uint64((1 << 61) - 1)


# Of long rows a changed word leaves 0.9; short ones are alike by chance, and must nearly agree.
LONG, LEAST_LONG, LEAST_SHORT = 60, 0.8, 0.95


@dataclass(frozen=True, slots=True)
class Near:
    """Row `one` of the first rows is nearly row `other` of the second."""

    one: int
    other: int
    similarity: float


def shingles(ids: Array) -> Array:
    """The distinct runs of three tokens as 64-bit numbers, ascending; of a shorter row the row itself."""
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


def near_prompts(ones: Sequence[Example], others: Sequence[Example]) -> list[Near]:
    """Examples of `others` that are asked nearly what one of `ones` is; of plain text the whole row."""
    if not ones or not others:
        return []
    start = shared_prefix([*ones, *others])
    asked = [_asked(example)[start:] for example in others]
    return [
        near
        for near in near_rows([_asked(example)[start:] for example in ones], asked, LEAST_LONG)
        if near.similarity >= (LEAST_LONG if len(asked[near.other]) > LONG else LEAST_SHORT)
    ]


def _asked(example: Example) -> Array:
    first = int(np.argmax(example.trained)) if example.trained.any() else len(example.ids)
    return example.ids if first <= 1 else example.ids[:first]


def _bands(found: Array, factors: Array, addends: Array) -> list[bytes]:
    with np.errstate(over="ignore"):
        hashed = found[:, None] * factors + addends
        hashed ^= hashed >> np.uint64(32)
    lowest = hashed.min(axis=0)
    return [lowest[band * ROWS : (band + 1) * ROWS].tobytes() for band in range(BANDS)]


def near_rows(ones: Sequence[Array], others: Sequence[Array], least: float) -> Iterator[Near]:
    """For each of `others`, the most similar of `ones`, if it is at least so similar.

    Rows are token ids. What all rows of a set begin with should be left out before: it makes all alike.
    """
    random = np.random.Generator(np.random.PCG64(0))
    factors = random.integers(1, 1 << 63, BANDS * ROWS, dtype=np.uint64) | np.uint64(1)
    addends = random.integers(0, 1 << 63, BANDS * ROWS, dtype=np.uint64)
    sets = [shingles(row) for row in ones]
    tables: list[dict[bytes, list[int]]] = [{} for _ in range(BANDS)]
    for number, found in enumerate(sets):
        for table, key in zip(tables, _bands(found, factors, addends), strict=True):
            members = table.setdefault(key, [])
            if len(members) < MOST_CANDIDATES:
                members.append(number)
    for number, row in enumerate(others):
        found = shingles(row)
        keys = _bands(found, factors, addends)
        candidates = {one for table, key in zip(tables, keys, strict=True) for one in table.get(key, ())}
        scored = [(similarity(sets[one], found), -one) for one in candidates]
        best, one = max(scored, default=(0.0, 0))
        if best >= least:
            yield Near(-one, number, best)
