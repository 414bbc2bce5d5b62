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
from lorimer.bases.gguf_config import Reading, read_config
from lorimer.bases.gguf_names import ARCHITECTURES, Piece, architecture_of, pieces
from lorimer.bases.json_object import COPY, unique
from lorimer.bases.mapped import Bytes
from lorimer.bases.published import present_name, text_part
from lorimer.bases.safetensors import SafetensorsFile
from lorimer.errors import BaseError

SAMPLE = 4096
SMALL_FILE = 64_000_000  # no tokenizer.json or config is larger
# Keys that would run code from the model's folder, or change how it is computed, elsewhere.
IGNORED = ("auto_map", "trust_remote_code", "_attn_implementation", "_attn_implementation_internal")
# What a tokenizer's settings hold: the kind, in Python and in words.
SETTINGS: dict[str, tuple[type, str]] = {
    **{f"{role}_token": (str, "a text") for role in ("bos", "eos", "pad", "unk")},
    **{f"add_{role}_token": (bool, "true or false") for role in ("bos", "eos")},
}
# Keys of a config that change what the same weights compute.
COMPUTES = (
    "model_type", "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act", "rms_norm_eps",
    "rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor", "max_position_embeddings",
    "original_max_position_embeddings", "tie_word_embeddings", "attention_bias", "mlp_bias",
    "sliding_window", "use_sliding_window", "max_window_layers", "layer_types",
)  # fmt: skip


class BaseFiles(ABC):
    """The files of a base. Tensor names are those of Hugging Face.

    A GGUF file's rows of query and key may lie in llama.cpp's order; model/order.py puts them right.
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
    brings_code = False  # its config names code in its own folder, which is never run

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
                fix = "Check config.json and generation_config.json against the model's original."
                raise BaseError(f"eos_token_id is {value!r} (wanted: ids)", fix=fix, path=self.path)
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
        raise BaseError("there is no such file or folder", fix="Check the path.", path=path)
    inside = sorted(path.glob("*.gguf"))
    if not inside or any(path.glob("*.safetensors")):
        return FolderBase(path)
    if len(inside) > 1:
        names = ", ".join(file.name for file in inside)
        raise BaseError("there are several GGUF files", fix=f"Name one of them: {names}.", path=path)
    return GgufBase(inside[0])


class FolderBase(BaseFiles):
    """config.json, model.safetensors or its shards, tokenizer.json."""

    kind = "safetensors"

    def __init__(self, path: Path) -> None:
        self.path = path
        whole = self._json("config.json", required=True)
        self.config = {key: value for key, value in text_part(whole).items() if key not in IGNORED}
        self.brings_code = "auto_map" in whole
        self.generation_config = self._json("generation_config.json")
        self.tokenizer_config = self._settings("special_tokens_map.json") | self._settings(
            "tokenizer_config.json"
        )
        self.tokenizer_json = self._text("tokenizer.json")
        self.chat_template = self._text("chat_template.jinja") or self._template()
        self._files: dict[str, SafetensorsFile] = {}
        self._own: dict[str, str] = {}
        for file in self._weight_files():
            for own in file.tensors:
                if name := present_name(whole, own):
                    self._files[name], self._own[name] = file, own
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
                said = f"{file.stat().st_size:,} bytes is too large for this file"
                raise BaseError(said, fix=COPY, path=file)
            return file.read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
        except UnicodeDecodeError as error:
            fix = f"{COPY} If you wrote it, save it as UTF-8."
            raise BaseError(f"the file cannot be read: {error}", fix=fix, path=file) from error
        except OSError as error:
            fix = "Give a folder that you may read."
            raise BaseError(f"the file cannot be read: {error}", fix=fix, path=file) from error

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
            value = json.loads(text, object_pairs_hook=unique)
            # Half of a pair of surrogates is a text to JSON, and cannot be written anywhere.
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except (ValueError, RecursionError) as error:
            raise BaseError(f"this is not JSON: {error}", fix=COPY, path=self.path / name) from error
        if not isinstance(value, dict):
            raise BaseError("this should be a JSON object", fix=COPY, path=self.path / name)
        return value

    def _settings(self, name: str) -> dict[str, Any]:
        """A tokenizer's. One of the wrong kind would be as if it were not there: no end of turn, no BOS."""
        found = self._json(name)
        for key, (kind, words) in SETTINGS.items():
            value = found.get(key)
            if value is None or isinstance(value, kind):
                continue
            if kind is not str or not isinstance(value, dict) or not isinstance(value.get("content"), str):
                said = f"`{key}` is {json.dumps(value)[:80]} (wanted: {words})"
                raise BaseError(said, fix=COPY, path=self.path / name)
        return found

    def _template(self) -> str | None:
        """tokenizer_config.json holds one template, or a list of named ones."""
        value = self.tokenizer_config.get("chat_template")
        if not isinstance(value, str | list | None):
            said = f"`chat_template` is {json.dumps(value)[:80]} (wanted: a text, or a list of named ones)"
            raise BaseError(said, fix=COPY, path=self.path / "tokenizer_config.json")
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
                    fix=COPY,
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
        raise BaseError("model.safetensors is missing", fix="Copy the folder again, whole.", path=self.path)

    def _shard(self, name: str) -> Path:
        file = self.path / name
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise BaseError(
                f"the index names `{name}` (wanted: a .safetensors file in the same folder)",
                fix="Get the model from where it was published: this index is not one that tools write.",
                path=self.path,
            )
        if not file.exists():
            fix = "Copy the folder again, whole."
            raise BaseError(f"the shard {name} that the index names is missing", fix=fix, path=self.path)
        return file


# Tokens that end a turn, for files that name only the end of the text; llama.cpp looks for them too.
TURN_ENDS = ("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>")
CONTROL_TOKEN = 3


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
        shapes = {name: entry.shape for name, entry in self._file.tensors.items()}
        self.row = architecture_of(str(metadata.get("general.architecture")), shapes)
        reading = Reading(self.row, metadata, shapes, self._numbers)
        self.config = self._config(reading)
        self._pieces = pieces(self.row, shapes, reading.qkv_rows)
        self.tensors = {name: self._entry(piece) for name, piece in self._pieces.items()}
        self.tokenizer_config = {}
        self.generation_config = self._end_tokens(metadata)
        template = metadata.get("tokenizer.chat_template")
        self.chat_template = template if isinstance(template, str) else None

    def raw(self, name: str) -> Bytes:
        """The tensor's bytes as they lie in the file; norms to which llama.cpp added 1, without it."""
        piece, entry = self._pieces[name], self.tensors[name]
        raw = self._file.raw(piece.name)
        if added := self.row.added(piece.name):
            if entry.dtype != "F32":
                raise BaseError(f"`{piece.name}` is {entry.dtype} (wanted: F32)", path=self.path)
            # Exact wherever it was added in float32: adding it again gives what the file has.
            return (raw.view("<f4") - np.float32(added)).view(np.uint8)
        whole = self._file.tensors[piece.name]
        first = piece.first * (whole.nbytes // _rows(whole.shape))
        return raw[first : first + entry.nbytes]

    def stacks(self) -> dict[str, list[str]]:
        """The tensors of the file, and the model's tensors that each holds, in order."""
        found: dict[str, dict[int, str]] = {}
        for name, piece in self._pieces.items():
            found.setdefault(piece.name, {})[piece.first] = name
        return {name: [parts[first] for first in sorted(parts)] for name, parts in found.items()}

    def _entry(self, piece: Piece) -> TensorEntry:
        whole = self._file.tensors[piece.name]
        nbytes = whole.nbytes * int(np.prod(piece.shape)) // int(np.prod(whole.shape))
        return whole._replace(shape=piece.shape, nbytes=nbytes)

    def _numbers(self, name: str) -> list[float]:
        """A small tensor's numbers."""
        if self._file.tensors[name].dtype != "F32":
            raise ValueError(f"{name} as F32")
        numbers: list[float] = self._file.raw(name).view("<f4").tolist()
        return numbers

    def entry(self, key: str) -> bytes:
        """A metadata value as it lies in the file, its type in front."""
        return self._file.entry(key)

    def _end_tokens(self, metadata: Mapping[str, Any]) -> dict[str, Any]:
        """The end of the text and the end of a turn or message, where there is more than one."""
        named = [metadata.get(f"tokenizer.ggml.{role}_token_id") for role in ("eos", "eot", "eom")]
        if named[1] is None:
            named += _turn_ends(metadata)
        tokens = list(dict.fromkeys(token for token in named if type(token) is int))
        return {"eos_token_id": tokens} if len(tokens) > 1 else {}

    def release(self) -> None:
        self._file.release()

    def _config(self, reading: Reading) -> dict[str, Any]:
        try:
            return read_config(reading)
        except (KeyError, TypeError, ValueError, ArithmeticError, IndexError) as error:
            named = str(reading.metadata.get("general.architecture"))
            if named not in ARCHITECTURES:
                raise BaseError(
                    f"the architecture `{named}` is not supported",
                    fix=f"Supported: {', '.join(ARCHITECTURES)}.",
                    path=self.path,
                ) from error
            raise BaseError(
                f"the GGUF file does not describe a language model that can be used ({named}: "
                f"{error} is missing or wrong)",
                fix="Download it again, or choose another file of the model.",
                path=self.path,
            ) from error


def _rows(shape: tuple[int, ...]) -> int:
    """How many rows lie one after another; numbers count for themselves."""
    return int(np.prod(shape[:-1])) if len(shape) > 1 else shape[0] if shape else 1


def _turn_ends(metadata: Mapping[str, Any]) -> list[int]:
    tokens, kinds = (metadata.get(f"tokenizer.ggml.{key}") for key in ("tokens", "token_type"))
    if not isinstance(tokens, list) or not isinstance(kinds, list) or len(tokens) != len(kinds):
        return []
    return [n for n, token in enumerate(tokens) if token in TURN_ENDS and kinds[n] == CONTROL_TOKEN]
