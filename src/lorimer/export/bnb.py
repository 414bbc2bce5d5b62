"""A folder whose projections are in 4 bits as bitsandbytes packs them: base and adapter merged, then
quantised. transformers loads it with bitsandbytes, and lorimer as it is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from lorimer.config import QuantConfig
from lorimer.errors import UserError
from lorimer.export.source import Source
from lorimer.lora.merge import ShardWriter, check_target, merged_config, merged_tensors
from lorimer.model.load import TYPES, is_projected
from lorimer.model.spec import ModelSpec
from lorimer.quant.bnb import config_of, state_tensors
from lorimer.quant.nf4 import quantise
from lorimer.quant.part import FOUR_BIT
from lorimer.storage import check_space, write_folder

NAMES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


@dataclass(frozen=True, slots=True)
class BnbReport:
    """What was written: `quantised` of `tensors` weights are in 4 bits, `adapted` carry the update."""

    path: Path
    kind: str
    tensors: int
    quantised: int
    adapted: int
    bytes: int


def export_bnb(
    source: Source, out: Path, kind: str, dtype: str, extra_files: Mapping[str, bytes]
) -> BnbReport:
    """Write the folder `out`, whole or not at all.

    `kind` is nf4 or fp4; `dtype`, one of fp32, bf16 and fp16, is the type of what stays dense. Blocks are
    those of the adapter's own training where it was of this kind, else of 64 with scales quantised too.

    Raises UserError for a kind that is not known or a folder that is there already, StorageError if it
    cannot be written.
    """
    if kind not in FOUR_BIT:
        raise UserError(f"--type {kind} is not known", fix=f"Known: {', '.join(FOUR_BIT)}.")
    check_target(out, dtype)
    check_space(out, source.base.parameters)
    quant = source.quant if source.quant.kind == kind else QuantConfig(kind=kind)
    counts = {"tensors": 0, "adapted": 0, "same": 0, "numbers": 0, "quantised": 0, "bytes": 0}

    def fill(folder: Path) -> None:
        writer = ShardWriter(folder)
        merged = merged_tensors(
            *(source.base, source.spec, source.update, TYPES[dtype], counts, source.quant)
        )
        for name, value in merged:
            counts["tensors"] += 1
            stored = {name: value}
            if is_projection(source.spec, name, value):
                counts["quantised"] += 1
                part = quantise(value, kind, quant.block_size, double=quant.double)
                stored = state_tensors(name, part, NAMES[dtype])
            for key, tensor in stored.items():
                counts["bytes"] += tensor.nbytes
                writer.add(key, tensor)
        writer.close()
        config = merged_config(source.base, source.spec, source.update, dtype)
        config["quantization_config"] = config_of(quant.model_dump(), NAMES[dtype])
        text = json.dumps(config, indent=2)
        (folder / "config.json").write_text(text + "\n", encoding="utf-8")
        for name, content in extra_files.items():
            (folder / name).write_bytes(content)

    write_folder(out, fill, manifest=False)
    return BnbReport(out, kind, counts["tensors"], counts["quantised"], counts["adapted"], counts["bytes"])


def is_projection(spec: ModelSpec, name: str, value: Tensor) -> bool:
    """What bitsandbytes replaces: the matrices of the layers, never embedding, head, router or norms."""
    return name.startswith(spec.names.layers + ".") and value.dim() == 2 and is_projected(spec, name)
