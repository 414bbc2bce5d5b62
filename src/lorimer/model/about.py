"""What lorimer computes of a base, as plain facts for `lorimer show`; no weight is read."""

from __future__ import annotations

from typing import Any

from lorimer.errors import BaseError
from lorimer.model.families import read_spec, why_not_native
from lorimer.model.foreign_known import check_known, slower
from lorimer.model.spec import ModelSpec


def computed(config: dict[str, Any], path: str) -> dict[str, Any]:
    """`native`: whether lorimer's own decoder runs it; `slower`: what is said of one that runs through
    transformers; `why`: why neither does; `parts`: numbers by part."""
    facts = {"native": False, "slower": None, "why": None, "parts": None, "heads": None}
    try:
        if why := why_not_native(config):
            check_known(config, why, path=path)
            return facts | {"slower": slower(config, why)}
        spec = read_spec(config, path=path)
    except BaseError as error:
        return facts | {"why": f"{error.problem}. {error.fix or ''}".rstrip()}
    turning = f"{spec.heads} of {spec.head_dim}"
    heads = turning if spec.kv_heads == spec.heads else f"{turning}, {spec.kv_heads} for keys"
    return facts | {"native": True, "parts": parts(spec), "heads": heads}


def parts(spec: ModelSpec) -> dict[str, int]:
    """Numbers by part; a head that is the embedding counts as 0."""
    attention = units = 0
    for layer in range(spec.layers):
        for group in spec.groups(layer):
            size = sum(group.rows) * (group.inputs + group.bias)
            attention += size if group.attention else 0
            units += 0 if group.attention else size
    mixture = spec.experts
    routers = len(mixture.layers) * mixture.count * spec.hidden_size if mixture else 0
    table = spec.vocab_size * spec.hidden_size
    found = {
        "embedding": table,
        "positions": spec.learned_positions * spec.hidden_size,
        "attention": attention,
        "experts" if mixture else "mlp": units,
        "routers": routers,
        "norms": spec.norm_numbers,
        "head": 0 if spec.tied_head else table,
    }
    return {name: count for name, count in found.items() if count or name == "head"}
