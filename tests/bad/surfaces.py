"""The collection: bad inputs by what they are given to."""

from __future__ import annotations

from bad import (
    adapters,
    arguments,
    checkpoints,
    config_json,
    gguf_file,
    rows,
    settings,
    templates,
    tokenizer_json,
    weights,
)
from bad.case import Case

SURFACES: dict[str, list[Case]] = {
    "rows": rows.CASES,
    "settings": settings.CASES,
    "arguments": arguments.CASES,
    "safetensors": weights.CASES,
    "config.json": config_json.CASES,
    "tokenizer.json": tokenizer_json.CASES,
    "templates": templates.CASES,
    "adapters": adapters.CASES,
    "checkpoints": checkpoints.CASES,
    "gguf": gguf_file.CASES,
}
