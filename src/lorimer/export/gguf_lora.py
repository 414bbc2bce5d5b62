"""The update alone as a GGUF file: the adapter that llama.cpp and Ollama put on a GGUF base.

general.type = adapter, adapter.type = lora, adapter.lora.alpha; for each weight NAME of the base the
tensors NAME.lora_a (rank rows) and NAME.lora_b (rank columns). llama.cpp computes
alpha / rank * B A, with one alpha for the whole file.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from torch import Tensor

from lorimer.bases.gguf import TensorEntry
from lorimer.bases.gguf_names import llama_cpp_name
from lorimer.bases.gguf_write import data_bytes, encode_value, make_header, write_gguf
from lorimer.errors import AdapterError, UserError
from lorimer.export.gguf import (
    GgufReport,
    architecture,
    check_family,
    check_target,
    heads_of,
    interleaved,
    interleaves,
)
from lorimer.export.mix import FILE_TYPES
from lorimer.export.source import Source
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
    check_family(source)
    _check_expressible(source)
    alpha, factors = _factors(source)
    dtype = FILE_TYPES[kind].dtype
    tensors = [
        TensorEntry(name, dtype, tuple(value.shape), encoded_bytes(value.shape, dtype))
        for name, value in factors.items()
    ]
    entries = {
        "general.architecture": architecture(source),
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


def _factors(source: Source) -> tuple[float, dict[str, Tensor]]:
    """The file's alpha, and every factor by its name there.

    A weight's own scale times its rank is the alpha that gives that scale; where it is not the file's,
    as with a rank of its own under rsLoRA, its B takes the difference.
    """
    shape, tensors = source.update.spec, source.update.tensors
    alphas = {path: shape.scale(path) * rank for path, rank in shape.ranks.items()}
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    if alpha == 0 or source.adapter is None:
        raise AdapterError("lora_alpha is 0, which llama.cpp takes for 1", fix="Use `--to gguf`.")
    factors = {}
    for path in shape.ranks:
        name = llama_cpp_name(f"{path}.weight")
        if name is None:
            raise AdapterError(f"llama.cpp has no name for `{path}`", path=source.adapter.path)
        up = tensors[f"{path}.lora_B.weight"].float()
        heads = heads_of(source.spec, f"{path}.weight") if interleaves(source) else None
        up = up if heads is None else interleaved(up, heads)
        factors[f"{name}.lora_a"] = tensors[f"{path}.lora_A.weight"].float()
        factors[f"{name}.lora_b"] = up if alphas[path] == alpha else up * (alphas[path] / alpha)
    return alpha, factors
