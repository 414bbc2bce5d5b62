"""Merging where transformers computes the base: its own model, the update in its weights, saved by it."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from lorimer.bases.open import BaseFiles
from lorimer.lora.layers import Adapter
from lorimer.lora.merge import MergeReport, check_target, untied
from lorimer.model.foreign import quiet
from lorimer.model.foreign_decoder import ForeignDecoder
from lorimer.model.load import TYPES
from lorimer.quant.linear import FrozenLinear
from lorimer.storage import check_space, write_folder

SHARD = "4GB"


def merge_foreign(
    base: BaseFiles,
    decoder: ForeignDecoder,
    adapter: Adapter,
    out: Path,
    *,
    dtype: str,
    extra_files: Mapping[str, bytes],
) -> MergeReport:
    """Write the merged model to the folder `out`, whole or not at all.

    Each weight is W + scale * B A in float32, W as it was trained on, cast once. Raises UserError and
    StorageError as `merge` does.
    """
    check_target(out, dtype)
    size = torch.finfo(TYPES[dtype]).bits // 8
    check_space(out, decoder.shape.numbers * size)
    model, held = decoder.model, {name: p.data for name, p in decoder.model.named_parameters()}
    counts = {"adapted": 0, "same": 0, "numbers": 0}
    tied = model.config.tie_word_embeddings

    def fill(folder: Path) -> None:
        with quiet():
            for name, parameter in model.named_parameters():
                parameter.data = _merged(decoder, adapter, name, parameter.data, TYPES[dtype], counts)
            if untied(decoder.spec, adapter):
                _take_apart(decoder, adapter, TYPES[dtype])
            model.save_pretrained(folder, max_shard_size=SHARD)
        if (file := base.path / "generation_config.json").is_file():
            shutil.copyfile(file, folder / file.name)
        for name, content in extra_files.items():
            (folder / name).write_bytes(content)

    try:
        write_folder(out, fill, manifest=False)
        total = sum(parameter.nbytes for parameter in model.parameters())
    finally:
        if untied(decoder.spec, adapter):
            model.get_submodule(decoder.head.path).weight = model.get_input_embeddings().weight
        model.config.tie_word_embeddings = tied
        for name, parameter in model.named_parameters():
            parameter.data = held[name]
    unchanged = counts["same"] / max(1, counts["numbers"])
    return MergeReport(out, dtype, len(held), counts["adapted"], total, unchanged)


def _merged(
    decoder: ForeignDecoder,
    adapter: Adapter,
    name: str,
    own: Tensor,
    dtype: torch.dtype,
    counts: dict[str, int],
) -> Tensor:
    """A weight or bias of the model with the update in it, as the model has it, on the CPU."""
    module, _, kind = name.rpartition(".")
    linear = decoder.linear(module) if kind == "weight" else None
    if name in adapter.tensors:
        counts["adapted"] += 1
        return adapter.for_files(name).to("cpu", dtype, copy=True)
    if linear is None:
        return own.to("cpu", dtype, copy=True)
    value = cast(FrozenLinear, linear.linear.weight).dequantise(torch.float32).cpu()
    found = value
    if f"{module}.lora_A.weight" in adapter.tensors:
        up_OR, down_RI = (
            adapter.for_files(f"{module}.lora_B.weight"),
            adapter.for_files(f"{module}.lora_A.weight"),
        )
        found = value + adapter.spec.scale(module) * (up_OR @ down_RI).cpu()
        counts["adapted"] += 1
        counts["same"] += int((found.to(dtype) == value.to(dtype)).sum())
        counts["numbers"] += value.numel()
    return (found.t() if decoder.lies_across(module) else found).to(dtype).contiguous()


def _take_apart(decoder: ForeignDecoder, adapter: Adapter, dtype: torch.dtype) -> None:
    """A head of its own, where head and embedding were one and are so no longer."""
    model, names = decoder.model, (decoder.head.path, decoder.embedding.path)
    model.config.tie_word_embeddings = False
    for path in names:
        name = f"{path}.weight"
        base = decoder.embedding.weight.dequantise(torch.float32)
        value = adapter.for_files(name) if name in adapter.tensors else base
        weight = nn.Parameter(value.to("cpu", dtype, copy=True), requires_grad=False)
        model.get_submodule(path).weight = weight
