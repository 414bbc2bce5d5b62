"""Products, rows and the loss head of quantised weights in C++, with the words of PyTorch around them.

A weight is decoded stretch by stretch where a product packs it, each number in float32 and rounded once
to the type of the states: the product is that of the dequantised weight, which never exists.

Letters: M rows, N columns, K summed over, O outputs, I inputs, T ids.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from lorimer.kernels import workspace
from lorimer.kernels.codes import BLOCKS, CODES, KINDS
from lorimer.kernels.native.library import REFERENCE, TYPES, Kernel, active
from lorimer.kernels.native.matmul import BF16, _check_labels, _rows

_matmul = Kernel(
    "quantised_matmul", "pl" + "pli" + "l" + "pl" + "pli" + "l" + "p" + "pl" + "pli" + "pl" + "llfii"
)
_head_loss = Kernel("quantised_head_loss", "plplpppl" + "llfffii")
_read_rows = Kernel("quantised_rows", "plplll" + "pii")


class Part(Protocol):
    """Rows of a weight in one storage; see quant/part.py for the meaning of each field."""

    @property
    def kind(self) -> str: ...
    @property
    def shape(self) -> tuple[int, int]: ...
    @property
    def data(self) -> Tensor: ...
    @property
    def block_size(self) -> int: ...
    @property
    def absmax(self) -> Tensor | None: ...
    @property
    def absmax_table(self) -> Tensor | None: ...
    @property
    def absmax_scale(self) -> Tensor | None: ...
    @property
    def absmax_offset(self) -> float: ...
    @property
    def row_scale(self) -> Tensor | None: ...
    @property
    def outlier_columns(self) -> Tensor | None: ...
    @property
    def outliers(self) -> Tensor | None: ...


class Weight:
    """Parts stacked by rows, described once for the kernels; keeps them alive.

    Raises AssertionError for a part whose tensors do not have the sizes that its shape asks for:
    otherwise memory would be read as what it is not.
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = tuple(parts)
        assert self.parts, "a weight of no parts"
        self.shape = (sum(part.shape[0] for part in self.parts), self.parts[0].shape[1])
        assert all(part.shape[1] == self.shape[1] for part in self.parts), "parts of different widths"
        self.words = torch.tensor([_describe(part) for part in self.parts], dtype=torch.int64)
        # A tape keeps the tensors of its calls, so this one keeps those that it has the addresses of.
        self.words.parts = self.parts  # type: ignore[attr-defined]


def _address(tensor: Tensor | None, dtype: torch.dtype, numbers: int) -> int:
    assert tensor is not None, "a part without its scales"
    assert tensor.is_cpu, "not in the memory of the CPU"
    assert tensor.is_contiguous(), "a part in pieces"
    assert tensor.dtype == dtype, f"{tensor.dtype} where {dtype} belongs"
    assert tensor.numel() == numbers, f"{tensor.numel()} numbers where {numbers} belong"
    return tensor.data_ptr()


def _describe(part: Part) -> list[int]:
    """The fifteen words of struct Part in quantised.hpp."""
    rows, columns = part.shape
    if part.kind in BLOCKS:
        size, numbers = BLOCKS[part.kind]
        assert columns % numbers == 0, "rows are not whole blocks"
        data = _address(part.data, torch.uint8, rows * columns // numbers * size)
        return [KINDS.index(part.kind), rows, columns, data] + [0] * 11
    if part.kind == "int8":
        data = _address(part.data, torch.uint8, rows * columns)
        scale = _address(part.row_scale, torch.float32, rows)
        return [1, rows, columns, data, 0, 0, 0, 0, 0, scale, *_outliers(part), 0]
    table = CODES[part.kind].data_ptr()
    data = _address(part.data, torch.uint8, (rows * columns + 1) // 2)
    assert part.block_size > 0, "blocks of no numbers"
    blocks = -(-rows * columns // part.block_size)
    if part.absmax_table is None:
        absmax = _address(part.absmax, torch.float32, blocks)
        return [0, rows, columns, data, part.block_size, absmax, *[0] * 8, table]
    absmax = _address(part.absmax, torch.uint8, blocks)
    nested = _address(part.absmax_table, torch.float32, 256)
    scale = _address(part.absmax_scale, torch.float32, -(-blocks // 256))
    offset = struct.unpack("<i", struct.pack("<f", part.absmax_offset))[0]
    return [0, rows, columns, data, part.block_size, absmax, nested, scale, offset, *[0] * 5, table]


def _outliers(part: Part) -> list[int]:
    columns, numbers = part.outlier_columns, part.outliers
    if columns is None or numbers is None or not columns.numel():
        return [0, 0, 0, 0]
    count = columns.numel()
    assert bool(((columns >= 0) & (columns < part.shape[1])).all()), "an outlier outside the weight"
    assert count == 1 or bool((columns.diff() > 0).all()), "outlier columns are not ascending"
    assert numbers.dtype in TYPES, "outliers of this type"
    at = _address(columns, torch.int64, count), _address(numbers, numbers.dtype, part.shape[0] * count)
    return [at[0], count, at[1], int(numbers.dtype == BF16)]


def able(parts: Sequence[Part], dtype: torch.dtype) -> bool:
    """Whether the native kernels run here and take these parts, for states of this type."""
    kinds = {"nf4", "fp4", "int8", *BLOCKS}
    return (
        dtype in TYPES
        and active() != REFERENCE
        and all(part.kind in kinds and part.data.is_cpu for part in parts)
    )


def _weight(parts: Sequence[Part] | Weight) -> Weight:
    return parts if isinstance(parts, Weight) else Weight(parts)


def matmul(
    a: Tensor,
    parts: Sequence[Part] | Weight,
    *,
    turned: bool,
    a2: Tensor | None = None,
    b2: Tensor | None = None,
    b2_turned: bool = False,
    bias_N: Tensor | None = None,
    onto: Tensor | None = None,
    out: Tensor | None = None,
    alpha: float = 1.0,
    spans: Tensor | None = None,
) -> Tensor:
    """alpha * (a W^T + a2 b2) + bias + onto if `turned`, else with a W: [M, O] or [M, I].

    As matmul.matmul with the dequantised weight, to the same bounds. `spans` belong to b2.
    """
    weight = _weight(parts)
    a, a_stride = _rows(a)
    m, k = a.shape
    rows, columns = weight.shape
    n = rows if turned else columns
    a2_stride = b2_stride = onto_stride = k2 = 0
    if a2 is not None and b2 is not None:
        a2, a2_stride = _rows(a2)
        b2, b2_stride = _rows(b2)
        k2 = a2.shape[1]
    if onto is not None:
        onto, onto_stride = _rows(onto)
    if out is None:
        out = workspace.empty((m, n), a.dtype)
    # Otherwise memory would be read as what it is not.
    assert a.dtype in TYPES, "states of this type"
    assert k == (columns if turned else rows), "a and the weight do not fit"
    assert (a2 is None) == (b2 is None), "half a second product"
    assert a2 is None or a2.shape == (m, k2), "a2"
    assert b2 is None or b2.shape == ((n, k2) if b2_turned else (k2, n)), "b2"
    assert out.shape == (m, n), "out"
    assert out.stride(1) == 1 or n < 2, "the rows of out lie in pieces"
    assert all(t is None or t.dtype == a.dtype for t in (a2, b2, bias_N)), "one type for all operands"
    assert out.dtype in (a.dtype, torch.float32), "out's type"
    assert onto is None or (onto.dtype == out.dtype and onto.shape == out.shape), "onto is not like out"
    assert bias_N is None or (bias_N.is_contiguous() and bias_N.shape == (n,)), "the bias"
    _matmul(
        *(a, a_stride, weight.words, len(weight.parts), turned, k),
        *(a2, a2_stride, b2, b2_stride, b2_turned, k2),
        *(bias_N, onto, onto_stride),
        *(out, out.stride(0), out.dtype == torch.float32),
        *(spans, 0 if spans is None else spans.shape[0]),
        *(m, n, alpha, a.dtype == BF16, torch.get_num_threads()),
    )
    return out


def dequantise(
    part: Part | Weight, first_row: int, last_row: int, dtype: torch.dtype, out: Tensor | None = None
) -> Tensor:
    """Rows first_row..last_row as numbers: [rows, I] in bf16 or fp32."""
    weight = part if isinstance(part, Weight) else Weight([part])
    assert 0 <= first_row <= last_row <= weight.shape[0], "rows outside the weight"
    count = last_row - first_row
    if out is None:
        out = torch.empty((count, weight.shape[1]), dtype=dtype)
    assert dtype in TYPES, "numbers of this type"
    assert out.dtype == dtype, "out's type"
    assert out.is_contiguous(), "out lies in pieces"
    assert out.shape == (count, weight.shape[1]), "out's shape"
    _call_rows(weight, None, first_row, count, out)
    return out


def rows(parts: Sequence[Part] | Weight, ids_T: Tensor, dtype: torch.dtype) -> Tensor:
    """The rows at these indices, as for an embedding: [T, I]. Raises IndexError for one outside."""
    weight = _weight(parts)
    ids_T = ids_T.to(torch.int64).contiguous()
    if ids_T.numel() and (int(ids_T.min()) < 0 or int(ids_T.max()) >= weight.shape[0]):
        raise IndexError(f"a row outside the {weight.shape[0]} of the weight")
    out = torch.empty((ids_T.numel(), weight.shape[1]), dtype=dtype)
    _call_rows(weight, ids_T, 0, ids_T.numel(), out)
    return out


def _call_rows(weight: Weight, ids: Tensor | None, first: int, count: int, out: Tensor) -> None:
    _read_rows(
        *(weight.words, len(weight.parts), ids, first, count, weight.shape[1]),
        *(out, out.dtype == BF16, torch.get_num_threads()),
    )


def head_loss(
    hidden_MH: Tensor,
    parts: Sequence[Part] | Weight,
    labels_M: Tensor,
    *,
    weight: float,
    smoothing: float = 0.0,
    softcap: float = 0.0,
    need_grad: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """As matmul.head_loss, with a quantised head [V, H]."""
    head = _weight(parts)
    assert hidden_MH.shape[1] == head.shape[1], "states and head are of two sizes"
    assert hidden_MH.dtype in TYPES, "states of this type"
    _check_labels(labels_M, head.shape[0])
    hidden_MH, stride = _rows(hidden_MH)
    positions, size = hidden_MH.shape
    losses_M = torch.empty(positions, dtype=torch.float32)
    grad_MH = workspace.empty((positions, size), hidden_MH.dtype) if need_grad else None
    _head_loss(
        *(hidden_MH, stride, head.words, len(head.parts), labels_M.contiguous(), losses_M, grad_MH),
        *(positions, size, head.shape[0], weight, smoothing, softcap),
        *(hidden_MH.dtype == BF16, torch.get_num_threads()),
    )
    return losses_M, grad_MH
