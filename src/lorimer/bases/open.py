"""A base on disk as BaseFiles: the same words whether it is a folder or a GGUF file."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lorimer.bases.gguf import GgufFile, TensorEntry
from lorimer.bases.mapped import Bytes
from lorimer.bases.safetensors import SafetensorsFile
from lorimer.errors import BaseError

SAMPLE = 4096
SMALL_FILE = 64_000_000  # no tokenizer.json or config is larger
# Keys that would run code from the model's folder, or change how it is computed, elsewhere.
IGNORED = ("auto_map", "trust_remote_code", "_attn_implementation", "_attn_implementation_internal")
# Keys of a config that change what the same weights compute.
COMPUTES = (
    "model_type", "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act", "rms_norm_eps",
    "rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor", "max_position_embeddings",
    "original_max_position_embeddings", "tie_word_embeddings", "attention_bias", "mlp_bias",
    "sliding_window", "use_sliding_window", "max_window_layers", "layer_types",
)  # fmt: skip


class BaseFiles(ABC):
    """The files of a base. Tensor names are those of Hugging Face.

    A GGUF file's query and key rows of Llama shapes lie interleaved; model/load.py puts them right.
    """

    path: Path
    kind: Literal["safetensors", "gguf"]
    config: dict[str, Any]
    tensors: dict[str, TensorEntry]
    tokenizer_json: str | None = None
    tokenizer_config: dict[str, Any]
    gguf_metadata: dict[str, Any] | None = None
    chat_template: str | None = None
    generation_config: dict[str, Any]

    @abstractmethod
    def raw(self, name: str) -> Bytes:
        """The tensor's bytes as they lie in the file, not copied."""

    @abstractmethod
    def release(self) -> None:
        """Give back the memory that reading tensors filled. They can be read again."""

    @property
    def parameters(self) -> int:
        """Numbers in all weights; a tied head counts once, and a byte of a 4-bit checkpoint twice."""
        return sum(
            int(np.prod(entry.shape)) * (2 if entry.dtype == "U8" else 1)
            for name, entry in self.tensors.items()
            if ".weight." not in name and not name.endswith(".SCB")
        )

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self.tensors.values())

    def eos_token_ids(self) -> list[int]:
        """Ids that end an answer, as the base's settings name them."""
        for source in (self.generation_config, self.config):
            value = source.get("eos_token_id")
            if value is None:
                continue
            tokens = value if isinstance(value, list) else [value]
            if not all(type(token) is int for token in tokens):
                raise BaseError(f"eos_token_id is {value!r} (wanted: ids)", path=self.path)
            return tokens
        return []

    @cached_property
    def _fingerprint(self) -> str:
        computes = {key: self.config[key] for key in COMPUTES if self.config.get(key) is not None}
        digest = hashlib.sha256(json.dumps(computes, sort_keys=True).encode())
        for name in sorted(self.tensors):
            entry = self.tensors[name]
            # A GGUF file's names may hold bytes that are no text.
            digest.update(f"{name} {entry.dtype} {entry.shape}".encode("utf-8", "surrogateescape"))
            raw = self.raw(name)
            for start in sorted({0, max(0, raw.nbytes // 2), max(0, raw.nbytes - SAMPLE)}):
                digest.update(raw[start : start + SAMPLE].tobytes())
        # Around each sample the system has mapped what lies near it: 65 MB of a file of 450.
        self.release()
        return digest.hexdigest()

    def fingerprint(self) -> str:
        """sha256 over the settings that compute and every tensor's name, type, shape and 4 KiB from
        its begin, middle and end.

        The same wherever the files are; another base of the same shapes has another.
        """
        return self._fingerprint


def open_base(path: str | Path) -> BaseFiles:
    """Open a Hugging Face folder or a .gguf file. Raises BaseError saying what is wrong with it."""
    path = Path(path)
    if path.is_file():
        return GgufBase(path)
    if not path.is_dir():
        raise BaseError("there is no such file or folder", path=path)
    inside = sorted(path.glob("*.gguf"))
    if not inside or any(path.glob("*.safetensors")):
        return FolderBase(path)
    if len(inside) > 1:
        names = ", ".join(file.name for file in inside)
        raise BaseError("there are several GGUF files", fix=f"Name one of them: {names}.", path=path)
    return GgufBase(inside[0])


def present_name(config: Mapping[str, Any], name: str) -> str:
    """A tensor's name as transformers has it now: some published files are older than their prefix."""
    kind = config.get("model_type")
    if kind == "gpt2" and not name.startswith(("transformer.", "lm_head.")):
        return f"transformer.{name}"
    if kind == "opt" and name.startswith("decoder."):
        return f"model.{name}"
    if kind == "gpt_neox" and name.startswith("embed_out."):
        return name.replace("embed_out", "lm_head", 1)
    return name


class FolderBase(BaseFiles):
    """config.json, model.safetensors or its shards, tokenizer.json."""

    kind = "safetensors"

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = self._json("config.json", required=True)
        for key in IGNORED:
            self.config.pop(key, None)
        self.generation_config = self._json("generation_config.json")
        self.tokenizer_config = self._json("special_tokens_map.json") | self._json("tokenizer_config.json")
        self.tokenizer_json = self._text("tokenizer.json")
        self.chat_template = self._text("chat_template.jinja") or self._template()
        self._files: dict[str, SafetensorsFile] = {}
        for file in self._weight_files():
            self._files |= {present_name(self.config, name): file for name in file.tensors}
        self._own = {present_name(self.config, n): n for file in self.files() for n in file.tensors}
        self.tensors = {name: file.tensors[self._own[name]] for name, file in self._files.items()}

    def files(self) -> list[SafetensorsFile]:
        return list({id(file): file for file in self._files.values()}.values())

    def raw(self, name: str) -> Bytes:
        return self._files[name].raw(self._own[name])

    def release(self) -> None:
        for file in self.files():
            file.release()

    def _text(self, name: str) -> str | None:
        file = self.path / name
        try:
            if file.exists() and file.stat().st_size > SMALL_FILE:
                raise BaseError(f"{file.stat().st_size:,} bytes is too large for this file", path=file)
            return file.read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
        except (OSError, UnicodeDecodeError) as error:
            raise BaseError(f"the file cannot be read: {error}", path=file) from error

    def _json(self, name: str, *, required: bool = False) -> dict[str, Any]:
        text = self._text(name)
        if text is None:
            if required:
                raise BaseError(
                    f"{name} is missing",
                    fix="Give a folder in Hugging Face layout, or a .gguf file.",
                    path=self.path,
                )
            return {}
        try:
            value = json.loads(text)
            # Half of a pair of surrogates is a text to JSON, and cannot be written anywhere.
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except (ValueError, RecursionError) as error:
            raise BaseError(f"this is not JSON: {error}", path=self.path / name) from error
        if not isinstance(value, dict):
            raise BaseError("this should be a JSON object", path=self.path / name)
        return value

    def _template(self) -> str | None:
        """tokenizer_config.json holds one template, or a list of named ones."""
        value = self.tokenizer_config.get("chat_template")
        if isinstance(value, list):
            named = {item.get("name"): item.get("template") for item in value if isinstance(item, dict)}
            value = named.get("default")
        return value if isinstance(value, str) else None

    def _weight_files(self) -> list[SafetensorsFile]:
        # In the order of transformers: an index may be left behind beside one whole file.
        single = self.path / "model.safetensors"
        if single.exists():
            return [SafetensorsFile(single)]
        index = self._json("model.safetensors.index.json")
        if index:
            shards = index.get("weight_map")
            if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
                raise BaseError(
                    "weight_map should give a file for each tensor",
                    path=self.path / "model.safetensors.index.json",
                )
            return [SafetensorsFile(self._shard(name)) for name in sorted(set(shards.values()))]
        pickles = sorted(
            file.name for file in self.path.iterdir() if file.suffix in (".bin", ".pt", ".pth")
        )
        if pickles:
            raise BaseError(
                f"the weights are in {pickles[0]}, a pickle, which can run code when it is read",
                fix="Get the model as safetensors, or convert it where you trust it.",
                path=self.path,
            )
        raise BaseError("model.safetensors is missing", path=self.path)

    def _shard(self, name: str) -> Path:
        file = self.path / name
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise BaseError(
                f"the index names `{name}` (wanted: a .safetensors file in the same folder)", path=self.path
            )
        if not file.exists():
            raise BaseError(f"the shard {name} that the index names is missing", path=self.path)
        return file


# llama.cpp's names for what Hugging Face calls otherwise.
TOP_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def hugging_face_name(name: str) -> str:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`; unknown names stay."""
    parts = name.split(".")
    if parts[0] in TOP_NAMES and len(parts) == 2:
        return f"{TOP_NAMES[parts[0]]}.{parts[1]}"
    if parts[0] == "blk" and len(parts) == 4 and parts[2] in LAYER_NAMES:
        return f"model.layers.{parts[1]}.{LAYER_NAMES[parts[2]]}.{parts[3]}"
    return name


def llama_cpp_name(name: str) -> str | None:
    """The inverse: `model.layers.3.self_attn.q_proj.weight` -> `blk.3.attn_q.weight`; None if unknown."""
    module, _, kind = name.rpartition(".")
    for short, long in TOP_NAMES.items():
        if module == long:
            return f"{short}.{kind}"
    parts = module.split(".", 3)
    if parts[:2] == ["model", "layers"] and len(parts) == 4:
        for short, long in LAYER_NAMES.items():
            if parts[3] == long:
                return f"blk.{parts[2]}.{short}.{kind}"
    return None


class GgufBase(BaseFiles):
    """One .gguf file, its metadata put into the words of config.json."""

    kind = "gguf"

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = GgufFile(path)
        metadata = self.gguf_metadata = self._file.metadata
        if metadata.get("split.count", 0) not in (0, 1):
            raise BaseError(
                f"this is one of {metadata['split.count']} parts of a split GGUF file",
                fix="Join them with llama.cpp's llama-gguf-split --merge, or choose a file in one part.",
                path=path,
            )
        self._names = {hugging_face_name(name): name for name in self._file.tensors}
        self.tensors = {name: self._file.tensors[own] for name, own in self._names.items()}
        self.config = self._config(metadata)
        self.tokenizer_config = {}
        self.generation_config = self._end_tokens(metadata)
        template = metadata.get("tokenizer.chat_template")
        self.chat_template = template if isinstance(template, str) else None

    def raw(self, name: str) -> Bytes:
        return self._file.raw(self._names[name])

    def entry(self, key: str) -> bytes:
        """A metadata value as it lies in the file, its type in front."""
        return self._file.entry(key)

    def _end_tokens(self, metadata: Mapping[str, Any]) -> dict[str, Any]:
        """The end of the text and the end of a turn or message, where the file names more than one."""
        named = [metadata.get(f"tokenizer.ggml.{role}_token_id") for role in ("eos", "eot", "eom")]
        tokens = list(dict.fromkeys(token for token in named if type(token) is int))
        return {"eos_token_id": tokens} if len(tokens) > 1 else {}

    def release(self) -> None:
        self._file.release()

    def _config(self, metadata: Mapping[str, Any]) -> dict[str, Any]:
        architecture = str(metadata.get("general.architecture"))

        def get(key: str, default: Any = None) -> Any:
            return metadata.get(f"{architecture}.{key}", default)

        try:
            vocabulary, hidden = self.tensors["model.embed_tokens.weight"].shape
            heads, layers = int(get("attention.head_count")), int(get("block_count"))
            if layers > len(self.tensors):
                raise ValueError(f"block_count {layers:,}")
            size = int(get("attention.key_length") or get("rope.dimension_count") or hidden // heads)
            self._check_rows("self_attn.q_proj", heads * size)
            self._check_rows("self_attn.k_proj", int(get("attention.head_count_kv", heads)) * size)
            self._check_rows("mlp.up_proj", int(get("feed_forward_length")))
            config = {
                "model_type": architecture,
                "vocab_size": vocabulary,
                "hidden_size": hidden,
                "intermediate_size": int(get("feed_forward_length")),
                "num_hidden_layers": layers,
                "num_attention_heads": heads,
                "num_key_value_heads": int(get("attention.head_count_kv", heads)),
                "head_dim": size,
                "rms_norm_eps": float(get("attention.layer_norm_rms_epsilon", 1e-6)),
                "max_position_embeddings": int(get("context_length", 2048)),
                "rope_theta": float(get("rope.freq_base", 10_000.0)),
                "rope_scaling": self._rope_scaling(get),
                "tie_word_embeddings": "lm_head.weight" not in self.tensors,
                "attention_bias": "model.layers.0.self_attn.q_proj.bias" in self.tensors,
                "sliding_window": get("attention.sliding_window"),
                "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
                "eos_token_id": metadata.get("tokenizer.ggml.eos_token_id"),
                "pad_token_id": metadata.get("tokenizer.ggml.padding_token_id"),
                "license": metadata.get("general.license"),
            }
        except (KeyError, TypeError, ValueError, ArithmeticError) as error:
            raise BaseError(
                f"the GGUF file does not describe a language model that can be used ({architecture}: "
                f"{error} is missing or wrong)",
                path=self.path,
            ) from error
        return config

    def _check_rows(self, module: str, rows: int) -> None:
        """Sizes in the metadata are believed only if the first layer has them: memory is taken by them."""
        entry = self.tensors.get(f"model.layers.0.{module}.weight")
        if entry is not None and entry.shape[0] != rows:
            raise ValueError(f"{rows:,} rows of {module}, where there are {entry.shape[0]:,},")

    def _rope_scaling(self, get: Any) -> dict[str, Any] | None:
        """llama.cpp's scaling keys; a tensor of divisors (Llama 3.1) is LongRoPE with one list."""
        if "rope_freqs.weight" in self.tensors:
            if self.tensors["rope_freqs.weight"].dtype != "F32":
                raise ValueError("rope_freqs.weight as F32")
            divisors = self.raw("rope_freqs.weight").view("<f4").tolist()
            return {
                "rope_type": "longrope",
                "short_factor": divisors,
                "long_factor": divisors,
                "attention_factor": 1.0,
                "original_max_position_embeddings": int(get("context_length", 2048)),
            }
        kind = get("rope.scaling.type")
        if kind in (None, "none"):
            return None
        scaling = {"rope_type": kind, "factor": get("rope.scaling.factor")}
        original = get("rope.scaling.original_context_length")
        if original:
            scaling["original_max_position_embeddings"] = int(original)
        if get("rope.scaling.attn_factor"):
            scaling["attention_factor"] = float(get("rope.scaling.attn_factor"))
        return scaling
