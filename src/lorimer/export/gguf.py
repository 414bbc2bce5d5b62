"""Base and update as one GGUF file, with its tokenizer and chat template.

Tensors are merged in float32 from the base's own files, encoded and written one at a time: in memory
are one weight, its update and its encoded bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lorimer.bases.gguf import TensorEntry
from lorimer.bases.gguf_names import llama_cpp_name
from lorimer.bases.gguf_write import data_bytes, encode_value, make_header, write_gguf
from lorimer.bases.mapped import Bytes
from lorimer.bases.open import BaseFiles, GgufBase
from lorimer.errors import BaseError, LorimerError, UserError
from lorimer.export.mix import FILE_TYPES, tensor_type
from lorimer.export.source import Source
from lorimer.export.vocabulary import end_of_turn, grown_vocabulary, space_note
from lorimer.lora.merge import embedding_name, head_name, merged_tensors, untied
from lorimer.model.grow import GrownBase
from lorimer.model.load import stored_shape
from lorimer.model.rope import frequencies, plain_frequencies
from lorimer.model.spec import ModelSpec
from lorimer.quant.gguf_blocks import BLOCKS
from lorimer.quant.gguf_encode import encode, encoded_bytes
from lorimer.storage import check_space, make_folder, write_stream

ROPE_DIVISORS = "rope_freqs.weight"
WRITTEN = ("llama", "mistral", "qwen2", "qwen3")
# llama.cpp's layout of the blocks; it refuses quantised files without it.
QUANTISATION_VERSION = 2
# Keys of a base's file that are not true of the merged one.
NOT_KEPT = ("general.file_type", "general.quantization_version", "split.", "quantize.")


@dataclass(frozen=True, slots=True)
class GgufReport:
    """What was written: `types` counts the tensors of each type."""

    path: Path
    bytes: int
    tensors: int
    types: dict[str, int]
    adapted: int
    note: str | None = None


def file_of(source: Source) -> BaseFiles:
    """The base as its files are, without tokens that were added."""
    return source.base.inner if isinstance(source.base, GrownBase) else source.base


def architecture(source: Source) -> str:
    """llama.cpp's name for the architecture: Mistral is Llama to it."""
    if isinstance(file_of(source), GgufBase):
        return source.spec.family
    return "llama" if source.spec.family == "mistral" else source.spec.family


def interleaves(source: Source) -> bool:
    """Whether llama.cpp turns neighbouring features, so that query and key rows lie interleaved."""
    return source.spec.family in ("llama", "mistral")


def interleaved(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Query or key rows in llama.cpp's order: of each head 0, h/2, 1, h/2 + 1, ..."""
    halves: torch.Tensor = rows.unflatten(0, (heads, 2, -1))
    return halves.transpose(1, 2).reshape(rows.shape)


def heads_of(spec: ModelSpec, name: str) -> int | None:
    """The heads of a query or key projection's weight, bias or factor; None for any other."""
    return {"q_proj": spec.heads, "k_proj": spec.kv_heads}.get(name.split(".")[-2])


def check_family(source: Source) -> None:
    """Raise BaseError for an architecture whose form in llama.cpp is read, and not written yet."""
    if source.spec.family not in WRITTEN:
        raise BaseError(
            f"`{source.spec.family}` cannot be written as a GGUF file (can: {', '.join(WRITTEN)})",
            fix="Use `--to merged`, and llama.cpp's convert_hf_to_gguf.py on that folder.",
            path=source.base.path,
        )


def check_target(out: Path) -> None:
    """Raise UserError unless a new GGUF file can be made at `out`."""
    if out.suffix != ".gguf":
        raise UserError(f"`{out.name}` should end in .gguf", fix="Ollama goes by the ending.", path=out)
    if out.exists():
        raise UserError(
            "there is something there already", fix="Choose another --out, or delete it.", path=out
        )


def export_gguf(source: Source, out: Path, kind: str) -> GgufReport:
    """Write the merged model to `out` in this kind (a key of FILE_TYPES), whole or not at all.

    Raises UserError or BaseError for what a GGUF file cannot say, StorageError if it cannot be written.
    """
    if kind not in FILE_TYPES:
        raise UserError(f"the type `{kind}` is not known", fix=f"Known: {', '.join(FILE_TYPES)}.")
    check_target(out)
    check_family(source)
    tensors = _plan(source, kind)
    entries = _entries(source, kind, tensors)
    header = make_header(entries, tensors)
    needed = len(header) + data_bytes(tensors)
    make_folder(out.parent)
    check_space(out, needed)
    counts = {"adapted": 0, "same": 0, "numbers": 0}
    contents = _contents(source, tensors, counts)
    write_stream(out, lambda file: write_gguf(file, header, tensors, contents), needed)
    types: dict[str, int] = {}
    for tensor in tensors:
        types[tensor.dtype] = types.get(tensor.dtype, 0) + 1
    note = (
        None if isinstance(file_of(source), GgufBase) else space_note(source.tokenizer, source.vocabulary)
    )
    return GgufReport(out, needed, len(tensors), types, counts["adapted"], note)


def _names(source: Source) -> Iterator[tuple[str, str]]:
    """The names of the weights that are written: Hugging Face's and llama.cpp's."""
    apart = untied(source.spec, source.update)
    for name in source.base.tensors:
        if name == head_name(source.spec) and source.spec.tied_head and not apart:
            continue  # a copy of the embedding that the model does not read
        known = llama_cpp_name(name)
        if known is not None:
            yield name, known
        elif name.endswith((".weight", ".bias")) and name != ROPE_DIVISORS:
            raise BaseError(f"llama.cpp has no name for the weight `{name}`", path=source.base.path)
    head = head_name(source.spec)
    if apart and head not in source.base.tensors:
        yield head, "output.weight"


def _plan(source: Source, kind: str) -> list[TensorEntry]:
    """Name, type and shape of every tensor, in the order in which they are computed."""
    tied = source.spec.tied_head and not untied(source.spec, source.update)
    tensors = []
    for own, name in _names(source):
        stored = own if own in source.base.tensors else embedding_name(source.spec)
        shape = stored_shape(source.base, source.spec, stored)
        dtype = tensor_type(name, shape, kind, layers=source.spec.layers, tied=tied)
        tensors.append(TensorEntry(name, dtype, shape, encoded_bytes(shape, dtype)))
    divisors = _rope_divisors(source)
    if divisors is not None:
        tensors.append(TensorEntry(ROPE_DIVISORS, "F32", tuple(divisors.shape), divisors.nbytes))
    return tensors


def _contents(source: Source, tensors: list[TensorEntry], counts: dict[str, int]) -> Iterator[Bytes]:
    """The bytes of each tensor of the plan, in its order."""
    wanted = dict(_names(source))
    types = {tensor.name: tensor.dtype for tensor in tensors}
    # Into the numbers that the adapter was trained on.
    given = source.base, source.spec, source.update, torch.float32, counts, source.quant
    for name, value in merged_tensors(*given):
        if name not in wanted:
            continue
        heads = heads_of(source.spec, name) if interleaves(source) else None
        rows = value if heads is None else interleaved(value, heads)
        try:
            yield encode(rows, types[wanted[name]])
        except LorimerError as error:
            raise BaseError(f"`{name}`: {error.problem}", fix=error.fix, path=source.base.path) from error
    divisors = _rope_divisors(source)
    if divisors is not None:
        yield encode(divisors, "F32")


def _rope_divisors(source: Source) -> torch.Tensor | None:
    """What llama.cpp divides each frequency by, for Llama 3.1's scaling and a file that has such a list."""
    rope = source.spec.rope
    if rope.kind != "llama3" and ROPE_DIVISORS not in source.base.tensors:
        return None
    return plain_frequencies(rope) / frequencies(rope, 1)[0]


def _entries(source: Source, kind: str, tensors: list[TensorEntry]) -> dict[str, bytes]:
    """The metadata: a GGUF base's own, unchanged, or made from a folder's files."""
    base = file_of(source)
    if isinstance(base, GgufBase):
        kept = base.gguf_metadata or {}
        entries = {key: base.entry(key) for key in kept if not key.startswith(NOT_KEPT)}
        if isinstance(source.base, GrownBase):
            added = grown_vocabulary(kept, source.base, architecture(source))
            entries |= {key: encode_value(value) for key, value in added.items()}
    else:
        made = _described(source) | source.vocabulary
        made |= end_of_turn(source.tokenizer, source.template.end_ids)
        entries = {key: encode_value(value) for key, value in made.items()}
    if not source.template.is_default and source.template.source != base_template(source):
        entries["tokenizer.chat_template"] = encode_value(source.template.source)
    entries["general.file_type"] = encode_value(FILE_TYPES[kind].number)
    if any(tensor.dtype in BLOCKS for tensor in tensors):
        entries["general.quantization_version"] = encode_value(QUANTISATION_VERSION)
    return entries


def base_template(source: Source) -> str | None:
    """The chat template that the metadata has already."""
    return source.base.chat_template if isinstance(file_of(source), GgufBase) else None


def _described(source: Source) -> dict[str, Any]:
    """general.* and the architecture's keys, out of a folder's config."""
    spec, name = source.spec, architecture(source)
    if spec.rope.dimensions != spec.head_dim:
        raise BaseError(
            "llama.cpp cannot turn a part of each head in this architecture", path=source.base.path
        )
    # llama.cpp has no sliding window for these architectures; within one window it makes no difference.
    windows = [size for layer in range(spec.layers) if (size := spec.window(layer))]
    keys: dict[str, Any] = {
        "block_count": spec.layers,
        "context_length": min([spec.max_positions, *windows]),
        "embedding_length": spec.hidden_size,
        "feed_forward_length": spec.intermediate_size,
        "attention.head_count": spec.heads,
        "attention.head_count_kv": spec.kv_heads,
        "attention.key_length": spec.head_dim,
        "attention.value_length": spec.head_dim,
        "attention.layer_norm_rms_epsilon": float(spec.norm_eps),
        "rope.freq_base": float(spec.rope.theta),
        "rope.dimension_count": spec.rope.dimensions,
        "vocab_size": spec.vocab_size,
    }
    keys |= _rope_scaling(source)
    general = {"general.architecture": name, "general.type": "model", "general.name": source.name}
    if isinstance(source.base.config.get("license"), str):
        general["general.license"] = source.base.config["license"]
    return general | {f"{name}.{key}": value for key, value in keys.items()}


def _rope_scaling(source: Source) -> dict[str, Any]:
    rope = source.spec.rope
    if rope.kind in ("default", "llama3"):
        return {}
    if rope.kind not in ("linear", "yarn"):
        raise BaseError(
            f"llama.cpp cannot compute the rope scaling `{rope.kind}` in this architecture",
            fix="Use `--to merged`.",
            path=source.base.path,
        )
    scaling: dict[str, Any] = {"rope.scaling.type": rope.kind}
    if rope.kind == "linear":
        return scaling | {"rope.scaling.factor": float(rope.settings["factor"])}
    original = int(rope.settings["original_max_position_embeddings"])
    return scaling | {
        "rope.scaling.original_context_length": original,
        "rope.scaling.factor": float(rope.settings.get("factor") or rope.max_positions / original),
    }
