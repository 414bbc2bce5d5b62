"""Weights as bitsandbytes' checkpoints hold them, in and out, byte for byte.

4 bits (`weight` is uint8, two codes a byte):

    X.weight  X.weight.absmax  X.weight.quant_map  X.weight.quant_state.bitsandbytes__nf4 (or fp4)
    where the scales are quantised too: X.weight.nested_absmax  X.weight.nested_quant_map

The quant state is JSON in a uint8 tensor: quant_type, blocksize, shape, dtype, and nested_blocksize,
nested_dtype, nested_offset. 8 bits: `weight` is int8 [O, I] and `X.SCB` float32 [O], so that a number is
code * SCB / 127.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lorimer.bases.open import BaseFiles
from lorimer.errors import BaseError
from lorimer.quant.nf4 import dynamic_table, table
from lorimer.quant.part import FOUR_BIT, NESTED_BLOCK, Part

STATE = "quant_state.bitsandbytes__"
TYPES = {"F32": torch.float32, "U8": torch.uint8, "I8": torch.int8}
DTYPES = ("float32", "float16", "bfloat16")


def stored_kind(base: BaseFiles, name: str) -> str | None:
    """nf4, fp4 or int8 if a checkpoint holds this weight so, None if it holds plain numbers.

    Raises BaseError for bytes in the place of a weight whose quant state is missing.
    """
    for kind in FOUR_BIT:
        if f"{name}.{STATE}{kind}" in base.tensors:
            return kind
    entry = base.tensors.get(name)
    if base.kind == "gguf" or entry is None or entry.dtype not in ("U8", "I8"):
        return None
    if entry.dtype == "I8":
        return "int8"
    raise _broken(base, f"`{name}` holds bytes, but `{name}.{STATE}nf4` is missing")


def stored_shape(base: BaseFiles, name: str) -> tuple[int, ...]:
    """The weight's own shape [O, I], whatever its bytes have."""
    kind = stored_kind(base, name)
    if kind in FOUR_BIT:
        shape = _state(base, name, str(kind))["shape"]
        return tuple(shape)
    return tuple(base.tensors[name].shape)


def read_part(base: BaseFiles, name: str) -> Part:
    """A weight as its checkpoint holds it, in memory of its own. Raises BaseError."""
    kind = stored_kind(base, name)
    if kind == "int8":
        return _read_int8(base, name)
    assert kind is not None
    state = _state(base, name, kind)
    rows, columns = state["shape"]
    size = state["blocksize"]
    blocks = -(-rows * columns // size)
    data = _tensor(base, name, "U8", (rows * columns + 1) // 2)
    _check_table(base, f"{name}.quant_map", table(kind))
    nested = f"{name}.nested_absmax" in base.tensors
    absmax = _tensor(base, f"{name}.absmax", "U8" if nested else "F32", blocks)
    if not nested:
        return Part(kind, (rows, columns), data, size, absmax)
    if state.get("nested_blocksize") != NESTED_BLOCK or type(state.get("nested_offset")) is not float:
        raise _broken(
            base,
            f"the quant state of `{name}` has nested blocks of {state.get('nested_blocksize')} "
            f"and the offset {state.get('nested_offset')} (wanted: {NESTED_BLOCK} and a number)",
        )
    _check_table(base, f"{name}.nested_quant_map", dynamic_table())
    scale = _tensor(base, f"{name}.nested_absmax", "F32", -(-blocks // NESTED_BLOCK))
    return Part(
        kind, (rows, columns), data, size, absmax, dynamic_table(), scale, float(state["nested_offset"])
    )


def _read_int8(base: BaseFiles, name: str) -> Part:
    rows, columns = base.tensors[name].shape
    scales = f"{name.removesuffix('.weight')}.SCB"
    if scales not in base.tensors:
        raise _broken(base, f"`{name}` holds 8-bit codes, but `{scales}` is missing")
    codes = _tensor(base, name, "I8", rows * columns).view(rows, columns)
    return Part(
        "int8", (rows, columns), codes.view(torch.uint8), row_scale=_tensor(base, scales, "F32", rows) / 127
    )


def _state(base: BaseFiles, name: str, kind: str) -> dict[str, Any]:
    """The JSON of a quant state, what is read of it checked."""
    where = f"{name}.{STATE}{kind}"
    try:
        state = json.loads(bytes(base.raw(where)))
        shape, size = state["shape"], state["blocksize"]
        fits = (
            len(shape) == 2
            and all(type(n) is int and n > 0 for n in shape)
            and type(size) is int
            and 64 <= size <= 4096
            and not size & (size - 1)
            and state["quant_type"] == kind
            and state.get("dtype", "float32") in DTYPES
        )
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise _broken(base, f"`{where}` is not a quant state: {error}") from error
    if not fits:
        raise _broken(
            base,
            f"`{where}` says {state['quant_type']}, blocks of {size}, shape {shape} "
            f"(wanted: {kind}, a power of two from 64 to 4096, two sizes)",
        )
    return dict(state)


def _tensor(base: BaseFiles, name: str, dtype: str, numbers: int) -> Tensor:
    entry = base.tensors.get(name)
    if entry is None:
        raise _broken(base, f"`{name}` is missing")
    if entry.dtype != dtype or int(np.prod(entry.shape)) != numbers:
        raise _broken(
            base,
            f"`{name}` is {entry.dtype} {list(entry.shape)} (wanted: {numbers:,} numbers of {dtype})",
        )
    return torch.from_numpy(base.raw(name).copy()).view(TYPES[dtype])


def _check_table(base: BaseFiles, name: str, wanted: Tensor) -> None:
    if not torch.equal(_tensor(base, name, "F32", len(wanted)), wanted):
        raise _broken(base, f"`{name}` is another table than bitsandbytes writes")


def _broken(base: BaseFiles, what: str) -> BaseError:
    return BaseError(
        f"the quantised checkpoint cannot be read: {what}",
        fix="Download it again, or use the base that was not quantised.",
        path=base.path,
    )


def state_tensors(name: str, part: Part, dtype: str) -> dict[str, Tensor]:
    """What a checkpoint holds for one nf4 or fp4 weight, as bitsandbytes names and packs it.

    `dtype` is the type that it is dequantised to there: float32, float16 or bfloat16.
    """
    assert part.kind in FOUR_BIT, "a checkpoint of 4 bits"
    assert part.absmax is not None
    state: dict[str, Any] = {
        "quant_type": part.kind,
        "blocksize": part.block_size,
        "dtype": dtype,
        "shape": list(part.shape),
    }
    tensors = {
        name: part.data.view(-1, 1),
        f"{name}.absmax": part.absmax,
        f"{name}.quant_map": table(part.kind).clone(),
    }
    if part.absmax_scale is not None:
        state |= {
            "nested_blocksize": NESTED_BLOCK,
            "nested_dtype": "float32",
            "nested_offset": part.absmax_offset,
        }
        tensors[f"{name}.nested_absmax"] = part.absmax_scale
        tensors[f"{name}.nested_quant_map"] = dynamic_table().clone()
    packed = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    return tensors | {f"{name}.{STATE}{part.kind}": packed}


def config_of(quant: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """config.json's `quantization_config` for a folder of such weights."""
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": quant["kind"],
        "bnb_4bit_use_double_quant": quant["double"],
        "bnb_4bit_compute_dtype": dtype,
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": ["lm_head"],
    }
