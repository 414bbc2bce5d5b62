"""What training puts on a frozen embedding or head: LoRA, or a few rows of its own.

    W + scale * up down     or     W with the rows at some ids replaced

The update is never added to W: as in the layers, early updates are smaller than one unit in the last place
of a bf16 weight. A head's logits exist for a few positions at a time, so memory does not grow with M * V.

Letters: T tokens, M trained positions, V vocabulary, H hidden, R rank, K rows of their own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from lorimer.kernels.dispatch import Dropout
from lorimer.kernels.reference import HEAD_CHUNK, loss_of_logits


class Frozen(Protocol):
    """A head that never changes."""

    @property
    def dtype(self) -> torch.dtype: ...

    def logits(self, states_MI: Tensor) -> Tensor: ...

    def input_grad(self, grad_TO: Tensor) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class LowRankTable:
    """LoRA in float32. Of an embedding A is [R, V] and B [H, R], of a head A is [R, H] and B [V, R]."""

    a: Tensor
    b: Tensor
    scale: float
    embedding: bool

    def rows(self, ids_T: Tensor) -> Tensor:
        """What is added to an embedding's rows: [T, H]."""
        return (self.a.index_select(1, ids_T).t() @ self.b.t()) * self.scale


@dataclass(frozen=True, slots=True)
class OwnRows:
    """Rows in float32 in place of those at these ids; `places_V` says for each id which, -1 for none."""

    ids_K: Tensor
    rows_KH: Tensor
    places_V: Tensor

    def onto(self, rows_TH: Tensor, ids_T: Tensor) -> Tensor:
        """An embedding's rows with its own put in."""
        places_T = self.places_V.index_select(0, ids_T)
        found = (places_T >= 0).nonzero().squeeze(1)
        own = self.rows_KH.index_select(0, places_T.index_select(0, found))
        return rows_TH.index_copy(0, found, own.to(rows_TH.dtype))


@dataclass(frozen=True, slots=True)
class TableUpdate:
    """One of the two, or neither."""

    low_rank: LowRankTable | None = None
    own: OwnRows | None = None

    def rows(self, rows_TH: Tensor, ids_T: Tensor) -> Tensor:
        """The rows of an embedding with the update, in the type of the frozen ones."""
        if self.low_rank is not None:
            return (rows_TH.float() + self.low_rank.rows(ids_T)).to(rows_TH.dtype)
        return rows_TH if self.own is None else self.own.onto(rows_TH, ids_T)

    def onto_logits(self, logits: Tensor, states: Tensor, bias_V: Tensor | None) -> Tensor:
        """Logits [..., V] of the frozen head, whose bias is `bias_V`, with the update; by autograd."""
        if self.low_rank is not None:
            factors = self.low_rank
            more = (states.float() @ factors.a.t() @ factors.b.t()) * factors.scale
            return (logits.float() + more).to(logits.dtype)
        if self.own is None:
            return logits
        ids_K = self.own.ids_K
        own = states @ self.own.rows_KH.to(states.dtype).t()
        own = own if bias_V is None else own + bias_V[ids_K]
        return logits.index_copy(-1, ids_K, own.to(logits.dtype))


@dataclass(frozen=True, slots=True)
class UpdatedHead:
    """A frozen head and what training puts on it."""

    frozen: Frozen
    update: TableUpdate
    dropout: Dropout | None = None  # on the input of LoRA

    def logits(self, states_MH: Tensor) -> Tensor:
        """Float32 [M, V]."""
        logits_MV, low_rank, own = self.frozen.logits(states_MH), self.update.low_rank, self.update.own
        if low_rank is not None:
            down_MR = self._dropped(states_MH).float() @ low_rank.a.t()
            logits_MV.addmm_(down_MR, low_rank.b.t(), alpha=low_rank.scale)
        if own is not None:
            logits_MV[:, own.ids_K] = (states_MH @ own.rows_KH.to(states_MH.dtype).t()).float()
        return logits_MV

    def _dropped(self, states_MH: Tensor) -> Tensor:
        return self.dropout(states_MH) if self.dropout else states_MH

    def loss(
        self, hidden_MH: Tensor, labels_M: Tensor, *, weight: float, smoothing: float, softcap: float
    ) -> tuple[Tensor, Tensor]:
        """weight * sum of the losses (differentiable), and the losses of each position."""
        loss, losses_M = _Loss.apply(  # type: ignore[no-untyped-call]
            *(hidden_MH, self, labels_M, (weight, smoothing, softcap), torch.is_grad_enabled()),
            *self.parameters(),
        )
        return loss, losses_M

    def parameters(self) -> tuple[Tensor, ...]:
        low_rank, own = self.update.low_rank, self.update.own
        factors = () if low_rank is None else (low_rank.a, low_rank.b)
        return factors if own is None else (*factors, own.rows_KH)

    def part(self, rows: slice) -> UpdatedHead:
        """The same for some of the positions."""
        if self.dropout is None:
            return self
        return UpdatedHead(
            self.frozen, self.update, Dropout(self.dropout.pool_PI, self.dropout.picks_T[rows])
        )

    def back(self, grad_MV: Tensor, states_MH: Tensor, grads: list[Tensor]) -> Tensor:
        """The gradient of the states from that of the logits, which is overwritten; those of the parameters
        are added to `grads`."""
        more_MH, low_rank, own = None, self.update.low_rank, self.update.own
        if low_rank is not None:
            dropped = self._dropped(states_MH).float()
            grad_MR = (grad_MV @ low_rank.b).mul_(low_rank.scale)
            grads[0].addmm_(grad_MR.t(), dropped)
            grads[1].addmm_(grad_MV.t(), dropped @ low_rank.a.t(), alpha=low_rank.scale)
            more_MH = self._dropped(grad_MR @ low_rank.a)
        if own is not None:
            grad_MK = grad_MV[:, own.ids_K]
            grads[-1].addmm_(grad_MK.t(), states_MH.float())
            more_MH = grad_MK @ own.rows_KH if more_MH is None else more_MH + grad_MK @ own.rows_KH
            grad_MV[:, own.ids_K] = 0.0
        found_MH = self.frozen.input_grad(grad_MV.to(states_MH.dtype))
        return found_MH if more_MH is None else (found_MH.float() + more_MH).to(states_MH.dtype)


class _Loss(torch.autograd.Function):
    """Everything is computed in the forward pass, as in the heads without an update."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_MH: Tensor,
        head: UpdatedHead,
        labels_M: Tensor,
        how: tuple[float, float, float],
        need_grad: bool,
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor]:
        weight, smoothing, softcap = how
        losses_M = torch.empty(len(hidden_MH), dtype=torch.float32, device=hidden_MH.device)
        grad_MH = torch.empty_like(hidden_MH) if need_grad else None
        grads = [torch.zeros_like(value) for value in parameters] if need_grad else []
        for start in range(0, len(hidden_MH), HEAD_CHUNK):
            part = slice(start, start + HEAD_CHUNK)
            here, states_MH = head.part(part), hidden_MH[part]
            losses_M[part], grad_MV = loss_of_logits(
                here.logits(states_MH),
                labels_M[part],
                smoothing=smoothing,
                softcap=softcap,
                need_grad=need_grad,
            )
            if grad_MV is not None and grad_MH is not None:
                grad_MH[part] = here.back(grad_MV, states_MH, grads)
        ctx.weight = weight
        ctx.save_for_backward(grad_MH, *grads)
        ctx.mark_non_differentiable(losses_M)
        return losses_M.sum() * weight, losses_M

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Any, ...]:
        grad_MH, *grads = ctx.saved_tensors
        factor = grad * ctx.weight
        return grad_MH * factor, None, None, None, None, *(value * factor for value in grads)
