"""GGUF files for tests: a tiny model by the gguf package's writer, and headers put together by hand."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

HIDDEN, INNER, VOCAB, HEADS, KV_HEADS, HEAD = 256, 256, 40, 4, 2, 64


def matrix(dtype: str, rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """Random bytes that decode to finite numbers, as [rows, bytes of a row]."""
    elements, size = GGML_QUANT_SIZES[GGMLQuantizationType[dtype]]
    raw = np.random.default_rng(seed).integers(0, 60, (rows, columns // elements * size), np.uint8)
    return np.ascontiguousarray(raw)


def write_model(
    path: Path,
    architecture: str = "llama",
    dtype: str = "Q8_0",
    *,
    extra: Mapping[str, np.ndarray] = {},
    without: Sequence[str] = (),
    metadata: Mapping[str, Any] = {},
    tokens: Sequence[str] = [f"t{n}" for n in range(VOCAB)],
    bare: bool = False,
    fused: bool = False,
) -> Path:
    """One layer in llama.cpp's names; `metadata` adds or replaces plain integers and strings.

    `bare` has the `extra` tensors alone; `fused` query, key and value as one.
    """
    writer = gguf.GGUFWriter(path, architecture)
    numbers: dict[str, Any] = {
        "context_length": 512,
        "embedding_length": HIDDEN,
        "block_count": 1,
        "feed_forward_length": INNER,
        "attention.head_count": HEADS,
        "attention.head_count_kv": KV_HEADS,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": 50_000.0,
    }
    keys: dict[str, Any] = {f"{architecture}.{key}": value for key, value in numbers.items()}
    keys |= {"tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2, "general.license": "mit"}
    for key, value in (keys | dict(metadata)).items():
        if value is None:
            continue
        add_entry(writer, key, value)
    writer.add_array("tokenizer.ggml.tokens", list(tokens))
    writer.add_string("tokenizer.ggml.model", "gpt2")
    if "tokenizer.ggml.pre" not in metadata:
        writer.add_string("tokenizer.ggml.pre", "gpt-2")
    writer.add_string("tokenizer.chat_template", "{{ messages }}")
    shapes = {
        "token_embd": (VOCAB, HIDDEN),
        "blk.0.attn_q": (HEADS * HEAD, HIDDEN),
        "blk.0.attn_k": (KV_HEADS * HEAD, HIDDEN),
        "blk.0.attn_v": (KV_HEADS * HEAD, HIDDEN),
        "blk.0.attn_output": (HIDDEN, HEADS * HEAD),
        "blk.0.ffn_gate": (INNER, HIDDEN),
        "blk.0.ffn_up": (INNER, HIDDEN),
        "blk.0.ffn_down": (HIDDEN, INNER),
    }
    kind = GGMLQuantizationType[dtype]
    parts = [f"blk.0.attn_{part}" for part in "qkv"]
    if fused:
        raw = np.concatenate([matrix(dtype, *shapes[n], list(shapes).index(n)) for n in parts])
        writer.add_tensor("blk.0.attn_qkv.weight", raw, raw_shape=raw.shape, raw_dtype=kind)
        without = [*without, *parts]
    for seed, (name, (rows, columns)) in enumerate(shapes.items()):
        if name not in without and not bare:
            raw = matrix(dtype, rows, columns, seed)
            writer.add_tensor(f"{name}.weight", raw, raw_shape=raw.shape, raw_dtype=kind)
    for name in () if bare else ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        writer.add_tensor(f"{name}.weight", np.full(HIDDEN, 0.5, np.float32))
    for name, value in extra.items():
        writer.add_tensor(name, value)
    return _finished(writer)


def write_vocabulary(path: Path, metadata: Mapping[str, Any], architecture: str = "llama") -> Path:
    """A model of one layer with this vocabulary."""
    tokens = metadata["tokenizer.ggml.tokens"]
    writer = gguf.GGUFWriter(path, architecture)
    sizes = {"context_length": 64, "embedding_length": 32, "block_count": 1, "feed_forward_length": 32}
    sizes |= {"attention.head_count": 1}
    for key, value in ({f"{architecture}.{k}": v for k, v in sizes.items()} | dict(metadata)).items():
        add_entry(writer, key, value)
    writer.add_tensor("token_embd.weight", np.zeros((len(tokens), 32), np.float32))
    return _finished(writer)


def add_entry(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    """Integers unsigned, as llama.cpp's converter writes them."""
    add = {
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        bool: writer.add_bool,
    }
    add.get(type(value), writer.add_array)(key, value)


def _finished(writer: gguf.GGUFWriter) -> Path:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Path(str(writer.path))


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def entry(key: str | bytes, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def info(name: str | bytes, sizes: Sequence[int], kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, kind, offset)


def header(
    entries: Sequence[bytes] = (),
    infos: Sequence[bytes] = (),
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    tensors: int | None = None,
    count: int | None = None,
    data: int = 0,
) -> bytes:
    """A file from parts; `tensors` and `count` lie about how many there are, `data` is its zeros."""
    numbers = (
        version,
        len(infos) if tensors is None else tensors,
        len(entries) if count is None else count,
    )
    start = magic + struct.pack("<IQQ", *numbers) + b"".join(entries) + b"".join(infos)
    return start + bytes(-len(start) % 32) + bytes(data)
