"""A weight into quantised storage, and back into numbers: one door for every kind.

    numbers   rows of a part as float32, what every product is defined by
    quantise  a weight as nf4, fp4 or int8
    keep      the blocks of a GGUF file as they lie there

Letters: O output features (rows), I input features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lorimer.bases.mapped import Bytes
from lorimer.config import QuantConfig
from lorimer.quant import int8, nf4
from lorimer.quant.gguf_blocks import BLOCKS, block_scales, decoded
from lorimer.quant.part import FOUR_BIT, Part, Rows


def numbers(part: Part, first: int, last: int) -> Tensor:
    """Rows first to last as float32 [rows, I]."""
    if part.kind in FOUR_BIT:
        return nf4.numbers(part, first, last)
    if part.kind == "int8":
        return int8.numbers(part, first, last)
    size, elements, _ = BLOCKS[part.kind]
    row = part.shape[1] // elements * size
    return decoded(part.data.view(-1)[first * row : last * row], part.kind).view(last - first, -1)


def quantise(rows: Rows, shape: tuple[int, int], quant: QuantConfig) -> Part:
    """A weight, given by stretches of rows, as `quant.kind` says: nf4, fp4 or int8. Raises
    NotFinite for NaN and infinity."""
    if quant.kind == "int8":
        return int8.quantise_rows(rows, shape)
    return nf4.quantise_rows(rows, shape, quant.kind, quant.block_size, double=quant.double)


def keep(raw: Bytes, kind: str, shape: tuple[int, int], order: Tensor | None) -> Part:
    """Blocks as they lie in a GGUF file, in memory of their own.

    Row i is row order[i] of the file, if an order is given: a row is whole blocks, so this is exact.
    """
    rows = torch.from_numpy(raw).view(shape[0], -1)
    rows = rows.clone() if order is None else rows.index_select(0, order)
    return Part(kind, shape, rows.flatten())


def is_finite(part: Part) -> bool:
    """Whether no scale is NaN or infinite, so no number is."""
    if part.kind in BLOCKS:
        return bool(torch.isfinite(block_scales(part.data, part.kind)).all())
    scales = (part.absmax, part.absmax_scale, part.row_scale, part.outliers)
    floats = [tensor for tensor in scales if tensor is not None and tensor.is_floating_point()]
    return all(bool(torch.isfinite(tensor).all()) for tensor in floats)
