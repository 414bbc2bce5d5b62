"""The matrix products of a LoRA layer, forward and backward, each native or in plain PyTorch.

    y = x W^T + bias + residual + u B^T      with u = x A^T, and B scaled by alpha / r
    dx = dy W + du A                         with du = dy B
    dA = du^T x,  dB = dy^T u

The sum of a row of A costs 2 * r operations an input, W's 2 * outputs: LoRA's products are the small
ones, and cost little only if nothing is read twice for them.

Letters: T tokens, I input features, O output features (all stacked outputs), R stacked ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lorimer.kernels import reference
from lorimer.kernels.native.library import usable
from lorimer.kernels.native.matmul import head_loss as native_head_loss
from lorimer.kernels.native.matmul import matmul


@dataclass(slots=True)
class LowRank:
    """Stacked LoRA factors for the outputs that share one input, ready for matrix products.

    down_RI stacks the A of each adapted output. up_OR holds alpha/r * B of each on its own rows
    and columns and zeros elsewhere, so that one product serves all outputs. Both are copies in the
    activations' type, refreshed when the float32 parameters change. `spans` lists for each factor
    its (first row, rows, first rank, rank) in up_OR and its scale.
    """

    down_RI: Tensor
    up_OR: Tensor
    spans: tuple[tuple[int, int, int, int, float], ...]
    # Where up_OR is not zero, by its rows and by its columns, as the native products read it.
    by_rows: Tensor = field(init=False)
    by_ranks: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.by_rows = torch.tensor([span[:4] for span in self.spans], dtype=torch.int64).reshape(-1, 4)
        self.by_ranks = self.by_rows[:, [2, 3, 0, 1]].contiguous()


def forward(
    states_TI: Tensor,
    weight_OI: Tensor,
    *,
    bias_O: Tensor | None = None,
    onto_TO: Tensor | None = None,
    low_rank: LowRank | None = None,
    down_TR: Tensor | None = None,
) -> Tensor:
    """x W^T, with bias, residual and LoRA's part added before anything is rounded: [T, O]."""
    if usable(states_TI, weight_OI):
        return matmul(
            *(states_TI, weight_OI),
            b_turned=True,
            a2=down_TR,
            b2=low_rank.up_OR if low_rank else None,
            b2_turned=True,
            bias_N=bias_O,
            onto=onto_TO,
            spans=low_rank.by_rows if low_rank else None,
        )
    if onto_TO is None:
        output_TO = states_TI @ weight_OI.t()
    else:
        output_TO = torch.addmm(onto_TO, states_TI, weight_OI.t())
    if bias_O is not None:
        output_TO += bias_O
    if low_rank is not None and down_TR is not None:
        output_TO.addmm_(down_TR, low_rank.up_OR.t())
    return output_TO


def logits(states_MH: Tensor, head_VH: Tensor) -> Tensor:
    """The head's products in float32, for choosing tokens: [M, V]."""
    if usable(states_MH, head_VH):
        out_MV = torch.empty((states_MH.shape[0], head_VH.shape[0]), dtype=torch.float32)
        return matmul(states_MH, head_VH, b_turned=True, out=out_MV)
    return (states_MH @ head_VH.t()).float()


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
    """Each position's loss [M] and the gradient [M, H] of weight * their sum, for a head that is not
    trained; see reference.cross_entropy_head."""
    if usable(hidden_MH, head_VH):
        return native_head_loss(
            *(hidden_MH, head_VH, labels_M),
            weight=weight,
            smoothing=smoothing,
            softcap=softcap,
            need_grad=need_grad,
        )
    losses_M, grad_MH, _ = reference.cross_entropy_head(
        *(hidden_MH, head_VH, labels_M),
        weight=weight,
        smoothing=smoothing,
        softcap=softcap,
        need_grad=need_grad,
    )
    return losses_M, grad_MH


def input_grad(
    grad_TO: Tensor,
    weight_OI: Tensor,
    *,
    low_rank: LowRank | None = None,
    grad_down_TR: Tensor | None = None,
) -> Tensor:
    """dy W + du A: [T, I]."""
    if usable(grad_TO, weight_OI):
        down = low_rank.down_RI if low_rank and grad_down_TR is not None else None
        return matmul(grad_TO, weight_OI, a2=grad_down_TR if down is not None else None, b2=down)
    grad_TI = grad_TO @ weight_OI
    if low_rank is not None and grad_down_TR is not None:
        grad_TI.addmm_(grad_down_TR, low_rank.down_RI)
    return grad_TI


def down(states_TI: Tensor, low_rank: LowRank) -> Tensor:
    """u = x A^T: [T, R]."""
    if usable(states_TI, low_rank.down_RI):
        return matmul(states_TI, low_rank.down_RI, b_turned=True)
    return states_TI @ low_rank.down_RI.t()


def down_grad(grad_TO: Tensor, low_rank: LowRank) -> Tensor:
    """du = dy B: [T, R]."""
    if usable(grad_TO, low_rank.up_OR):
        return matmul(grad_TO, low_rank.up_OR, spans=low_rank.by_ranks)
    return grad_TO @ low_rank.up_OR


def factor_grads(
    low_rank: LowRank,
    states_TI: Tensor,
    down_TR: Tensor,
    grad_down_TR: Tensor,
    grad_TO: Tensor,
    factors: Sequence[Tensor],
) -> list[Tensor | None]:
    """Float32 gradients of the stacked A, then of each B; None where it went to the factor's own.

    A factor that has a gradient already, as those of an adapter's flat buffer do, is added to in
    place: the sums leave their registers once.
    """
    if not usable(states_TI, grad_TO):
        grad_up_OR = (grad_TO.t() @ down_TR).float()
        grads: list[Tensor | None] = [(grad_down_TR.t() @ states_TI).float()]
        for row, rows, rank, ranks, scale in low_rank.spans:
            grads.append(grad_up_OR[row : row + rows, rank : rank + ranks] * scale)
        return grads
    target, given = _target(factors[0])
    matmul(grad_down_TR, states_TI, a_turned=True, onto=target, out=target)
    found: list[Tensor | None] = [given]
    for (row, rows, rank, ranks, scale), factor in zip(low_rank.spans, factors[1:], strict=True):
        target, given = _target(factor)
        # The few ranks are the rows of this product, so that the wide side runs along the registers.
        matmul(
            *(down_TR[:, rank : rank + ranks], grad_TO[:, row : row + rows]),
            a_turned=True,
            out=target,
            out_turned=True,
            alpha=scale,
        )
        found.append(given)
    return found


def _target(factor: Tensor) -> tuple[Tensor, Tensor | None]:
    """Where a factor's gradient is added up, and what autograd is to be given: nothing if that is
    the factor's own gradient."""
    own = factor.grad
    if own is not None and own.is_contiguous() and own.dtype == torch.float32:
        return own, None
    fresh = torch.zeros(factor.shape, dtype=torch.float32)
    return fresh, fresh
