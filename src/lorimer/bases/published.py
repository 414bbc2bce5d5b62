"""Published files as transformers has them now: some are older than a prefix, some hold more than text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Config = dict[str, Any]

# Models of text and pictures: where files have the text's tensors, and what that is for a model of text.
TEXT_PARTS = (
    ("language_model.model.", "model."),
    ("model.language_model.", "model."),
    ("language_model.lm_head.", "lm_head."),
)


def text_part(config: Config) -> Config:
    """The config of the text model within one of text and pictures; any other as it is."""
    inside = config.get("text_config")
    if not isinstance(inside, dict) or not isinstance(inside.get("model_type"), str):
        return config
    # The outer config decides where both say something of the same.
    outer = {key: config[key] for key in ("tie_word_embeddings", "eos_token_id") if key in config}
    return inside | outer


def present_name(config: Mapping[str, Any], name: str) -> str | None:
    """A tensor's name in the text model of transformers; None for one that is not its."""
    if isinstance(config.get("text_config"), dict):
        found = [new + name.removeprefix(old) for old, new in TEXT_PARTS if name.startswith(old)]
        return found[0] if found else name if name.startswith("lm_head.") else None
    kind = config.get("model_type")
    if kind == "gpt2" and not name.startswith(("transformer.", "lm_head.")):
        return f"transformer.{name}"
    if kind == "opt" and name.startswith("decoder."):
        return f"model.{name}"
    if kind == "gpt_neox" and name.startswith("embed_out."):
        return name.replace("embed_out", "lm_head", 1)
    return name
