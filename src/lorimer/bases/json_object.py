"""Objects of JSON files that come with bases and adapters."""

from __future__ import annotations

from typing import Any

COPY = "Copy or download it again."


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """`object_pairs_hook` of json.loads. Raises ValueError for a key twice: each reader takes another."""
    value = dict(pairs)
    if len(value) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"`{key}` is there twice")
            seen.add(key)
    return value
