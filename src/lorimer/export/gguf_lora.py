"""The update alone as a GGUF file: the adapter that llama.cpp and Ollama put on a GGUF base.

general.type = adapter, adapter.type = lora, adapter.lora.alpha; for each weight NAME of the base the
tensors NAME.lora_a (rank rows) and NAME.lora_b (rank columns). llama.cpp computes
alpha / rank * B A, with one alpha for the whole file. Stacked experts have stacked factors; where a file
has query, key and value as one and the model has three, the factors of the three stand side by side.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lorimer.bases.gguf import TensorEntry
from lorimer.bases.gguf_write import data_bytes, encode_value, make_header, write_gguf
from lorimer.errors import AdapterError, UserError
from lorimer.export.gguf import GgufReport, check_target
from lorimer.export.mix import FILE_TYPES
from lorimer.export.source import Source
from lorimer.export.stacks import Stack, architecture, file_stacks, in_file, is_stacked
from lorimer.model.order import adapted_module
from lorimer.quant.gguf_encode import encode, encoded_bytes
from lorimer.storage import check_space, make_folder, write_stream

KINDS = ("f32", "f16", "bf16")


def export_gguf_lora(source: Source, out: Path, kind: str = "f32") -> GgufReport:
    """Write the adapter to `out`, whole or not at all; `kind` is f32, f16 or bf16.

    Raises AdapterError for what such a file cannot hold, UserError for a wrong name or type, StorageError
    if it cannot be written.
    """
    if kind not in KINDS:
        raise UserError(f"the type `{kind}` is not one for an adapter", fix=f"Known: {', '.join(KINDS)}.")
    check_target(out)
    _check_expressible(source)
    alpha, factors = _factors(source)
    dtype = FILE_TYPES[kind].dtype
    tensors = [
        TensorEntry(name, dtype, tuple(value.shape), encoded_bytes(value.shape, dtype))
        for name, value in factors.items()
    ]
    entries = {
        "general.architecture": architecture(source)[0],
        "general.type": "adapter",
        "general.name": source.name,
        "general.file_type": FILE_TYPES[kind].number,
        "adapter.type": "lora",
        "adapter.lora.alpha": alpha,
    }
    header = make_header({key: encode_value(value) for key, value in entries.items()}, tensors)
    needed = len(header) + data_bytes(tensors)
    make_folder(out.parent)
    check_space(out, needed)
    contents = (encode(value, dtype) for value in factors.values())
    write_stream(out, lambda file: write_gguf(file, header, tensors, contents), needed)
    return GgufReport(out, needed, len(tensors), {dtype: len(tensors)}, len(tensors) // 2)


def _check_expressible(source: Source) -> None:
    if source.adapter is None:
        raise AdapterError(
            "this is a base without an adapter: there is none to export",
            fix="Name a run or an adapter, or use `--to gguf`.",
            path=source.base.path,
        )
    spec, names = source.spec, source.spec.names
    own = {names.embedding} | ({names.head} if spec.tied_head else set())
    others = [
        name for name in source.update.tensors if ".lora_" not in name or name.partition(".lora_")[0] in own
    ]
    if others:
        raise AdapterError(
            "an adapter file of llama.cpp holds LoRA factors alone, of linear weights; this one trained "
            f"`{others[0]}`" + (f" and {len(others) - 1} more" if others[1:] else ""),
            fix="Use `--to gguf`, which merges them into one model.",
            path=source.adapter.path,
        )


class Factors(NamedTuple):
    """Of one weight: A and B as the file has them, and what B A is multiplied by."""

    down_RI: Tensor
    up_OR: Tensor
    scale: float

    @property
    def alpha(self) -> float:
        return self.scale * len(self.down_RI)


def _factors(source: Source) -> tuple[float, dict[str, Tensor]]:
    """The file's alpha, and every factor by its name there.

    A weight's own scale times its rank is the alpha that gives that scale; where it is not the file's,
    as with a rank of its own under rsLoRA, its B takes the difference.
    """
    stacks = {stack.name: stack for stack in file_stacks(source)}
    found = {name: parts for name, stack in stacks.items() if any(parts := _of_stack(source, stack))}
    alphas = Counter(part.alpha for parts in found.values() for part in parts if part is not None)
    alpha = alphas.most_common(1)[0][0]
    if alpha == 0:
        raise AdapterError("lora_alpha is 0, which llama.cpp takes for 1", fix="Use `--to gguf`.")
    row, factors = architecture(source)[1], {}
    for name, parts in found.items():
        join = _stacked if is_stacked(row, name) else _beside
        factors[f"{name}.lora_a"], factors[f"{name}.lora_b"] = join(source, stacks[name], parts, alpha)
    return alpha, factors


def _of_stack(source: Source, stack: Stack) -> list[Factors | None]:
    """The factors of each weight of a tensor, None where it has none."""
    return [_of_weight(source, stack, part) for part in stack.parts]


def _of_weight(source: Source, stack: Stack, name: str) -> Factors | None:
    spec, tensors = source.update.spec, source.update.tensors
    module, part, parts = adapted_module(source.spec, name)
    if module not in spec.ranks or not name.endswith(".weight"):
        return None
    up_OR = tensors[f"{module}.lora_B.weight"].float().chunk(parts)[part]
    up_OR = in_file(source, architecture(source)[1], stack, name, up_OR)
    return Factors(tensors[f"{module}.lora_A.weight"].float(), up_OR, spec.scale(module))


def _beside(
    source: Source, stack: Stack, parts: list[Factors | None], alpha: float
) -> tuple[Tensor, Tensor]:
    """All A below each other, and each B at its rows and its A's columns."""
    given = [part for part in parts if part is not None]
    rank = sum(len(part.down_RI) for part in given)
    down_RI = torch.cat([part.down_RI for part in given])
    ups = []
    for name, part in zip(stack.parts, parts, strict=True):
        rows = source.base.tensors[name].shape[0]
        ups.append(torch.zeros(rows, 0) if part is None else _scaled(part, alpha, rank))
    return down_RI, ups[0] if len(ups) == 1 else torch.block_diag(*ups)


def _stacked(
    source: Source, stack: Stack, parts: list[Factors | None], alpha: float
) -> tuple[Tensor, Tensor]:
    """One after another, filled up with zeros to the largest rank."""
    rank = max(len(part.down_RI) for part in parts if part is not None)
    _, rows, inputs = stack.shape
    down_ERI, up_EOR = torch.zeros(len(parts), rank, inputs), torch.zeros(len(parts), rows, rank)
    for number, part in enumerate(parts):
        if part is not None:
            own = len(part.down_RI)
            down_ERI[number, :own] = part.down_RI
            up_EOR[number, :, :own] = _scaled(part, alpha, rank)
    return down_ERI, up_EOR


def _scaled(part: Factors, alpha: float, rank: int) -> Tensor:
    """B such that alpha / rank * B A is the part's own update."""
    own = part.scale * rank
    return part.up_OR if own == alpha else part.up_OR * (own / alpha)
