"""Eight bits a number, a scale for each output row, and the few wild input columns kept in 16 bits.

LLM.int8 (arXiv 2208.07339) rounds activations too, and must look for outliers in them at each call.
Here activations are never rounded, so only the weight's own error counts: a column far larger than
the others would coarsen every row's scale, and is kept apart. The choice is made once, from the weight.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lorimer.quant.part import Part

WILD = 4.0  # times the median of the columns' largest magnitudes
MOST = 64  # at most one column in this many is kept apart


def outlier_columns(weight_OI: Tensor) -> Tensor:
    """The columns to keep apart, ascending: int64 [C]."""
    largest_I = weight_OI.abs().amax(0)
    found = torch.nonzero(largest_I > WILD * largest_I.median()).flatten()
    most = weight_OI.shape[1] // MOST
    if len(found) > most:
        found = found[torch.argsort(largest_I[found], descending=True, stable=True)[:most]]
    return found.sort().values


def quantise(weight: Tensor) -> Part:
    """A weight [O, I] as int8. Its numbers must be finite."""
    weight = weight.float()
    columns = outlier_columns(weight)
    outliers = weight[:, columns].to(torch.bfloat16)
    if len(columns):
        weight = weight.clone()
        weight[:, columns] = 0
    scale = weight.abs().amax(1) / 127
    inverse = torch.where(scale > 0, 1 / scale, 0.0)
    codes = (weight * inverse.unsqueeze(1)).round_().clamp_(-127, 127).to(torch.int8)
    shape = (weight.shape[0], weight.shape[1])
    return Part(
        "int8",
        shape,
        codes.view(torch.uint8),
        row_scale=scale,
        outlier_columns=columns if len(columns) else None,
        outliers=outliers if len(columns) else None,
    )


def numbers(part: Part, first: int, last: int) -> Tensor:
    """Rows first to last as float32 [rows, I]."""
    assert part.row_scale is not None
    codes = part.data.view(torch.int8)[first:last]
    rows = codes.float() * part.row_scale[first:last].unsqueeze(1)
    if part.outlier_columns is not None and part.outliers is not None:
        rows[:, part.outlier_columns] = part.outliers[first:last].float()
    return rows
