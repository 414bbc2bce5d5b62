"""Eight bits a number, a scale for each output row, and the few wild input columns kept in 16 bits.

LLM.int8 (arXiv 2208.07339) rounds activations too, and must look for outliers in them at each call.
Here activations are never rounded, so only the weight's own error counts: a column far larger than
the others would coarsen every row's scale, and is kept apart. The choice is made once, from the weight.

What is written here in PyTorch says what the native kernels do, and runs where they do not.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lorimer.kernels.native import quantiser
from lorimer.quant.part import Part, Rows, check_finite, inverse_of, whole

WILD = 4.0  # times the median of the columns' largest magnitudes
MOST = 64  # at most one column in this many is kept apart


def outlier_columns(largest_I: Tensor) -> Tensor:
    """The columns to keep apart, by each column's largest magnitude: int64 [C], ascending."""
    found = torch.nonzero(largest_I > WILD * largest_I.median()).flatten()
    most = len(largest_I) // MOST
    if len(found) > most:
        found = found[torch.argsort(largest_I[found], descending=True, stable=True)[:most]]
    return found.sort().values


def quantise(weight: Tensor) -> Part:
    """A weight [O, I] as int8. Raises NotFinite for NaN and infinity."""
    return quantise_rows(whole(weight), (weight.shape[0], weight.shape[1]))


def quantise_rows(rows: Rows, shape: tuple[int, int]) -> Part:
    """The same of a weight that is given by stretches of rows."""
    largest_I = torch.zeros(shape[1])
    for stretch in rows():
        _raise_maxima(largest_I, stretch.contiguous())
    check_finite(largest_I)
    columns = outlier_columns(largest_I)
    codes = torch.empty(shape, dtype=torch.int8)
    scales = torch.empty(shape[0])
    outliers = torch.empty((shape[0], len(columns)), dtype=torch.bfloat16)
    start = 0
    for stretch in rows():
        here = slice(start, start + len(stretch))
        _quantise_stretch(stretch.contiguous(), columns, outliers[here], scales[here], codes[here])
        start += len(stretch)
    return Part(
        "int8",
        shape,
        codes.view(torch.uint8),
        row_scale=scales,
        outlier_columns=columns if len(columns) else None,
        outliers=outliers if len(columns) else None,
    )


def _raise_maxima(largest_I: Tensor, stretch: Tensor) -> None:
    """To the largest magnitude of each column of the stretch."""
    if quantiser.takes(stretch):
        quantiser.column_maxima(stretch, largest_I)
    else:
        torch.maximum(largest_I, stretch.float().abs().amax(0), out=largest_I)


def _quantise_stretch(
    stretch: Tensor, columns: Tensor, outliers: Tensor, scales: Tensor, codes: Tensor
) -> None:
    """Some rows, finite ones, into outliers, scales and codes."""
    if quantiser.takes(stretch):
        quantiser.quantise_int8(stretch, columns, outliers, scales, codes)
        return
    numbers = stretch.to(torch.float32, copy=True)
    outliers[:] = numbers[:, columns].to(torch.bfloat16)
    numbers[:, columns] = 0
    scales[:] = numbers.abs().amax(1) / 127
    codes[:] = numbers.mul_(inverse_of(scales).unsqueeze(1)).round_().clamp_(-127, 127)


def numbers(part: Part, first: int, last: int) -> Tensor:
    """Rows first to last as float32 [rows, I]."""
    assert part.row_scale is not None
    codes = part.data.view(torch.int8)[first:last]
    rows = codes.float() * part.row_scale[first:last].unsqueeze(1)
    if part.outlier_columns is not None and part.outliers is not None:
        rows[:, part.outlier_columns] = part.outliers[first:last].float()
    return rows
