"""The metadata of a GGUF file that a folder's model becomes, in llama.cpp's keys.

What is written is read again, as any base is, before the file is begun: where that is another model, as
where a key cannot say which layers have a window, the export is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any

from torch import Tensor

from lorimer.bases.gguf import TensorEntry
from lorimer.bases.gguf_config import ABSENT, Reading, read_config
from lorimer.bases.gguf_names import architecture_of
from lorimer.errors import BaseError
from lorimer.export.source import Source
from lorimer.export.stacks import HEAD, architecture, no_scaling
from lorimer.model.families import read_spec
from lorimer.model.rope import frequencies
from lorimer.model.spec import ModelSpec, RopeSpec

Keys = dict[str, Any]
# From so many on llama.cpp takes a Command R for one whose query and key are normed.
LAYERS_PLUS = 64


def model_keys(source: Source) -> Keys:
    """general.* and the architecture's keys. Raises BaseError for a scaling that llama.cpp has not."""
    spec, (named, row) = source.spec, architecture(source)
    windows = [size for layer in range(spec.layers) if (size := spec.window(layer))]
    # Within one window it makes no difference that llama.cpp has none in this architecture.
    context = spec.max_positions if row.windows else min([spec.max_positions, *windows])
    keys: Keys = {
        "block_count": spec.layers,
        "context_length": context,
        "embedding_length": spec.hidden_size,
        "feed_forward_length": spec.intermediate_size,
        "attention.head_count": spec.heads,
        "attention.head_count_kv": spec.kv_heads,
        f"attention.layer_norm_{'rms_' if spec.norm == 'rms' else ''}epsilon": float(spec.norm_eps),
        "vocab_size": spec.vocab_size,
    }
    if "head_dim" not in ABSENT.get(row.model_type, ()):
        keys |= {"attention.key_length": spec.head_dim, "attention.value_length": spec.head_dim}
    if row.windows and windows:
        keys["attention.sliding_window"] = windows[0]
    if any(spec.turn(layer) is not None for layer in range(spec.layers)):
        keys |= _rope_keys(source)
    if own := OWN_KEYS.get(row.model_type):
        keys |= own(spec)
    general = {"general.architecture": named, "general.type": "model", "general.name": source.name}
    if isinstance(source.base.config.get("license"), str):
        general["general.license"] = source.base.config["license"]
    return general | {f"{named}.{key}": value for key, value in keys.items()}


def _rope_keys(source: Source) -> Keys:
    rope = source.spec.rope
    keys: Keys = {"rope.freq_base": float(rope.theta), "rope.dimension_count": rope.dimensions}
    if rope.kind in ("default", "llama3"):
        return keys
    if rope.kind not in ("linear", "yarn", "longrope"):
        raise no_scaling(source)
    keys["rope.scaling.type"] = rope.kind
    if rope.kind == "linear":
        return keys | {"rope.scaling.factor": float(rope.settings["factor"])}
    original = int(rope.settings["original_max_position_embeddings"])
    keys["rope.scaling.original_context_length"] = original
    if rope.kind == "longrope":
        return keys | {"rope.scaling.attn_factor": frequencies(rope, 1)[1]}
    keys["rope.scaling.factor"] = float(rope.settings.get("factor") or rope.max_positions / original)
    if rope.settings.get("attention_factor"):
        keys["rope.scaling.yarn_attn_factor"] = float(rope.settings["attention_factor"])
    for name in ("beta_fast", "beta_slow"):
        if rope.settings.get(name):
            keys[f"rope.scaling.yarn_{name}"] = float(rope.settings[name])
    return keys


def _caps(spec: ModelSpec) -> Keys:
    caps = {"attn_logit_softcapping": spec.score_cap, "final_logit_softcapping": spec.logit_cap}
    return {key: cap for key, cap in caps.items() if cap}


def _gemma3(spec: ModelSpec) -> Keys:
    return _caps(spec) | {"rope.freq_base_swa": float(spec.more_ropes[0].theta)}


def _phi3(spec: ModelSpec) -> Keys:
    original = spec.rope.settings.get("original_max_position_embeddings") or spec.max_positions
    window = spec.window(0) or 0
    return {"rope.scaling.original_context_length": int(original), "attention.sliding_window": window}


def _granite(spec: ModelSpec) -> Keys:
    return {
        "attention.scale": spec.attention_scale,
        "embedding_scale": spec.embedding_scale,
        "residual_scale": spec.residual_scale,
        "logit_scale": 1.0 / spec.logit_scale,
    }


def _experts(spec: ModelSpec) -> Keys:
    assert spec.experts is not None
    return {"expert_count": spec.experts.count, "expert_used_count": spec.experts.chosen}


def _qwen3_moe(spec: ModelSpec) -> Keys:
    assert spec.experts is not None
    return _experts(spec) | {"expert_feed_forward_length": spec.experts.inner}


def _logit_scale(spec: ModelSpec) -> Keys:
    return {"logit_scale": spec.logit_scale}


def _parallel(spec: ModelSpec) -> Keys:
    return {"use_parallel_residual": spec.parallel}


# Of each model type, the keys that it has beside those of all; gguf_config.py reads them.
OWN_KEYS: dict[str, Callable[[ModelSpec], Keys]] = {
    "gemma2": _caps,
    "gemma3_text": _gemma3,
    "phi3": _phi3,
    "granite": _granite,
    "cohere": _logit_scale,
    "cohere2": _logit_scale,
    "stablelm": _parallel,
    "gpt_neox": _parallel,
    "mixtral": _experts,
    "qwen3_moe": _qwen3_moe,
    # The order of rows in attn_qkv, as the converter calls it.
    "falcon": lambda _: {"tensor_data_layout": "jploski"},
}


def check_meaning(
    source: Source, keys: Keys, tensors: Sequence[TensorEntry], lists: Mapping[str, Tensor]
) -> None:
    """Raise BaseError if a file with these keys and tensors would be another model than the source."""
    named, row = architecture(source)
    shapes = {tensor.name: tensor.shape for tensor in tensors}
    reading = Reading(architecture_of(named, shapes), keys, shapes, lambda name: lists[name].tolist())
    found = read_spec(read_config(reading), path=str(source.base.path))
    wanted = source.spec
    differ = _differences(wanted, found)
    if found.tied_head != (HEAD not in shapes):
        differ.append(("tied_head", HEAD not in shapes, found.tied_head))
    if row.biased and not wanted.qkv_bias:
        differ.append(("qkv_bias", False, True))
    # Command R+ is known by its layers.
    if named == "command-r" and (wanted.layers >= LAYERS_PLUS) != bool(wanted.qk_norm):
        differ.append(("qk_norm", wanted.qk_norm, "own" if wanted.layers >= LAYERS_PLUS else ""))
    for name, mine, theirs in differ:
        raise BaseError(
            f"a GGUF file cannot say what this model is: its `{name}` is {_short(mine)}, and llama.cpp's "
            f"`{named}` would have {_short(theirs)}",
            fix="Use `--to merged`.",
            path=source.base.path,
        )


def _short(value: object) -> str:
    text = str(value) or "none"
    return text if len(text) < 60 else f"{text[:60]}..."


# Compared in another way, or names of the same thing.
APART = ("family", "max_positions", "windows", "turns", "rope", "more_ropes", "score_scale", "tied_head")


def _differences(wanted: ModelSpec, found: ModelSpec) -> list[tuple[str, object, object]]:
    pairs = [
        (field.name, getattr(wanted, field.name), getattr(found, field.name))
        for field in fields(ModelSpec)
        if field.name not in APART
    ]
    pairs.append(("attention_scale", wanted.attention_scale, found.attention_scale))
    layers = range(wanted.layers)
    if found.layers == wanted.layers:
        pairs.append(("turns", [wanted.turn(n) for n in layers], [found.turn(n) for n in layers]))
        pairs.append(("windows", _seen(wanted, found), _seen(found, found)))
        turning = any(wanted.turn(n) is not None for n in layers)
        lengths = (1, found.max_positions)
        pairs += [
            ("rope", _turning(mine, length), _turning(theirs, length))
            for mine, theirs in zip(wanted.ropes, found.ropes, strict=False)
            for length in lengths
            if turning
        ]
    return [pair for pair in pairs if not _same(*pair[1:])]


def _seen(spec: ModelSpec, file: ModelSpec) -> list[int]:
    """How many positions back each layer sees within the file's context."""
    sizes = (spec.window(layer) for layer in range(spec.layers))
    return [min(size or file.max_positions, file.max_positions) for size in sizes]


def _turning(rope: RopeSpec, length: int) -> list[float]:
    found, factor = frequencies(rope, length)
    return [*found.tolist(), factor]


def _same(mine: object, theirs: object) -> bool:
    """Equal as far as float32 holds it."""
    if isinstance(mine, list) and isinstance(theirs, list):
        return len(mine) == len(theirs) and all(map(_same, mine, theirs))
    if isinstance(mine, float) and isinstance(theirs, float):
        return math.isclose(mine, theirs, rel_tol=1e-5)
    return mine == theirs
