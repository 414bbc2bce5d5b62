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
from lorimer.lora.merge import MergeReport, check_target, untied, updated
from lorimer.model.foreign import quiet
from lorimer.model.foreign_decoder import ForeignDecoder
from lorimer.model.load import TYPES
from lorimer.quant.linear import DenseLinear, FrozenLinear
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
    if name in adapter.tensors:
        counts["adapted"] += 1
        return adapter.for_files(name).to("cpu", dtype, copy=True)
    linear = decoder.linear(module)
    if kind != "weight" or (linear is None and module not in (decoder.embedding.path, decoder.head.path)):
        return own.to("cpu", dtype, copy=True)
    frozen = cast(FrozenLinear, linear.linear.weight) if linear else DenseLinear(own)
    value = frozen.dequantise(torch.float32)
    found = updated(decoder.spec, module, value, adapter)
    if found is not None:
        counts["adapted"] += 1
        ids = adapter.spec.tokens.get(module)
        changed, before = (part[list(ids)] if ids else part for part in (found, value))
        counts["same"] += int((changed.to(dtype) == before.to(dtype)).sum())
        counts["numbers"] += before.numel()
    merged = value if found is None else found
    return (merged.t() if decoder.lies_across(module) else merged).to("cpu", dtype, copy=True).contiguous()


def _take_apart(decoder: ForeignDecoder, adapter: Adapter, dtype: torch.dtype) -> None:
    """A head of its own, where head and embedding were one and are so no longer."""
    model, base = decoder.model, decoder.embedding.weight.dequantise(torch.float32)
    model.config.tie_word_embeddings = False
    for path in (decoder.head.path, decoder.embedding.path):
        name = f"{path}.weight"
        trained = name in adapter.tensors
        value = adapter.for_files(name) if trained else updated(decoder.spec, path, base, adapter)
        value = base if value is None else value
        weight = nn.Parameter(value.to("cpu", dtype, copy=True), requires_grad=False)
        model.get_submodule(path).weight = weight
