"""In plain PyTorch, what native/elementwise.py has beyond reference.py: its definitions.

Letters: T tokens, H hidden, I intermediate, O outputs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lorimer.kernels import reference
from lorimer.kernels.native.elementwise import Activation


def rms_norm(
    hidden_TH: Tensor, weight_H: Tensor, eps: float, *, offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Root mean square norm with the factor weight + offset; see reference.rms_norm."""
    return reference.rms_norm(hidden_TH, weight_H + offset, eps)


def rms_norm_apply(hidden_TH: Tensor, rstd_T1: Tensor, weight_H: Tensor, *, offset: float = 0.0) -> Tensor:
    """The normed states again from the saved factor: cheaper than keeping them."""
    return reference.rms_norm_apply(hidden_TH, rstd_T1, weight_H + offset)


def rms_norm_backward(
    grad_TH: Tensor,
    hidden_TH: Tensor,
    rstd_T1: Tensor,
    weight_H: Tensor,
    *,
    weight_grad: bool,
    onto_TH: Tensor | None = None,
    offset: float = 0.0,
) -> tuple[Tensor, Tensor | None]:
    """Gradients of the norm's input, added to `onto_TH`, and of its weight if asked for (float32)."""
    size = hidden_TH.shape[-1]
    grad_hidden, grad_weight_H = reference.rms_norm_backward(
        *(grad_TH.reshape(-1, size), hidden_TH.reshape(-1, size), rstd_T1.reshape(-1, 1)),
        weight_H + offset,
        weight_grad=weight_grad,
    )
    grad_hidden = grad_hidden.view(hidden_TH.shape)
    return grad_hidden if onto_TH is None else grad_hidden + onto_TH, grad_weight_H


def activate(gate: Tensor, kind: Activation) -> Tensor:
    """The activation of a gated unit; GELU is arXiv 1606.08415."""
    if kind == "silu":
        return torch.nn.functional.silu(gate)
    return torch.nn.functional.gelu(gate, approximate="tanh" if kind == "gelu_tanh" else "none")


def gated(gate_up: Tensor, kind: Activation) -> Tensor:
    """activation(gate) * up for a stacked [T, 2I] input (arXiv 2002.05202): [T, I]."""
    gate_TI, up_TI = gate_up.chunk(2, -1)
    return activate(gate_TI, kind) * up_TI


def gated_backward(
    grad_TI: Tensor, gate_up: Tensor, kind: Activation, *, again: bool = False, in_place: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Gradient of the stacked [T, 2I] input, over it if `in_place`, and the forward's result again."""
    gate_TI, up_TI = gate_up.chunk(2, -1)
    value_TI = activate(gate_TI, kind)
    if kind == "silu":
        grad_gate = torch.ops.aten.silu_backward(grad_TI * up_TI, gate_TI)
    else:
        approximate = "tanh" if kind == "gelu_tanh" else "none"
        grad_gate = torch.ops.aten.gelu_backward(grad_TI * up_TI, gate_TI, approximate=approximate)
    again_TI = value_TI * up_TI if again else None
    grad_gate_up = torch.cat([grad_gate, grad_TI * value_TI], -1)
    return gate_up.copy_(grad_gate_up) if in_place else grad_gate_up, again_TI


def adamw(
    param: Tensor,
    grad: Tensor,
    m: Tensor,
    v: Tensor,
    *,
    step: int,
    decay_until: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    grad_scale: float = 1.0,
) -> None:
    """One AdamW step (arXiv 1711.05101) over flat float32 buffers, all changed in place.

    The gradient times `grad_scale` is used, and zero afterwards; the first `decay_until` parameters
    decay; `step` counts from 1.
    """
    grad.mul_(grad_scale)
    param[:decay_until].mul_(1.0 - lr * weight_decay)
    m.lerp_(grad, 1.0 - beta1)
    v.mul_(beta2).addcmul_(grad, grad, value=1.0 - beta2)
    size = v.sqrt().div_(math.sqrt(1.0 - beta2**step)).add_(eps)
    param.addcdiv_(m, size, value=-lr / (1.0 - beta1**step))
    grad.zero_()


def squared_norm(values: Tensor) -> float:
    """The sum of squares, in float64."""
    return float(values.double().square_().sum())


def column_sums(grad_TO: Tensor) -> Tensor:
    """The sum over tokens, in float32: the gradient of a bias."""
    return grad_TO.sum(0, dtype=torch.float32)
