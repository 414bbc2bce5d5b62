"""Base and update as one GGUF file, with its tokenizer and chat template.

Tensors are merged in float32 from the base's own files, encoded and written one at a time: in memory
are one weight, its update and its encoded bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lorimer.bases.gguf import TensorEntry
from lorimer.bases.gguf_write import data_bytes, encode_value, make_header, write_gguf
from lorimer.bases.mapped import Bytes
from lorimer.bases.open import GgufBase
from lorimer.errors import BaseError, LorimerError, UserError
from lorimer.export.metadata import check_meaning, model_keys
from lorimer.export.mix import FILE_TYPES, Mix
from lorimer.export.source import Source
from lorimer.export.stacks import HEAD, Stack, architecture, divisors, file_stacks, in_file
from lorimer.export.vocabulary import end_of_turn, grown_vocabulary, space_note
from lorimer.lora.merge import merged_tensors
from lorimer.model.grow import GrownBase
from lorimer.quant.gguf_blocks import BLOCKS
from lorimer.quant.gguf_encode import encode, encoded_bytes
from lorimer.storage import check_space, make_folder, write_stream

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
    stacks, lists = file_stacks(source), divisors(source)
    tensors = _plan(source, kind, stacks, lists)
    entries = _entries(source, kind, tensors, lists)
    header = make_header(entries, tensors)
    needed = len(header) + data_bytes(tensors)
    make_folder(out.parent)
    check_space(out, needed)
    counts = {"adapted": 0, "same": 0, "numbers": 0}
    contents = _contents(source, stacks, lists, {tensor.name: tensor.dtype for tensor in tensors}, counts)
    write_stream(out, lambda file: write_gguf(file, header, tensors, contents), needed)
    types: dict[str, int] = {}
    for tensor in tensors:
        types[tensor.dtype] = types.get(tensor.dtype, 0) + 1
    note = None if isinstance(source.file, GgufBase) else space_note(source.tokenizer, source.vocabulary)
    return GgufReport(out, needed, len(tensors), types, counts["adapted"], note)


def _plan(source: Source, kind: str, stacks: list[Stack], lists: Mapping[str, Tensor]) -> list[TensorEntry]:
    """Name, type and shape of every tensor, in the order in which they are computed."""
    spec = source.spec
    experts = 0 if spec.experts is None else spec.experts.count
    tied = all(stack.name != HEAD for stack in stacks)
    mix = Mix(kind, spec.layers, tied, architecture(source)[0], experts)
    shapes = {stack.name: stack.shape for stack in stacks}
    shapes |= {name: tuple(numbers.shape) for name, numbers in lists.items()}
    types = {name: mix.type_of(name, shape) for name, shape in shapes.items()}
    return [
        TensorEntry(name, types[name], shape, encoded_bytes(shape, types[name]))
        for name, shape in shapes.items()
    ]


def _contents(
    source: Source,
    stacks: list[Stack],
    lists: Mapping[str, Tensor],
    types: Mapping[str, str],
    counts: dict[str, int],
) -> Iterator[Bytes]:
    """The bytes of each tensor of the plan, in its order."""
    row, names = architecture(source)[1], [part for stack in stacks for part in stack.parts]
    # Into the numbers that the adapter was trained on.
    given = source.base, source.spec, source.update, torch.float32, counts, source.quant, names
    merged = merged_tensors(*given)
    for stack in stacks:
        raw = []
        for part in stack.parts:
            try:
                raw.append(encode(in_file(source, row, stack, part, next(merged)[1]), types[stack.name]))
            except LorimerError as error:
                raise BaseError(
                    f"`{part}`: {error.problem}", fix=error.fix, path=source.base.path
                ) from error
        yield raw[0] if len(raw) == 1 else np.concatenate(raw)
    # What is left of it checks that the whole adapter was used.
    for _ in merged:
        raise AssertionError
    for numbers in lists.values():
        yield encode(numbers, "F32")


def _entries(
    source: Source, kind: str, tensors: list[TensorEntry], lists: Mapping[str, Tensor]
) -> dict[str, bytes]:
    """The metadata: a GGUF base's own, unchanged, or made from a folder's files."""
    base = source.file
    if isinstance(base, GgufBase):
        kept = base.gguf_metadata or {}
        entries = {key: base.entry(key) for key in kept if not key.startswith(NOT_KEPT)}
        if isinstance(source.base, GrownBase):
            added = grown_vocabulary(kept, source.base, architecture(source)[0])
            entries |= {key: encode_value(value) for key, value in added.items()}
    else:
        keys = model_keys(source)
        check_meaning(source, keys, tensors, lists)
        made = keys | source.vocabulary
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
    return source.base.chat_template if isinstance(source.file, GgufBase) else None
