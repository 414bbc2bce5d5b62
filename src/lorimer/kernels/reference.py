"""The operations of a decoder in plain PyTorch, forward and backward, without autograd.

These are the definitions: any faster version is held to them. Statistics are in float32
whatever the type of the activations.

Letters: T tokens, H hidden, I intermediate, N heads, D head size, V vocabulary, M trained positions.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

# What a unit does to its gate or its only input: SwiGLU, GeGLU with the tanh approximation, GeGLU, ReLU.
Activation = Literal["silu", "gelu_tanh", "gelu", "relu"]

# Logits of this many trained positions are alive at a time: large enough for a good matrix
# product, small enough that a vocabulary of 150,000 stays under 200 MB.
HEAD_CHUNK = 128


def rms_norm(
    hidden_TH: Tensor, weight_H: Tensor, eps: float, *, offset: float = 0.0, onto_TH: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Root mean square norm (arXiv 1910.07467): x / sqrt(mean(x^2) + eps) * (weight + offset).

    Over the last dimension, and added to `onto_TH` before it is rounded, if that is given. Returns the
    normed states in the type of `hidden_TH` and the float32 factor `rstd_T1`, which the backward needs.
    With x = [3, 4], eps 0 and weight 1: rstd = 1 / sqrt(12.5), result [0.8485, 1.1314].
    """
    # A float32 copy, because in-place steps follow and the caller keeps its states.
    wide_TH = hidden_TH.to(torch.float32, copy=True)
    length_T1 = torch.linalg.vector_norm(wide_TH, dim=-1, keepdim=True)
    rstd_T1 = torch.rsqrt(length_T1.square_().div_(wide_TH.shape[-1]).add_(eps))
    wide_TH.mul_(rstd_T1).mul_(weight_H + offset)
    if onto_TH is not None:
        wide_TH.add_(onto_TH)
    return wide_TH.to(hidden_TH.dtype), rstd_T1


def rms_norm_apply(hidden_TH: Tensor, rstd_T1: Tensor, weight_H: Tensor, *, offset: float = 0.0) -> Tensor:
    """The normed states again from the saved factor: cheaper than keeping them."""
    return (hidden_TH * rstd_T1).mul_(weight_H + offset).to(hidden_TH.dtype)


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
    """Gradients of the norm's input, added to `onto_TH` if given, and of its weight (float32) if wanted."""
    normed_TH = hidden_TH * rstd_T1
    grad_weight_H = (grad_TH * normed_TH).flatten(0, -2).sum(0) if weight_grad else None
    wide_TH = grad_TH * (weight_H + offset)
    dot_T1 = (wide_TH * normed_TH).mean(-1, keepdim=True)
    wide_TH.addcmul_(normed_TH, dot_T1, value=-1).mul_(rstd_T1)
    grad_hidden_TH = wide_TH.to(hidden_TH.dtype)
    return grad_hidden_TH if onto_TH is None else grad_hidden_TH + onto_TH, grad_weight_H


def layer_norm(
    hidden_TH: Tensor, weight_H: Tensor, bias_H: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """LayerNorm (arXiv 1607.06450): (x - mean) / sqrt(variance + eps) * weight + bias.

    Over the last dimension. Returns the normed states in the type of `hidden_TH` and, float32, the mean and
    the factor [T, 2], which the backward needs. With x = [1, 3], eps 0 and weight 1: [-1, 1].
    """
    wide_TH = hidden_TH.float()
    variance_T1, mean_T1 = torch.var_mean(wide_TH, dim=-1, keepdim=True, correction=0)
    facts_T2 = torch.cat([mean_T1, variance_T1.add_(eps).rsqrt_()], -1)
    return layer_norm_apply(hidden_TH, facts_T2, weight_H, bias_H), facts_T2


def layer_norm_apply(
    hidden_TH: Tensor, facts_T2: Tensor, weight_H: Tensor, bias_H: Tensor | None
) -> Tensor:
    """The normed states again from the saved mean and factor."""
    mean_T1, rstd_T1 = facts_T2.split(1, -1)
    normed_TH = (hidden_TH - mean_T1).mul_(rstd_T1).mul_(weight_H)
    if bias_H is not None:
        normed_TH.add_(bias_H)
    result: Tensor = normed_TH.to(hidden_TH.dtype)
    return result


def layer_norm_backward(
    grad_TH: Tensor, hidden_TH: Tensor, facts_T2: Tensor, weight_H: Tensor, *, weight_grad: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of the norm's input and, if wanted, of its weight and bias (float32)."""
    mean_T1, rstd_T1 = facts_T2.split(1, -1)
    normed_TH = (hidden_TH - mean_T1).mul_(rstd_T1)
    grad_weight_H = (grad_TH * normed_TH).flatten(0, -2).sum(0) if weight_grad else None
    grad_bias_H = grad_TH.flatten(0, -2).sum(0, dtype=torch.float32) if weight_grad else None
    wide_TH = grad_TH * weight_H
    dot_T1 = (wide_TH * normed_TH).mean(-1, keepdim=True)
    wide_TH = wide_TH.sub_(wide_TH.mean(-1, keepdim=True)).addcmul_(normed_TH, dot_T1, value=-1)
    return wide_TH.mul_(rstd_T1).to(hidden_TH.dtype), grad_weight_H, grad_bias_H


def activate(gate: Tensor, kind: Activation) -> Tensor:
    """The activation of a unit; GELU is arXiv 1606.08415."""
    if kind == "relu":
        return torch.nn.functional.relu(gate)
    if kind == "silu":
        return torch.nn.functional.silu(gate)
    return torch.nn.functional.gelu(gate, approximate="tanh" if kind == "gelu_tanh" else "none")


def activate_backward(
    grad: Tensor, gate: Tensor, kind: Activation, *, again: bool = False
) -> tuple[Tensor, Tensor | None]:
    """The gradient of `activate`'s input and, if asked for, its result again."""
    return _activation_grad(grad, gate, kind), activate(gate, kind) if again else None


def _activation_grad(grad: Tensor, gate: Tensor, kind: Activation) -> Tensor:
    if kind == "relu":
        # What is not a number stays so.
        passed: Tensor = grad * torch.where(gate.isnan(), gate, (gate > 0).to(gate.dtype))
        return passed
    if kind == "silu":
        silu_grad: Tensor = torch.ops.aten.silu_backward(grad, gate)
        return silu_grad
    approximate = "tanh" if kind == "gelu_tanh" else "none"
    gelu_grad: Tensor = torch.ops.aten.gelu_backward(grad, gate, approximate=approximate)
    return gelu_grad


def gated(gate_up: Tensor, kind: Activation) -> Tensor:
    """activation(gate) * up for a stacked [T, 2I] input (arXiv 2002.05202): [T, I]."""
    gate_TI, up_TI = gate_up.chunk(2, -1)
    return activate(gate_TI, kind).mul_(up_TI)


def gated_backward(
    grad_TI: Tensor, gate_up: Tensor, kind: Activation, *, again: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Gradient of the stacked [T, 2I] input and, if asked for, the forward's result again."""
    gate_TI, up_TI = gate_up.chunk(2, -1)
    value_TI = activate(gate_TI, kind)
    grad = torch.empty_like(gate_up)
    grad_gate_TI, grad_up_TI = grad.chunk(2, -1)
    grad_gate_TI.copy_(_activation_grad(grad_TI * up_TI, gate_TI, kind))
    torch.mul(grad_TI, value_TI, out=grad_up_TI)
    return grad, value_TI.mul_(up_TI) if again else None


def add_scaled(residual: Tensor | None, states: Tensor, scale: float) -> Tensor:
    """residual + scale * states, or scale * states alone."""
    return states * scale if residual is None else torch.add(residual, states, alpha=scale)


def column_sums(grad_TO: Tensor) -> Tensor:
    """The sum over tokens, in float32: the gradient of a bias."""
    return grad_TO.sum(0, dtype=torch.float32)


def rotate(states_TND: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    """Rotary position embedding (arXiv 2104.09864) on the first 2 * cos.shape[-1] features.

    cos and sin are [T, D/2]; feature i turns with feature i + D/2, as Hugging Face orders them.
    The backward is the same call with -sin.
    """
    half = cos_TD.shape[-1]
    cos, sin = cos_TD.unsqueeze(1), sin_TD.unsqueeze(1)
    left, right = states_TND[..., :half], states_TND[..., half : 2 * half]
    turned = torch.empty_like(states_TND, memory_format=torch.contiguous_format)
    torch.sub(left * cos, right * sin, out=turned[..., :half])
    torch.add(right * cos, left * sin, out=turned[..., half : 2 * half])
    turned[..., 2 * half :] = states_TND[..., 2 * half :]
    return turned


class HeadResult(NamedTuple):
    """What one pass over the trained positions gives."""

    losses_M: Tensor  # float32 nats, one for each trained position, unweighted
    grad_hidden_MH: Tensor | None  # of weight * sum(losses), in the type of the hidden states
    grad_head_VH: Tensor | None  # float32, only for a head that is trained itself


def _log_softmax(logits_MV: Tensor) -> Tensor:
    """Float32 log probabilities. One fused pass where the logits are rounded anyway; torch's fused
    pass is off by 7e-6 on average over 49,152 tokens, so float32 logits take the exact way."""
    if logits_MV.dtype != torch.float32:
        return torch.log_softmax(logits_MV, -1, dtype=torch.float32)
    return logits_MV.sub_(logits_MV.logsumexp(-1, keepdim=True))


def loss_of_logits(
    logits_MV: Tensor, labels_M: Tensor, *, smoothing: float, softcap: float, need_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """Each position's loss and, if asked for, the gradient of their sum. Logits are overwritten."""
    labels = labels_M.unsqueeze(1)
    slope = None
    if softcap:
        bent = logits_MV.float().div_(softcap).tanh_()
        slope = 1.0 - bent.square() if need_grad else None
        logits_MV = bent.mul_(softcap)
    log_probs = _log_softmax(logits_MV)
    nll = -log_probs.gather(1, labels)
    if smoothing:
        nll = (1 - smoothing) * nll - smoothing * log_probs.mean(-1, keepdim=True)
    if not need_grad:
        return nll.squeeze(1), None
    grad_logits = log_probs.exp_()
    if smoothing:
        grad_logits.sub_(smoothing / grad_logits.shape[-1])
    grad_logits.scatter_add_(1, labels, torch.full_like(nll, smoothing - 1.0))
    if slope is not None:
        grad_logits.mul_(slope)
    return nll.squeeze(1), grad_logits


def cross_entropy_head(
    hidden_MH: Tensor,
    head_VH: Tensor,
    labels_M: Tensor,
    *,
    weight: float,
    smoothing: float = 0.0,
    softcap: float = 0.0,
    need_grad: bool = True,
    need_head_grad: bool = False,
) -> HeadResult:
    """Cross entropy of a language model's head, and its gradient in the same pass.

    Logits exist for HEAD_CHUNK positions at a time and are overwritten by their gradient, so
    memory does not grow with M * V. `weight` is the constant that the sum of losses will be
    multiplied by; it must be known beforehand, and it is: the trained tokens of a step are counted
    before its first backward. Smoothing e gives (1 - e) * -log p(label) + e * mean(-log p). `softcap` c
    makes logits c * tanh(logits / c); 0 for none.
    """
    losses_M = torch.empty(hidden_MH.shape[0], dtype=torch.float32, device=hidden_MH.device)
    grad_hidden_MH = torch.empty_like(hidden_MH) if need_grad else None
    grad_head_VH = torch.zeros_like(head_VH, dtype=torch.float32) if need_head_grad else None
    for start in range(0, hidden_MH.shape[0], HEAD_CHUNK):
        part = slice(start, start + HEAD_CHUNK)
        logits = hidden_MH[part] @ head_VH.t()
        losses_M[part], grad_logits = loss_of_logits(
            logits, labels_M[part], smoothing=smoothing, softcap=softcap, need_grad=need_grad
        )
        if grad_logits is None:
            continue
        # Probabilities are cast before they are weighted: the weight could push small ones below
        # what the type holds.
        narrow = grad_logits.to(hidden_MH.dtype)
        assert grad_hidden_MH is not None
        torch.mm(narrow, head_VH, out=grad_hidden_MH[part])
        if grad_head_VH is not None:
            grad_head_VH.addmm_(narrow.t().float(), hidden_MH[part].float(), alpha=weight)
    if grad_hidden_MH is not None:
        grad_hidden_MH.mul_(weight)
    return HeadResult(losses_M, grad_hidden_MH, grad_head_VH)


# Rows of queries that attend at once: scores of one block stay in the cache, and keys that come
# after the block are skipped. 128 measured best on CPUs for lengths from 64 to 2048.
QUERY_BLOCK = 128


def causal_attention(
    query_BNLD: Tensor,
    key_BKLD: Tensor,
    value_BKLD: Tensor,
    *,
    scale: float,
    window: int | None,
    softcap: float = 0.0,
) -> Tensor:
    """Causal attention with grouped queries (arXiv 2305.13245); K divides N.

    `window` w lets position i see positions i - w + 1 to i. Rows of B never see each other. `softcap` c
    makes scores c * tanh(scores / c) (arXiv 2408.00118); 0 for none.
    """
    length = query_BNLD.shape[2]
    if softcap:
        return _capped_attention(
            query_BNLD, key_BKLD, value_BKLD, scale=scale, window=window, softcap=softcap
        )
    if window is None or length <= window:
        return torch.nn.functional.scaled_dot_product_attention(
            query_BNLD, key_BKLD, value_BKLD, is_causal=True, scale=scale, enable_gqa=True
        )
    age = torch.arange(length, device=query_BNLD.device)
    age = age.unsqueeze(1) - age
    return torch.nn.functional.scaled_dot_product_attention(
        query_BNLD, key_BKLD, value_BKLD, (age >= 0) & (age < window), scale=scale, enable_gqa=True
    )


def _capped_attention(
    query_BNLD: Tensor,
    key_BKLD: Tensor,
    value_BKLD: Tensor,
    *,
    scale: float,
    window: int | None,
    softcap: float,
) -> Tensor:
    """The same with capped scores, block by block."""
    batch, heads, length, size = query_BNLD.shape
    groups = key_BKLD.shape[1]
    output_BNLD = torch.empty_like(query_BNLD, memory_format=torch.contiguous_format)
    for start in range(0, length, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, length)
        first = 0 if window is None else max(0, start - window + 1)
        query = query_BNLD[:, :, start:stop].float().reshape(batch, groups, -1, size)
        scores = (query @ key_BKLD[:, :, first:stop].float().transpose(-1, -2)).mul_(scale / softcap)
        scores = scores.tanh_().mul_(softcap).view(batch, groups, -1, stop - start, stop - first)
        probs = scores.masked_fill_(_unseen(start, stop, first, window, scores), float("-inf")).softmax(-1)
        narrow = probs.to(query_BNLD.dtype).view(batch, groups, -1, stop - first)
        part = narrow @ value_BKLD[:, :, first:stop]
        output_BNLD[:, :, start:stop] = part.view(batch, heads, stop - start, size)
    return output_BNLD


def _unseen(start: int, stop: int, first: int, window: int | None, like: Tensor) -> Tensor:
    """Which keys from `first` to `stop` the queries from `start` to `stop` do not see."""
    age = torch.arange(start, stop, device=like.device).unsqueeze(1)
    age = age - torch.arange(first, stop, device=like.device)
    return age < 0 if window is None else (age < 0) | (age >= window)


def causal_attention_backward(
    grad_BNLD: Tensor,
    query_BNLD: Tensor,
    key_BKLD: Tensor,
    value_BKLD: Tensor,
    output_BNLD: Tensor,
    *,
    scale: float,
    window: int | None,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value; the probabilities are computed again, block by block.

    Scores are float32 products; the other products are in the type of the activations, and the
    sums over blocks in float32.
    """
    batch, heads, length, size = query_BNLD.shape
    groups = key_BKLD.shape[1]
    per = heads // groups
    dtype = query_BNLD.dtype
    wide_key = key_BKLD.float()
    grad_query = torch.empty_like(query_BNLD)
    grad_key = torch.zeros_like(wide_key, memory_format=torch.contiguous_format)
    grad_value = torch.zeros_like(grad_key)
    delta = (grad_BNLD.float() * output_BNLD).sum(-1)
    for start in range(0, length, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, length)
        first = 0 if window is None else max(0, start - window + 1)
        rows, keys = stop - start, slice(first, stop)
        flat = (batch, groups, per * rows, size)
        block = (batch, groups, per, rows, stop - first)
        query = (query_BNLD[:, :, start:stop].float() * scale).reshape(flat)
        grad = grad_BNLD[:, :, start:stop].reshape(flat)
        scores = (query @ wide_key[:, :, keys].transpose(-1, -2)).view(block)
        slope = None
        if softcap:
            turned = scores.div_(softcap).tanh_()
            slope = 1.0 - turned.square()
            scores = turned.mul_(softcap)
        hidden = _unseen(start, stop, first, window, scores)
        probs = scores.masked_fill_(hidden, float("-inf")).softmax(-1)
        narrow = probs.view(*flat[:3], -1).to(dtype)
        grad_value[:, :, keys] += narrow.transpose(-1, -2) @ grad
        inner = (grad @ value_BKLD[:, :, keys].transpose(-1, -2)).view(block).float()
        inner.sub_(delta[:, :, start:stop].reshape(batch, groups, per, rows, 1))
        probs.mul_(inner)
        if slope is not None:
            probs.mul_(slope)
        grad_scores = probs.view(*flat[:3], -1).to(dtype)
        turned = (grad_scores @ key_BKLD[:, :, keys]).mul_(scale)
        grad_query[:, :, start:stop] = turned.view(batch, heads, rows, size)
        grad_key[:, :, keys] += grad_scores.transpose(-1, -2) @ query.to(dtype)
    return grad_query, grad_key.to(dtype), grad_value.to(dtype)


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
