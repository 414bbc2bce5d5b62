"""Which tensors a GGUF file of the model has, which weights each holds, and how they lie in it.

The names, stacks and numbers are those of bases/gguf_names.py the other way round, the order of rows that
of model/order.py. A GGUF base keeps its own tensors.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lorimer.bases.gguf_names import (
    DIVISORS,
    FACTORS,
    FREQUENCIES,
    Architecture,
    architecture_for,
    llama_cpp_name,
    stacks,
)
from lorimer.bases.open import GgufBase
from lorimer.errors import BaseError
from lorimer.export.source import Source
from lorimer.lora.merge import embedding_name, head_name, merged_names, stored_name, untied
from lorimer.model.load import read_weight, stored_shape
from lorimer.model.order import gguf_order
from lorimer.model.rope import frequencies, plain_frequencies

HEAD = "output.weight"


class Stack(NamedTuple):
    """A tensor of a GGUF file: the weights in it, one after another, and its shape."""

    name: str
    parts: list[str]
    shape: tuple[int, ...]


def architecture(source: Source) -> tuple[str, Architecture]:
    """llama.cpp's name for the architecture, and its row. Raises BaseError if llama.cpp has none."""
    base, family = source.file, source.spec.family
    if isinstance(base, GgufBase):
        return str((base.gguf_metadata or {}).get("general.architecture")), base.row
    found = architecture_for(family, base.tensors)
    if found is None:
        raise BaseError(
            f"llama.cpp has no architecture for `{family}`", fix="Use `--to merged`.", path=base.path
        )
    return found


def file_stacks(source: Source) -> list[Stack]:
    """The tensors with weights, in the order of the base's.

    Raises BaseError for a weight that llama.cpp has no name for.
    """
    base, spec = source.base, source.spec
    row, tied = architecture(source)[1], spec.tied_head and not untied(spec, source.update)
    # A tied head that the base has is a copy of the embedding, which the model does not read.
    copy = head_name(spec) if tied else None
    names = [name for name in merged_names(base, spec, source.update) if name != copy]
    for name in names:
        _check_name(source, row, name)
    own = stacks(row, names)
    if isinstance(source.file, GgufBase):
        own = {name: parts for name, parts in source.file.stacks().items() if name not in DIVISORS} | {
            name: parts for name, parts in own.items() if name == HEAD
        }
    found = [Stack(name, parts, _shape(source, row, name, parts)) for name, parts in own.items()]
    if tied and row.head == "own":
        embedding = embedding_name(spec)
        found.append(Stack(HEAD, [embedding], _shape(source, row, HEAD, [embedding])))
    return found


def _check_name(source: Source, row: Architecture, name: str) -> None:
    known = llama_cpp_name(name, row)
    path = source.base.path
    if known is None:
        raise BaseError(f"llama.cpp has no name for the weight `{name}`", path=path)
    if known == HEAD and row.head == "tied":
        raise BaseError(
            "llama.cpp takes the embedding for the head in this architecture, and here they differ",
            fix="Use `--to merged`.",
            path=path,
        )
    if isinstance(source.file, GgufBase) or not known.endswith(".bias"):
        return
    module = known.split(".")[-2]
    if not module.endswith(("norm", "norm_2")) and module not in row.biases:
        raise BaseError(
            f"llama.cpp has no place for the bias `{name}` in this architecture",
            fix="Use `--to merged`.",
            path=path,
        )


def _shape(source: Source, row: Architecture, name: str, parts: list[str]) -> tuple[int, ...]:
    base, spec = source.base, source.spec
    shapes = [stored_shape(base, spec, stored_name(base, spec, part)) for part in parts]
    if is_stacked(row, name):
        return len(parts), *shapes[0]
    return sum(shape[0] for shape in shapes), *shapes[0][1:]


def is_stacked(row: Architecture, name: str) -> bool:
    """Whether the weights of this tensor have a dimension of their own: experts, norms of heads."""
    return "{}" in row.layer.get(name.split(".")[-2], "")


def in_file(source: Source, row: Architecture, stack: Stack, part: str, value: Tensor) -> Tensor:
    """A weight, or an adapter's factor with the same rows, as it lies in the file."""
    order = gguf_order(source.spec, part)
    rows = value if order is None else value.index_select(0, order.argsort())
    added = row.added(stack.name)
    return rows + added if added else rows


def divisors(source: Source) -> dict[str, Tensor]:
    """What llama.cpp divides each frequency by: lists that the base has, Llama 3.1's, LongRoPE's two.

    Raises BaseError for a scaling that llama.cpp does not compute in this architecture.
    """
    base, rope, spec = source.base, source.spec.rope, source.spec
    if isinstance(source.file, GgufBase):
        return {name: read_weight(base, spec, name) for name in DIVISORS if name in base.tensors}
    found = {}
    if rope.kind == "llama3":
        found = {FREQUENCIES: plain_frequencies(rope) / frequencies(rope, 1)[0]}
    if rope.kind == "longrope":
        given = rope.settings["long_factor"], rope.settings["short_factor"]
        found = {
            name: torch.tensor(part, dtype=torch.float32) for name, part in zip(FACTORS, given, strict=True)
        }
    if not set(found) <= set(architecture(source)[1].divisors):
        raise no_scaling(source)
    return found


def no_scaling(source: Source) -> BaseError:
    return BaseError(
        f"llama.cpp cannot compute the rope scaling `{source.spec.rope.kind}` in this architecture",
        fix="Use `--to merged`.",
        path=source.base.path,
    )
