"""Matrix products and the loss head in C++, with the words of PyTorch around them.

Letters: M rows, N columns, K summed over.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lorimer.errors import UserError
from lorimer.kernels import workspace
from lorimer.kernels.native.library import Kernel

_matmul = Kernel("matmul", "pli" + "pli" + "l" + "pl" + "pli" + "l" + "p" + "pl" + "plii" + "pl" + "llfii")
_head_loss = Kernel("head_loss", "plppppl" + "llfffii")

BF16 = torch.bfloat16


def _rows(tensor: Tensor) -> tuple[Tensor, int]:
    """A matrix whose rows lie each in one piece, and how far apart they are."""
    if tensor.stride(1) != 1 and tensor.shape[1] > 1:
        tensor = tensor.contiguous()
    return tensor, tensor.stride(0)


def matmul(
    a: Tensor,
    b: Tensor,
    *,
    a_turned: bool = False,
    b_turned: bool = False,
    a2: Tensor | None = None,
    b2: Tensor | None = None,
    b2_turned: bool = False,
    bias_N: Tensor | None = None,
    onto: Tensor | None = None,
    out: Tensor | None = None,
    out_turned: bool = False,
    alpha: float = 1.0,
    spans: Tensor | None = None,
) -> Tensor:
    """alpha * (a b + a2 b2) + bias + onto, with sums in float32, rounded once: [M, N].

    a is [M, K], or [K, M] if `a_turned`; b is [K, N], or [N, K] if `b_turned`; a2 [M, K2] and b2 alike;
    all of one type, bf16 or fp32. `out` may be fp32 whatever they are, and `onto` is of its type.
    With `out_turned`, out is [N, M] in fp32 and alpha * (a b + a2 b2) turned is added to it. `spans`
    (int64 [S, 4]: first column, columns, first k, length) says where b2, or b if there is no b2, is
    not zero.

    Beyond the last rounding a result is off by at most (K + K2) * 2^-23 times the sum of its terms'
    magnitudes. Where pairs of bf16 are multiplied natively, denormals (below 2^-126) count as zero.
    """
    a, a_stride = _rows(a)
    b, b_stride = _rows(b)
    m, k = (a.shape[1], a.shape[0]) if a_turned else a.shape
    n = b.shape[0] if b_turned else b.shape[1]
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
    assert b.shape == ((n, k) if b_turned else (k, n)), "a and b do not fit"
    assert (a2 is None) == (b2 is None), "half a second product"
    assert a2 is None or a2.shape == (m, k2), "a2"
    assert b2 is None or b2.shape == ((n, k2) if b2_turned else (k2, n)), "b2"
    assert out.shape == ((n, m) if out_turned else (m, n)), "out"
    assert out.stride(1) == 1 or out.shape[1] < 2, "the rows of out lie in pieces"
    assert all(t is None or t.dtype == a.dtype for t in (b, a2, b2, bias_N)), "one type for all operands"
    assert out.dtype in ((torch.float32,) if out_turned else (a.dtype, torch.float32)), "out's type"
    assert onto is None or (onto.dtype == out.dtype and onto.shape == out.shape), "onto is not like out"
    assert not out_turned or (bias_N is None and onto is None), "a turned out is added to as it is"
    assert bias_N is None or bias_N.is_contiguous(), "the bias lies in pieces"
    _matmul(
        *(a, a_stride, a_turned, b, b_stride, b_turned, k),
        *(a2, a2_stride, b2, b2_stride, b2_turned, k2),
        *(bias_N, onto, onto_stride),
        *(out, out.stride(0), out.dtype == torch.float32, out_turned),
        *(spans, 0 if spans is None else spans.shape[0]),
        *(m, n, alpha, a.dtype == BF16, torch.get_num_threads()),
    )
    return out


def head_loss(
    hidden_MH: Tensor,
    head_VH: Tensor,
    labels_M: Tensor,
    *,
    weight: float,
    smoothing: float = 0.0,
    softcap: float = 0.0,
    need_grad: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Each position's loss (float32 [M]) and the gradient of weight * their sum, if asked for.

    See reference.cross_entropy_head. Logits stay in float32 whatever the type of the states. Raises
    UserError for a label that the head has no row for.
    """
    assert hidden_MH.dtype == head_VH.dtype, "states and head are of two types"
    assert hidden_MH.shape[1] == head_VH.shape[1], "states and head are of two sizes"
    _check_labels(labels_M, head_VH.shape[0])
    hidden_MH, stride = _rows(hidden_MH)
    head_VH = head_VH.contiguous()
    positions, size = hidden_MH.shape
    losses_M = torch.empty(positions, dtype=torch.float32)
    grad_MH = workspace.empty((positions, size), hidden_MH.dtype) if need_grad else None
    _head_loss(
        *(hidden_MH, stride, head_VH, labels_M.contiguous(), losses_M, grad_MH),
        *(positions, size, head_VH.shape[0], weight, smoothing, softcap),
        *(hidden_MH.dtype == BF16, torch.get_num_threads()),
    )
    return losses_M, grad_MH


def _check_labels(labels_M: Tensor, vocabulary: int) -> None:
    if not labels_M.numel():
        return
    lowest, highest = (int(value) for value in labels_M.aminmax())
    if lowest < 0 or highest >= vocabulary:
        raise UserError(
            f"a label is token {lowest if lowest < 0 else highest}, but the head knows {vocabulary} tokens",
            fix="The tokenizer does not belong to this base.",
        )
