"""What a decoder is made of: projections, norms, tables, layers. Each is frozen, with a place for what
training puts on it.

Letters: T tokens, H hidden, I input features, O output features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lorimer.kernels import dispatch
from lorimer.kernels.dispatch import Before, Dropout, Gate, Linear, Norm
from lorimer.kernels.tables import TableUpdate
from lorimer.quant.linear import FrozenLinear

# For a projection group's number, input size and tokens: the masks for its adapters' input.
Dropouts = Callable[[int, int, int], Dropout]


@dataclass(slots=True)
class Adapted:
    """What training puts in place of a frozen group: the same weight with LoRA, biases trained.

    `factors` are the parameters: the stacked A, then each B. `biases` are the biases of each output,
    trained or not, if at least one is trained.
    """

    linear: Linear
    factors: tuple[Tensor, ...] = ()
    biases: tuple[Tensor, ...] = ()


@dataclass(slots=True)
class Projections:
    """Linear layers that share one input, stacked into one weight: query, key and value, say.

    `path` and `names` are Hugging Face's, `rows` the outputs of each; `number` is unique in the model.
    `order_O` says which row of the files each row of the stack is, where these differ.
    """

    path: str
    names: tuple[str, ...]
    rows: tuple[int, ...]
    inputs: int
    number: int
    linear: Linear
    layer: int = 0
    attention: bool = False
    order_O: Tensor | None = None
    adapted: Adapted | None = None
    learns: bool = True  # whether a gradient reaches it

    @property
    def name(self) -> str:
        """The path with all names, `model.layers.0.mlp.gate_proj/up_proj`."""
        return f"{self.path}.{'/'.join(self.names)}"

    def order(self, position: int) -> Tensor | None:
        """The same for the rows of one of its linear layers, counted from its own first."""
        if self.order_O is None:
            return None
        first = sum(self.rows[:position])
        return self.order_O[first : first + self.rows[position]] - first

    def __call__(
        self,
        input_TI: Tensor,
        *,
        before: NormSlot | Gate | None,
        residual_TO: Tensor | None,
        adapted: bool,
        dropouts: Dropouts | None,
        again: Callable[[], Tensor] | None = None,
    ) -> Tensor:
        """`again` makes the input once more in the backward, which then keeps nothing of it."""
        chosen = self.adapted if adapted and self.adapted else Adapted(self.linear)
        drop = (
            dropouts(self.number, self.inputs, len(input_TI))
            if dropouts and chosen.linear.low_rank
            else None
        )
        norm = before.norm(adapted) if isinstance(before, NormSlot) else None
        rule: Before = norm if norm is not None else before if isinstance(before, Gate) else None
        return dispatch.project(
            input_TI,
            chosen.linear,
            before=rule,
            residual_TO=residual_TO,
            dropout=drop,
            norm_parameters=before.parameters(adapted) if isinstance(before, NormSlot) else (None, None),
            bias_parameter=torch.cat(chosen.biases) if chosen.biases else None,
            factors=chosen.factors,
            again=again,
        )


@dataclass(slots=True)
class NormSlot:
    """A norm's weight and bias, and the trained copies that replace them where there are some."""

    path: str
    frozen: Norm
    trained: Tensor | None = None
    trained_bias: Tensor | None = None

    @property
    def weight_H(self) -> Tensor:
        return self.frozen.weight_H

    def norm(self, adapted: bool) -> Norm:
        frozen = self.frozen
        if not adapted or (self.trained is None and self.trained_bias is None):
            return frozen
        weight = frozen.weight_H if self.trained is None else self.trained.detach()
        bias = frozen.bias_H if self.trained_bias is None else self.trained_bias.detach()
        return Norm(weight, frozen.eps, frozen.offset, frozen.layer, bias)

    def parameters(self, adapted: bool) -> tuple[Tensor | None, Tensor | None]:
        return (self.trained, self.trained_bias) if adapted else (None, None)

    def __call__(self, hidden: Tensor, adapted: bool) -> Tensor:
        return dispatch.normed(hidden, self.norm(adapted), self.parameters(adapted))

    def added(self, residual: Tensor, states: Tensor, adapted: bool) -> Tensor:
        """The residual plus the normed states."""
        return dispatch.add_normed(residual, states, self.norm(adapted), self.parameters(adapted))


@dataclass(slots=True)
class Table:
    """The embedding, the positions or the head: a frozen weight, and the trained copy that replaces it."""

    path: str
    weight: FrozenLinear
    trained: Tensor | None = None
    update: TableUpdate | None = None  # what is trained of it, where it is not trained in full

    def rows(self, ids_T: Tensor, dtype: torch.dtype, *, adapted: bool) -> Tensor:
        if adapted and self.trained is not None:
            return torch.nn.functional.embedding(ids_T, self.trained).to(dtype)
        rows_TH = self.weight.rows(ids_T)
        return self.update.rows(rows_TH, ids_T) if adapted and self.update else rows_TH


@dataclass(slots=True)
class Experts:
    """A mixture: the router's weight (float32 [experts, H]), and each expert's two projections."""

    path: str
    router_EH: Tensor
    pairs: list[tuple[Projections, Projections]]
    chosen: int
    renormalise: bool


@dataclass(slots=True)
class Layer:
    """One layer. Norms that the architecture does not have are None; `turn` is the number of its rope."""

    attention_norm: NormSlot | None
    qkv: Projections
    query_norm: NormSlot | None
    key_norm: NormSlot | None
    output: Projections
    attention_post_norm: NormSlot | None
    mlp_norm: NormSlot | None
    mlp: tuple[Projections, Projections] | Experts
    mlp_post_norm: NormSlot | None
    window: int | None
    turn: int | None

    def projections(self) -> tuple[Projections, ...]:
        pairs = self.mlp.pairs if isinstance(self.mlp, Experts) else [self.mlp]
        return (self.qkv, self.output, *(group for pair in pairs for group in pair))

    def norms(self) -> list[NormSlot]:
        """Those that can be trained; what each head has of its own stays as it is."""
        heads = [slot for slot in (self.query_norm, self.key_norm) if slot and slot.weight_H.dim() == 1]
        slots = (
            *(self.attention_norm, *heads),
            *(self.attention_post_norm, self.mlp_norm, self.mlp_post_norm),
        )
        found: dict[str, NormSlot] = {slot.path: slot for slot in slots if slot is not None}
        return list(found.values())
