"""Matrix products and the loss head in C++, with the words of PyTorch around them.

Letters: M rows, N columns, K summed over.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lorimer.kernels.native.library import Kernel

_matmul = Kernel("matmul", "pli" + "pli" + "l" + "pl" + "pli" + "l" + "p" + "pl" + "plii" + "pl" + "llfii")
_head_loss = Kernel("head_loss", "plppppl" + "llffii")

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
    With `out_turned`, out is [N, M] in fp32 and is added to. `spans` (int64 [S, 4]: first column,
    columns, first k, length) says where b2, or b if there is no b2, is not zero.
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
        out = torch.empty((m, n), dtype=a.dtype)
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
    need_grad: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Each position's loss (float32 [M]) and the gradient of weight * their sum, if asked for.

    See reference.cross_entropy_head. Logits stay in float32 whatever the type of the states.
    """
    hidden_MH, stride = _rows(hidden_MH)
    head_VH = head_VH.contiguous()
    positions, size = hidden_MH.shape
    losses_M = torch.empty(positions, dtype=torch.float32)
    grad_MH = torch.empty((positions, size), dtype=hidden_MH.dtype) if need_grad else None
    _head_loss(
        *(hidden_MH, stride, head_VH, labels_M.contiguous(), losses_M, grad_MH),
        *(positions, size, head_VH.shape[0], weight, smoothing),
        *(hidden_MH.dtype == BF16, torch.get_num_threads()),
    )
    return losses_M, grad_MH
