"""The operations as autograd functions: what the decoder calls.

Each keeps for its backward only what is cheaper to keep than to compute again: a norm keeps its
input and one factor a row, the gated unit its stacked input, attention its inputs and output.
A frozen weight never gets a gradient, and an input that needs none gets none.

Letters: T tokens, I input features, O output features (all stacked outputs), R stacked ranks,
M trained positions, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from lorimer.kernels import products, reference
from lorimer.kernels.native import attention as native_attention
from lorimer.kernels.native import elementwise
from lorimer.kernels.native.library import usable
from lorimer.kernels.products import LowRank
from lorimer.kernels.reference import Activation


class Frozen(Protocol):
    """A weight that never changes: the two products that training needs of it, in one type."""

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def nbytes(self) -> int: ...

    def forward(
        self,
        input_TI: Tensor,
        *,
        bias_O: Tensor | None = None,
        onto_TO: Tensor | None = None,
        low_rank: LowRank | None = None,
        down_TR: Tensor | None = None,
    ) -> Tensor: ...

    def input_grad(
        self, grad_TO: Tensor, *, low_rank: LowRank | None = None, grad_down_TR: Tensor | None = None
    ) -> Tensor: ...


class FrozenHead(Protocol):
    """A head that never changes: the loss of hidden states, and its gradient."""

    def head_loss(
        self,
        hidden_MH: Tensor,
        labels_M: Tensor,
        *,
        weight: float,
        smoothing: float,
        need_grad: bool,
        softcap: float = 0.0,
    ) -> tuple[Tensor, Tensor | None]: ...


@dataclass(slots=True)
class Linear:
    """What `project` computes with: a frozen weight, perhaps a bias, perhaps LoRA on top."""

    weight: Frozen
    bias_O: Tensor | None = None
    low_rank: LowRank | None = None


@dataclass(frozen=True, slots=True)
class Norm:
    """RMSNorm, whose weight `offset` is added to, or LayerNorm, on the input of a projection."""

    weight_H: Tensor
    eps: float
    offset: float = 0.0
    layer: bool = False
    bias_H: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Gate:
    """What stands before the down projection: activation(gate) * up of the stacked gate and up outputs, or
    without `gated` the activation of the only output."""

    activation: Activation = "silu"
    gated: bool = True


Before = Norm | Gate | None
Again = Callable[[], Tensor]


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


def _project(
    input_TI: Tensor, residual_TO: Tensor | None, linear: Linear, before: Before, dropout: Dropout | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """y = (residual +) before(x) W^T (+ bias) + dropout(before(x)) A^T (s B)^T, and what a backward
    needs: the norm's factors, and the input times A^T."""
    rstd = down = None
    states = input_TI
    if isinstance(before, Norm):
        states, rstd = _normed(input_TI, before)
    elif isinstance(before, Gate):
        states = _activated(input_TI, before)
    if linear.low_rank is not None:
        down = products.down(dropout(states) if dropout else states, linear.low_rank)
    output = linear.weight.forward(
        states, bias_O=linear.bias_O, onto_TO=residual_TO, low_rank=linear.low_rank, down_TR=down
    )
    return output, rstd, down


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        input_TI: Tensor,
        residual_TO: Tensor | None,
        linear: Linear,
        before: Before,
        dropout: Dropout | None,
        again: Again | None,
        norm_weight: Tensor | None,
        norm_bias: Tensor | None,
        bias_O: Tensor | None,
        *factors: Tensor,
    ) -> Tensor:
        output, rstd, down = _project(input_TI, residual_TO, linear, before, dropout)
        ctx.linear, ctx.before, ctx.dropout, ctx.factors = linear, before, dropout, factors
        ctx.again = again
        ctx.save_for_backward(None if again else input_TI, rstd, down)
        return output

    @staticmethod
    def backward(ctx: Any, grad_TO: Tensor) -> tuple[Any, ...]:
        linear, before, low_rank = ctx.linear, ctx.before, ctx.linear.low_rank
        input_TI, rstd, down = ctx.saved_tensors
        if ctx.again is not None:
            input_TI = ctx.again()
        need_input, need_residual = ctx.needs_input_grad[:2]
        need_norm, need_norm_bias, need_bias = ctx.needs_input_grad[6:9]
        grad_down = products.down_grad(grad_TO, low_rank) if low_rank is not None else None
        grad_input = grad_norm = grad_norm_bias = states = None
        if need_input or need_norm or need_norm_bias:
            grad_input = _states_grad(linear, grad_TO, grad_down, ctx.dropout)
            if isinstance(before, Gate):
                # Its own output again in the same pass: the factors' gradients need it.
                grad_input, states = _activated_backward(
                    grad_input, input_TI, before, again=low_rank is not None
                )
        grad_factors: list[Tensor | None] = []
        if low_rank is not None and grad_down is not None:
            states = _states(before, input_TI, rstd) if states is None else states
            if ctx.dropout:
                states = ctx.dropout(states)
            grad_factors = products.factor_grads(low_rank, states, down, grad_down, grad_TO, ctx.factors)
            del states
        if grad_input is not None and isinstance(before, Norm):
            grad_input, grad_norm, grad_norm_bias = _normed_backward(
                grad_input, input_TI, rstd, before, weight_grad=need_norm or need_norm_bias
            )
        grad_bias = _pointwise(grad_TO).column_sums(grad_TO) if need_bias else None
        return (
            grad_input if need_input else None,
            grad_TO if need_residual else None,
            None,
            None,
            None,
            None,
            grad_norm if need_norm else None,
            grad_norm_bias if need_norm_bias else None,
            grad_bias,
            *grad_factors,
        )


def _pointwise(states: Tensor) -> Any:
    """The module whose norms and units take these states."""
    return elementwise if usable(states) else reference


def _normed(hidden: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
    """The normed states, and what a backward needs of them beside the input."""
    kernels = _pointwise(hidden)
    pair: tuple[Tensor, Tensor]
    if norm.layer:
        pair = kernels.layer_norm(hidden, norm.weight_H, norm.bias_H, norm.eps)
    else:
        pair = kernels.rms_norm(hidden, norm.weight_H, norm.eps, offset=norm.offset)
    return pair


def _normed_again(hidden: Tensor, facts: Tensor | None, norm: Norm) -> Tensor:
    kernels = _pointwise(hidden)
    normed: Tensor
    if norm.layer:
        normed = kernels.layer_norm_apply(hidden, facts, norm.weight_H, norm.bias_H)
    else:
        normed = kernels.rms_norm_apply(hidden, facts, norm.weight_H, offset=norm.offset)
    return normed


def _normed_backward(
    grad: Tensor, hidden: Tensor, facts: Tensor | None, norm: Norm, *, weight_grad: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of the input, and of weight and bias if wanted."""
    kernels = _pointwise(hidden)
    if norm.layer:
        found: tuple[Tensor, Tensor | None, Tensor | None] = kernels.layer_norm_backward(
            grad, hidden, facts, norm.weight_H, weight_grad=weight_grad
        )
        return found
    grad_hidden, grad_weight = kernels.rms_norm_backward(
        grad, hidden, facts, norm.weight_H, weight_grad=weight_grad, offset=norm.offset
    )
    return grad_hidden, grad_weight, None


def _activated(states: Tensor, gate: Gate) -> Tensor:
    kernels = _pointwise(states)
    result: Tensor = (kernels.gated if gate.gated else kernels.activate)(states, gate.activation)
    return result


def _activated_backward(
    grad: Tensor, states: Tensor, gate: Gate, *, again: bool
) -> tuple[Tensor, Tensor | None]:
    """The gradient of its input and, if asked for, its output again."""
    kernels = _pointwise(states)
    backward = kernels.gated_backward if gate.gated else kernels.activate_backward
    pair: tuple[Tensor, Tensor | None] = backward(grad, states, gate.activation, again=again)
    return pair


def _states(before: Before, input_TI: Tensor, rstd: Tensor | None) -> Tensor:
    """What the projection saw, computed again."""
    if isinstance(before, Norm):
        return _normed_again(input_TI, rstd, before)
    if isinstance(before, Gate):
        return _activated(input_TI, before)
    return input_TI


def _states_grad(
    linear: Linear, grad_TO: Tensor, grad_down_TR: Tensor | None, dropout: Dropout | None
) -> Tensor:
    """The gradient of what the projection saw: [T, I]."""
    low_rank = linear.low_rank
    if low_rank is None or grad_down_TR is None or dropout is None:
        return linear.weight.input_grad(grad_TO, low_rank=low_rank, grad_down_TR=grad_down_TR)
    grad_TI = linear.weight.input_grad(grad_TO)
    grad_TI += dropout(grad_down_TR @ low_rank.down_RI)
    return grad_TI


def project(
    input_TI: Tensor,
    linear: Linear,
    *,
    before: Before = None,
    residual_TO: Tensor | None = None,
    dropout: Dropout | None = None,
    norm_parameters: tuple[Tensor | None, Tensor | None] = (None, None),
    bias_parameter: Tensor | None = None,
    factors: tuple[Tensor, ...] = (),
    again: Again | None = None,
) -> Tensor:
    """One input through all linear layers that share it, their LoRA included: [T, O].

    `factors` are the float32 parameters that gradients go to: the stacked A, then each B.
    `norm_parameters` (weight and bias) and `bias_parameter` are given only when those are trained. With
    `again` the input is not kept for the backward, which makes it anew.
    """
    if not torch.is_grad_enabled():
        return _project(input_TI, residual_TO, linear, before, dropout)[0]
    result: Tensor = _Project.apply(  # type: ignore[no-untyped-call]
        input_TI, residual_TO, linear, before, dropout, again, *norm_parameters, bias_parameter, *factors
    )
    return result


def _turned(states_TND: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    rotate = elementwise.rotate if usable(states_TND) else reference.rotate
    return rotate(states_TND, cos_TD, sin_TD)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states_TND: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
        ctx.save_for_backward(cos_TD, sin_TD)
        return _turned(states_TND, cos_TD, sin_TD)

    @staticmethod
    def backward(ctx: Any, grad_TND: Tensor) -> tuple[Any, ...]:
        cos_TD, sin_TD = ctx.saved_tensors
        return _turned(grad_TND, cos_TD, -sin_TD), None, None


def rotate(states_TND: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    """Rotary position embedding; see reference.rotate."""
    if not torch.is_grad_enabled():
        return _turned(states_TND, cos_TD, sin_TD)
    result: Tensor = _Rotate.apply(states_TND, cos_TD, sin_TD)  # type: ignore[no-untyped-call]
    return result


class _TurnAndAttend(torch.autograd.Function):
    """Rotation and attention of a pack, on the stacked query, key and value where they lie."""

    @staticmethod
    def forward(
        ctx: Any, stacked_TS: Tensor, heads: Heads, turn: Turn | None, rows: Rows, scores: Scores
    ) -> Tensor:
        # Its producer keeps nothing of this buffer, and nothing else reads it before it has turned.
        query, key, value = turned(stacked_TS.detach(), heads, turn)
        output, lse = native_attention.forward(
            query, key, value, rows.offsets, rows.prefix, **scores._asdict()
        )
        ctx.given = heads, turn, rows, scores
        ctx.save_for_backward(stacked_TS.detach(), output, lse)
        return output.flatten(1)

    @staticmethod
    def backward(ctx: Any, grad_TA: Tensor) -> tuple[Any, ...]:
        stacked, output, lse = ctx.saved_tensors
        heads, turn, rows, scores = ctx.given
        query, key, value = heads.parts(stacked)
        grad = native_attention.backward(
            grad_TA.view(output.shape),
            query,
            key,
            value,
            output,
            lse,
            rows.offsets,
            rows.prefix,
            **scores._asdict(),
        )
        if turn is not None:
            elementwise.rotate_in_place(heads.turning(grad), turn.cos_TF, turn.sin_TF, backward=True)
        return grad, None, None, None, None


class Heads(NamedTuple):
    """How many query heads, key/value heads, and features of each."""

    query: int
    key_value: int
    size: int

    def parts(self, stacked_TS: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query [T, N, D], key and value [T, K, D] as views of the stacked outputs."""
        sizes = (self.query * self.size, self.key_value * self.size, self.key_value * self.size)
        counts = (self.query, self.key_value, self.key_value)
        parts = stacked_TS.split(sizes, -1)
        query, key, value = (
            part.unflatten(-1, (n, self.size)) for part, n in zip(parts, counts, strict=True)
        )
        return query, key, value

    def turning(self, stacked_TS: Tensor) -> Tensor:
        """Query and key, which turn alike, as one view [T, N + K, D]."""
        heads = self.query + self.key_value
        both: Tensor = stacked_TS[:, : heads * self.size].unflatten(-1, (heads, self.size))
        return both


class Turn(NamedTuple):
    """cos and sin [T, F] of each token's position."""

    cos_TF: Tensor
    sin_TF: Tensor


class Scores(NamedTuple):
    """What becomes of query times key: scaled, capped (0 for not), and seen `window` positions back."""

    scale: float
    window: int | None = None
    softcap: float = 0.0


class Rows(Protocol):
    """The rows of a pack: `offsets` int64 [rows + 1] of their first tokens, behind a shared prefix."""

    @property
    def offsets(self) -> Tensor: ...

    @property
    def prefix(self) -> int: ...


def turned(stacked_TS: Tensor, heads: Heads, turn: Turn | None) -> tuple[Tensor, Tensor, Tensor]:
    """Query and key with their rotary embedding, and value, without gradients. The native kernel turns
    them where they lie: whoever made them must not need them unturned. Without `turn` they stay."""
    if turn is None:
        return heads.parts(stacked_TS)
    if usable(stacked_TS):
        elementwise.rotate_in_place(heads.turning(stacked_TS), turn.cos_TF, turn.sin_TF)
        return heads.parts(stacked_TS)
    query, key, value = heads.parts(stacked_TS)
    return _turned(query, *turn), _turned(key, *turn), value


class HeadNorms(NamedTuple):
    """Norms of query and key, alike but for their weights: RMSNorm over each head, or over all heads of a
    token as one (`whole`); or LayerNorm over each head with a frozen weight of its `own`, [heads, D]."""

    query: Norm
    key: Norm
    whole: bool = False
    own: bool = False

    def rows(self, heads: Heads) -> tuple[tuple[int, int], tuple[int, int]]:
        """How many rows each token's query and key are, of how many features."""
        if self.whole:
            return (1, heads.query * heads.size), (1, heads.key_value * heads.size)
        return (heads.query, heads.size), (heads.key_value, heads.size)


class _NormHeads(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        stacked_TS: Tensor,
        norms: HeadNorms,
        heads: Heads,
        query_weight: Tensor | None,
        key_weight: Tensor | None,
    ) -> Tensor:
        weights = norms.query.weight_H, norms.key.weight_H
        normed_TS, rstd = elementwise.query_key_norm(
            stacked_TS, *norms.rows(heads), weights, norms.query.eps, offset=norms.query.offset
        )
        ctx.given = norms, heads
        ctx.save_for_backward(stacked_TS, rstd)
        return normed_TS

    @staticmethod
    def backward(ctx: Any, grad_TS: Tensor) -> tuple[Any, ...]:
        stacked_TS, rstd = ctx.saved_tensors
        norms, heads = ctx.given
        query, key = norms.rows(heads)
        weights = norms.query.weight_H, norms.key.weight_H
        grad, grad_query, grad_key = elementwise.query_key_norm_backward(
            *(grad_TS, stacked_TS, rstd, query, key, weights),
            norms.query.offset,
            ctx.needs_input_grad[3:5],
        )
        return grad, None, None, grad_query, grad_key


def norm_heads(
    stacked_TS: Tensor,
    heads: Heads,
    norms: HeadNorms,
    parameters: tuple[Tensor | None, Tensor | None] = (None, None),
) -> Tensor:
    """Query and key normed, and value, stacked as they were; `parameters` (both weights) only when trained.

    Without gradients the native kernel writes over the stack: whoever made it must not need it as it was.
    """
    if norms.own:
        return _own_normed(stacked_TS, heads, norms)
    assert not norms.query.layer
    assert not norms.key.layer
    query, key = norms.rows(heads)
    if usable(stacked_TS):
        if torch.is_grad_enabled():
            result: Tensor = _NormHeads.apply(  # type: ignore[no-untyped-call]
                stacked_TS, norms, heads, *parameters
            )
            return result
        weights = norms.query.weight_H, norms.key.weight_H
        how: Any = {"offset": norms.query.offset, "in_place": True}
        return elementwise.query_key_norm(stacked_TS, query, key, weights, norms.query.eps, **how)[0]
    states_query, states_key, value = heads.parts(stacked_TS)
    sides = [
        normed(states_query.reshape(-1, *query), norms.query, (parameters[0], None)),
        normed(states_key.reshape(-1, *key), norms.key, (parameters[1], None)),
    ]
    return torch.cat([part.flatten(1) for part in (*sides, value)], 1)


def _own_normed(stacked_TS: Tensor, heads: Heads, norms: HeadNorms) -> Tensor:
    """The kernel knows one weight for all rows: it norms alone, and each head is weighted behind it."""
    query, key, value = heads.parts(stacked_TS)
    ones = torch.ones(heads.size, device=stacked_TS.device)
    sides = []
    for states_TND, norm in ((query, norms.query), (key, norms.key)):
        plain = normed(states_TND.contiguous(), Norm(ones, norm.eps, layer=True))
        sides.append((plain * norm.weight_H).to(stacked_TS.dtype))
    return torch.cat([part.flatten(1) for part in (*sides, value)], 1)


def attends(states: Tensor, heads: Heads) -> bool:
    """Whether `turn_and_attend` takes these."""
    return usable(states) and native_attention.takes(heads.size)


def turn_and_attend(
    stacked_TS: Tensor, heads: Heads, turn: Turn | None, rows: Rows, scores: Scores
) -> Tensor:
    """Rotary embedding and causal attention of every row to its prefix and itself: [T, N * D].

    The stacked query and key are turned where they lie: whoever made them must not need them unturned.
    """
    result: Tensor = _TurnAndAttend.apply(  # type: ignore[no-untyped-call]
        stacked_TS, heads, turn, rows, scores
    )
    return result


class _Norm(torch.autograd.Function):
    """A norm over the last dimension on its own: of query and key, after a part, the final one."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, norm: Norm, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        normed, facts = _normed(hidden, norm)
        ctx.norm = norm
        ctx.save_for_backward(hidden, facts)
        return normed

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        hidden, facts = ctx.saved_tensors
        _, _, need_weight, need_bias = ctx.needs_input_grad
        grad_hidden, grad_weight, grad_bias = _normed_backward(
            grad, hidden, facts, ctx.norm, weight_grad=need_weight or need_bias
        )
        return grad_hidden, None, grad_weight if need_weight else None, grad_bias if need_bias else None


def normed(
    hidden: Tensor, norm: Norm, parameters: tuple[Tensor | None, Tensor | None] = (None, None)
) -> Tensor:
    """The norm over the last dimension of [..., H]; `parameters` (weight and bias) only when trained."""
    if not torch.is_grad_enabled():
        return _normed(hidden, norm)[0]
    result: Tensor = _Norm.apply(hidden, norm, *parameters)  # type: ignore[no-untyped-call]
    return result


class _AddNormed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, residual: Tensor, states: Tensor, norm: Norm, weight: Tensor | None) -> Tensor:
        result, rstd = _onto(residual, states, norm)
        ctx.norm = norm
        ctx.save_for_backward(states, rstd)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        states, rstd = ctx.saved_tensors
        grad_states, grad_weight, _ = _normed_backward(
            grad, states, rstd, ctx.norm, weight_grad=ctx.needs_input_grad[3]
        )
        return grad, grad_states, None, grad_weight


def _onto(residual: Tensor, states: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
    pair: tuple[Tensor, Tensor] = _pointwise(states).rms_norm(
        states, norm.weight_H, norm.eps, offset=norm.offset, onto_TH=residual
    )
    return pair


def add_normed(
    residual: Tensor,
    states: Tensor,
    norm: Norm,
    parameters: tuple[Tensor | None, Tensor | None] = (None, None),
) -> Tensor:
    """residual + norm(states), which is not rounded in between; `parameters` as for `normed`."""
    if norm.layer:
        return add_scaled(residual, normed(states, norm, parameters))
    if not torch.is_grad_enabled():
        return _onto(residual, states, norm)[0]
    result: Tensor = _AddNormed.apply(  # type: ignore[no-untyped-call]
        residual, states, norm, parameters[0]
    )
    return result


class _AddScaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, residual: Tensor | None, states: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        result: Tensor = _pointwise(states).add_scaled(residual, states, scale)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        need_residual, need_states = ctx.needs_input_grad[:2]
        scaled_grad = grad
        if need_states and ctx.scale != 1.0:
            scaled_grad = _pointwise(grad).add_scaled(None, grad, ctx.scale)
        return grad if need_residual else None, scaled_grad if need_states else None, None


def add_scaled(residual: Tensor | None, states: Tensor, scale: float = 1.0) -> Tensor:
    """residual + scale * states of one shape, rounded once."""
    if torch.is_grad_enabled():
        result: Tensor = _AddScaled.apply(residual, states, scale)  # type: ignore[no-untyped-call]
    else:
        result = _pointwise(states).add_scaled(residual, states, scale)
    return result


def scaled(states: Tensor, factor: float) -> Tensor:
    """factor * states."""
    return add_scaled(None, states, factor)


class _Head(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_MH: Tensor,
        trained_VH: Tensor | None,
        frozen: FrozenHead | None,
        labels_M: Tensor,
        weight: float,
        smoothing: float,
        softcap: float,
    ) -> tuple[Tensor, Tensor]:
        need_grad, need_head_grad = ctx.needs_input_grad[:2]
        grad_MH = grad_VH = None
        if frozen is not None:
            losses_M, grad_MH = frozen.head_loss(
                *(hidden_MH, labels_M),
                weight=weight,
                smoothing=smoothing,
                need_grad=need_grad,
                softcap=softcap,
            )
        else:
            assert trained_VH is not None
            head_VH = trained_VH.detach().to(hidden_MH.dtype)
            if need_head_grad:
                losses_M, grad_MH, grad_VH = reference.cross_entropy_head(
                    *(hidden_MH, head_VH, labels_M),
                    weight=weight,
                    smoothing=smoothing,
                    softcap=softcap,
                    need_head_grad=True,
                )
            else:
                losses_M, grad_MH = products.head_loss(
                    *(hidden_MH, head_VH, labels_M),
                    weight=weight,
                    smoothing=smoothing,
                    softcap=softcap,
                    need_grad=need_grad,
                )
        ctx.save_for_backward(grad_MH, grad_VH)
        ctx.mark_non_differentiable(losses_M)
        return losses_M.sum() * weight, losses_M

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Any, ...]:
        grad_MH, grad_VH = ctx.saved_tensors
        return (
            None if grad_MH is None else grad_MH * grad,
            None if grad_VH is None else grad_VH * grad,
            None,
            None,
            None,
            None,
            None,
        )


def head_loss(
    hidden_MH: Tensor,
    head: Tensor | FrozenHead,
    labels_M: Tensor,
    *,
    weight: float,
    smoothing: float = 0.0,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """weight * sum of the losses (differentiable), and the float32 losses of each position.

    The head is a frozen weight, or a float32 copy [V, H] that is trained.
    """
    trained, frozen = (head, None) if isinstance(head, Tensor) else (None, head)
    loss, losses_M = _Head.apply(  # type: ignore[no-untyped-call]
        hidden_MH, trained, frozen, labels_M, weight, smoothing, softcap
    )
    return loss, losses_M
