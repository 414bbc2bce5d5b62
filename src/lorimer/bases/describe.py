"""What a base or an adapter folder is, as plain facts; reads headers and settings, never weights.

Keys of a fact that is not known hold None.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

from lorimer.bases.gguf import TensorEntry
from lorimer.bases.json_object import COPY
from lorimer.bases.open import BaseFiles, open_base
from lorimer.bases.safetensors import SafetensorsFile
from lorimer.bases.store import home, list_bases, manifest_of, resolve_base
from lorimer.errors import AdapterError, BaseError

Facts = dict[str, Any]
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def describe(name: str | Path) -> Facts:
    """The facts of a kept base, a folder, a .gguf file or an adapter folder.

    Raises BaseError or AdapterError saying what is wrong with it.
    """
    path = resolve_base(name)
    if (path / ADAPTER_CONFIG).is_file():
        return describe_adapter(path)
    return describe_base(open_base(path))


def kept() -> list[Facts]:
    """One line for each base kept here: name, bytes, kind, source, licence, pulled."""
    facts = []
    for manifest in list_bases():
        files = manifest.get("files")
        sizes = _sizes(files) if isinstance(files, dict) else {}
        gguf = any(file.endswith(".gguf") for file in sizes)
        facts.append(
            {
                "name": manifest["name"],
                "bytes": sum(sizes.values()),
                "kind": "gguf" if gguf else "safetensors",
                "source": manifest.get("source"),
                "licence": manifest.get("licence"),
                "pulled": manifest.get("pulled"),
            }
        )
    return facts


def _sizes(files: Facts) -> dict[str, int]:
    """File -> bytes; what a manifest does not say rightly counts as nothing."""
    sizes = {name: fact.get("bytes") if isinstance(fact, dict) else 0 for name, fact in files.items()}
    return {name: count if isinstance(count, int) else 0 for name, count in sizes.items()}


def describe_base(base: BaseFiles) -> Facts:
    manifest = _manifest(base.path)
    config = base.config
    positions = config.get("max_position_embeddings", config.get("n_positions"))
    return {
        "kind": "base",
        "name": manifest.get("name") or base.path.name,
        "about": manifest.get("about"),
        "path": str(base.path),
        "format": base.kind,
        "architecture": config.get("model_type"),
        "layers": config.get("num_hidden_layers", config.get("n_layer")),
        "hidden_size": config.get("hidden_size", config.get("n_embd")),
        "max_tokens": positions if isinstance(positions, int) else None,
        "parameters": base.parameters,
        "bytes": base.nbytes,
        "types": _types(base.tensors),
        "tokenizer": _tokenizer(base),
        "chat_template": base.chat_template is not None,
        "licence": manifest.get("licence") or config.get("license"),
        "source": manifest.get("source"),
        "fingerprint": base.fingerprint(),
        "config": config,
    }


def describe_adapter(path: Path) -> Facts:
    """r, alpha, targets and base, as PEFT's adapter_config.json says; sizes from the weights' header."""
    config = _adapter_config(path / ADAPTER_CONFIG)
    try:
        weights = SafetensorsFile(path / ADAPTER_WEIGHTS)
    except BaseError as error:
        raise AdapterError(error.problem, fix=error.fix, path=error.path) from error
    return {
        "kind": "adapter",
        "name": path.name,
        "path": str(path),
        "base": config.get("base_model_name_or_path"),
        "r": config.get("r"),
        "alpha": config.get("lora_alpha"),
        "dropout": config.get("lora_dropout"),
        "rslora": bool(config.get("use_rslora")),
        "target_modules": _names(config.get("target_modules")),
        "modules_to_save": _names(config.get("modules_to_save")),
        "parameters": sum(math.prod(entry.shape) for entry in weights.tensors.values()),
        "bytes": sum(entry.nbytes for entry in weights.tensors.values()),
        "types": _types(weights.tensors),
    }


def _names(value: Any) -> list[str]:
    """PEFT writes a list of names, one name or regex, or null."""
    return sorted(map(str, value)) if isinstance(value, list) else [str(value)] if value else []


def _adapter_config(path: Path) -> Facts:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterError(f"this cannot be read as JSON: {error}", fix=COPY, path=path) from error
    if not isinstance(value, dict):
        raise AdapterError("this should be a JSON object", fix=COPY, path=path)
    if value.get("peft_type", "LORA") != "LORA":
        raise AdapterError(
            f"the adapter is of the kind {value['peft_type']} (wanted: LORA)",
            fix="Use it with the tool that made it, or train a LoRA adapter.",
            path=path,
        )
    return value


def _manifest(path: Path) -> Facts:
    """The manifest of a kept base, found from its file or folder; {} for any other path."""
    folder = path if path.is_dir() else path.parent
    return manifest_of(folder) if folder.parent == (home() / "bases").resolve() else {}


def _types(tensors: dict[str, TensorEntry]) -> dict[str, int]:
    """How many tensors there are of each type, the most common first."""
    return dict(Counter(entry.dtype for entry in tensors.values()).most_common())


def _tokenizer(base: BaseFiles) -> str | None:
    """`BPE (gpt2, smollm), 49,152 tokens`: the kind, how text is cut, and the size."""
    metadata = base.gguf_metadata
    if metadata is not None:
        tokens = metadata.get("tokenizer.ggml.tokens")
        if not isinstance(tokens, list):
            return None
        names = [metadata.get(f"tokenizer.ggml.{key}") for key in ("model", "pre")]
        return f"BPE ({', '.join(str(name) for name in names if name)}), {len(tokens):,} tokens"
    if base.tokenizer_json is None:
        return None
    try:
        model = json.loads(base.tokenizer_json)["model"]
        return f"{model.get('type', 'BPE')}, {len(model['vocab']):,} tokens"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BaseError(f"this is not a tokenizer: {error}", path=base.path / "tokenizer.json") from error
