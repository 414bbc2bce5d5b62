"""The operations as autograd functions: what the decoder calls.

Each keeps for its backward only what is cheaper to keep than to compute again: a norm keeps its
input and one factor a row, the gated unit its stacked input, attention its inputs and output.
A frozen weight never gets a gradient, and an input that needs none gets none.

Letters: T tokens, I input features, O output features (all stacked outputs), R stacked ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from lorimer.kernels import reference


class Frozen(Protocol):
    """A weight that never changes: the two products that training needs of it, in one type."""

    @property
    def dtype(self) -> torch.dtype: ...

    def forward(self, input_TI: Tensor, onto_TO: Tensor | None) -> Tensor: ...

    def input_grad(self, grad_TO: Tensor) -> Tensor: ...


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


@dataclass(slots=True)
class Linear:
    """What `project` computes with: a frozen weight, perhaps a bias, perhaps LoRA on top."""

    weight: Frozen
    bias_O: Tensor | None = None
    low_rank: LowRank | None = None


@dataclass(frozen=True, slots=True)
class Norm:
    """RMSNorm applied to the input of a projection."""

    weight_H: Tensor
    eps: float


class Gate:
    """SwiGLU applied to the stacked gate and up outputs, the input of the down projection."""


Before = Norm | Gate | None


@dataclass(frozen=True, slots=True)
class Dropout:
    """Masks for the adapters' inputs: row i of the step uses row `picks[i]` of the pool.

    The pool holds 0 or 1 / (1 - p). Which row of it a token uses is a function of (seed, step,
    row, position, module), so masks do not depend on how a step is split or packed.
    """

    pool_PI: Tensor
    picks_T: Tensor

    def __call__(self, input_TI: Tensor) -> Tensor:
        return input_TI * self.pool_PI.index_select(0, self.picks_T)


class _Project(torch.autograd.Function):
    """y = (residual +) before(x) W^T (+ bias) + dropout(before(x)) A^T (s B)^T."""

    @staticmethod
    def forward(
        ctx: Any,
        input_TI: Tensor,
        residual_TO: Tensor | None,
        linear: Linear,
        before: Before,
        dropout: Dropout | None,
        norm_weight: Tensor | None,
        bias_O: Tensor | None,
        *factors: Tensor,
    ) -> Tensor:
        rstd = None
        if isinstance(before, Norm):
            states, rstd = reference.rms_norm(input_TI, before.weight_H, before.eps)
        else:
            states = reference.swiglu(input_TI) if isinstance(before, Gate) else input_TI
        output = linear.weight.forward(states, residual_TO)
        if linear.bias_O is not None:
            output += linear.bias_O
        down = None
        if linear.low_rank is not None:
            down = (dropout(states) if dropout else states) @ linear.low_rank.down_RI.t()
            output.addmm_(down, linear.low_rank.up_OR.t())
        ctx.linear, ctx.before, ctx.dropout = linear, before, dropout
        ctx.save_for_backward(input_TI, rstd, down)
        return output

    @staticmethod
    def backward(ctx: Any, grad_TO: Tensor) -> tuple[Any, ...]:
        linear, before, low_rank = ctx.linear, ctx.before, ctx.linear.low_rank
        input_TI, rstd, down = ctx.saved_tensors
        need_input, need_residual = ctx.needs_input_grad[:2]
        need_norm, need_bias = ctx.needs_input_grad[5:7]
        grad_factors: list[Tensor] = []
        grad_down = None
        if low_rank is not None:
            grad_down = grad_TO @ low_rank.up_OR
            states = _states(before, input_TI, rstd)
            if ctx.dropout:
                states = ctx.dropout(states)
            grad_factors = _factor_grads(low_rank, states, down, grad_down, grad_TO)
            del states
        grad_input = grad_norm = None
        if need_input or need_norm:
            grad_input = linear.weight.input_grad(grad_TO)
            if low_rank is not None and ctx.dropout:
                grad_input += ctx.dropout(grad_down @ low_rank.down_RI)
            elif low_rank is not None:
                grad_input.addmm_(grad_down, low_rank.down_RI)
            if isinstance(before, Norm):
                grad_input, grad_norm = reference.rms_norm_backward(
                    grad_input, input_TI, rstd, before.weight_H, weight_grad=need_norm
                )
            elif isinstance(before, Gate):
                grad_input = reference.swiglu_backward(grad_input, input_TI)
        grad_bias = grad_TO.sum(0, dtype=torch.float32) if need_bias else None
        return (
            grad_input if need_input else None,
            grad_TO if need_residual else None,
            None,
            None,
            None,
            grad_norm,
            grad_bias,
            *grad_factors,
        )


def _states(before: Before, input_TI: Tensor, rstd: Tensor | None) -> Tensor:
    """What the projection saw, computed again."""
    if isinstance(before, Norm):
        assert rstd is not None
        return reference.rms_norm_apply(input_TI, rstd, before.weight_H)
    return reference.swiglu(input_TI) if isinstance(before, Gate) else input_TI


def _factor_grads(
    low_rank: LowRank, states_TI: Tensor, down_TR: Tensor, grad_down_TR: Tensor, grad_TO: Tensor
) -> list[Tensor]:
    """Float32 gradients: of the stacked A first, then of each B."""
    grad_up_OR = (grad_TO.t() @ down_TR).float()
    grads = [(grad_down_TR.t() @ states_TI).float()]
    for row, rows, rank, ranks, scale in low_rank.spans:
        grads.append(grad_up_OR[row : row + rows, rank : rank + ranks] * scale)
    return grads


def project(
    input_TI: Tensor,
    linear: Linear,
    *,
    before: Before = None,
    residual_TO: Tensor | None = None,
    dropout: Dropout | None = None,
    norm_parameter: Tensor | None = None,
    bias_parameter: Tensor | None = None,
    factors: tuple[Tensor, ...] = (),
) -> Tensor:
    """One input through all linear layers that share it, their LoRA included: [T, O].

    `factors` are the float32 parameters that gradients go to: the stacked A, then each B.
    `norm_parameter` and `bias_parameter` are given only when those are trained.
    """
    result: Tensor = _Project.apply(  # type: ignore[no-untyped-call]
        input_TI, residual_TO, linear, before, dropout, norm_parameter, bias_parameter, *factors
    )
    return result


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states_TND: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
        ctx.save_for_backward(cos_TD, sin_TD)
        return reference.rotate(states_TND, cos_TD, sin_TD)

    @staticmethod
    def backward(ctx: Any, grad_TND: Tensor) -> tuple[Any, ...]:
        cos_TD, sin_TD = ctx.saved_tensors
        return reference.rotate(grad_TND, cos_TD, -sin_TD), None, None


def rotate(states_TND: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    """Rotary position embedding; see reference.rotate."""
    result: Tensor = _Rotate.apply(states_TND, cos_TD, sin_TD)  # type: ignore[no-untyped-call]
    return result


class _HeadNorm(torch.autograd.Function):
    """RMSNorm over the last dimension, on its own (query and key norms, the final norm)."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, norm: Norm, norm_parameter: Tensor | None) -> Tensor:
        normed, rstd = reference.rms_norm(hidden, norm.weight_H, norm.eps)
        ctx.norm = norm
        ctx.save_for_backward(hidden, rstd)
        return normed

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        hidden, rstd = ctx.saved_tensors
        need = ctx.needs_input_grad[2]
        flat = hidden.shape[-1]
        grad_hidden, grad_weight = reference.rms_norm_backward(
            grad.reshape(-1, flat),
            hidden.reshape(-1, flat),
            rstd.reshape(-1, 1),
            ctx.norm.weight_H,
            weight_grad=need,
        )
        return grad_hidden.view_as(hidden), None, grad_weight


def rms_norm(hidden: Tensor, norm: Norm, norm_parameter: Tensor | None = None) -> Tensor:
    """RMSNorm over the last dimension of [..., H]; `norm_parameter` only when it is trained."""
    result: Tensor = _HeadNorm.apply(hidden, norm, norm_parameter)  # type: ignore[no-untyped-call]
    return result


class _Head(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_MH: Tensor, head: Tensor, labels_M: Tensor, weight: float, smoothing: float
    ) -> tuple[Tensor, Tensor]:
        result = reference.cross_entropy_head(
            hidden_MH,
            head.detach().to(hidden_MH.dtype),
            labels_M,
            weight=weight,
            smoothing=smoothing,
            need_grad=ctx.needs_input_grad[0] or ctx.needs_input_grad[1],
            need_head_grad=ctx.needs_input_grad[1],
        )
        ctx.save_for_backward(result.grad_hidden_MH, result.grad_head_VH)
        ctx.mark_non_differentiable(result.losses_M)
        return result.losses_M.sum() * weight, result.losses_M

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Any, ...]:
        grad_hidden, grad_head = ctx.saved_tensors
        return (
            None if grad_hidden is None else grad_hidden * grad,
            None if grad_head is None else grad_head * grad,
            None,
            None,
            None,
        )


def head_loss(
    hidden_MH: Tensor, head_VH: Tensor, labels_M: Tensor, *, weight: float, smoothing: float = 0.0
) -> tuple[Tensor, Tensor]:
    """weight * sum of the losses (differentiable), and the float32 losses of each position."""
    loss, losses_M = _Head.apply(hidden_MH, head_VH, labels_M, weight, smoothing)  # type: ignore[no-untyped-call]
    return loss, losses_M
