"""Norms, rotation, units, sums, AdamW and copies in C++, with the words of PyTorch around them.

Tensors are on the CPU, states in bf16 or fp32; arithmetic is in float32 and each result rounded once.
States may be views of a wider buffer, as long as each token's features lie in one piece. Results do
not depend on the number of threads. The definitions are in reference.py.

Letters: T tokens, H hidden, I intermediate, N heads, D head size, F turning pairs, O outputs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lorimer.kernels import workspace
from lorimer.kernels.native.library import Kernel
from lorimer.kernels.reference import Activation

_rms_norm = Kernel("rms_norm", "plp" + "plplp" + "lll" + "ffii")
_rms_norm_apply = Kernel("rms_norm_apply", "plpppl" + "lll" + "fii")
_rms_norm_backward = Kernel("rms_norm_backward", "pli" + "plpp" + "plplp" + "lll" + "fii")
_query_key_norm = Kernel("query_key_norm", "plpp" + "plp" + "llllll" + "ffii")
_query_key_norm_backward = Kernel("query_key_norm_backward", "plplppp" + "plpp" + "llllll" + "fii")
_layer_norm = Kernel("layer_norm", "plpp" + "plp" + "lll" + "fii")
_layer_norm_apply = Kernel("layer_norm_apply", "plppp" + "pl" + "lll" + "ii")
_layer_norm_backward = Kernel("layer_norm_backward", "plplpp" + "plp" + "lll" + "ii")
_rotate = Kernel("rotate", "pl" + "ppi" + "pl" + "llll" + "fii")
_gated = Kernel("gated", "pp" + "ll" + "iii")
_gated_backward = Kernel("gated_backward", "pppp" + "ll" + "iii")
_activate = Kernel("activate", "pp" + "l" + "iii")
_activate_backward = Kernel("activate_backward", "pppp" + "l" + "iii")
_add_scaled = Kernel("add_scaled", "ppp" + "fl" + "ii")
_adamw = Kernel("adamw", "pppp" + "ll" + "ffffffff" + "i")
_squared_norm = Kernel("squared_norm", "plpi")
_scaled_copies = Kernel("scaled_copies", "pplii")
_column_sums = Kernel("column_sums", "plpllii")

Rows = tuple[int, int]  # how many rows a token has, of how many features
BF16 = torch.bfloat16
_KINDS = {"silu": 0, "gelu_tanh": 1, "gelu": 2, "relu": 3}


def _tokens(states: Tensor) -> Tensor:
    """[T, H] or [T, N, D] with each token in one piece: itself if it is so, else a copy."""
    expected = 1
    for size, stride in zip(reversed(states.shape[1:]), reversed(states.stride()[1:]), strict=True):
        if size > 1 and stride != expected:
            return states.contiguous()
        expected *= size
    return states


def _shape(states: Tensor) -> tuple[int, int, int]:
    """Tokens, rows of each token, features of a row."""
    return states.shape[0], math.prod(states.shape[1:-1]), states.shape[-1]


def rms_norm(
    hidden_TH: Tensor, weight_H: Tensor, eps: float, *, offset: float = 0.0, onto_TH: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Root mean square norm over the last dimension of [T, H] or [T, N, D], times weight + offset.

    Added to `onto_TH`, of the states' type, before it is rounded, if that is given. See reference.rms_norm;
    the factor that the backward needs is float32 [T, 1] or [T, N, 1].
    """
    hidden_TH = _tokens(hidden_TH)
    onto_TH = None if onto_TH is None else _tokens(onto_TH)
    assert onto_TH is None or (onto_TH.shape, onto_TH.dtype) == (hidden_TH.shape, hidden_TH.dtype)
    out_TH = workspace.empty(hidden_TH.shape, hidden_TH.dtype)
    rstd_T1 = torch.empty((*hidden_TH.shape[:-1], 1), dtype=torch.float32)
    _rms_norm(
        *(hidden_TH, hidden_TH.stride(0), _factors(weight_H)),
        *(onto_TH, 0 if onto_TH is None else onto_TH.stride(0), out_TH, out_TH.stride(0), rstd_T1),
        *(*_shape(hidden_TH), eps, offset, hidden_TH.dtype == BF16, torch.get_num_threads()),
    )
    return out_TH, rstd_T1


def rms_norm_apply(hidden_TH: Tensor, rstd_T1: Tensor, weight_H: Tensor, *, offset: float = 0.0) -> Tensor:
    """The normed states again from the saved factor, bit for bit."""
    hidden_TH = _tokens(hidden_TH)
    out_TH = workspace.empty(hidden_TH.shape, hidden_TH.dtype)
    _rms_norm_apply(
        *(hidden_TH, hidden_TH.stride(0), rstd_T1.contiguous(), _factors(weight_H)),
        *(out_TH, out_TH.stride(0), *_shape(hidden_TH)),
        *(offset, hidden_TH.dtype == BF16, torch.get_num_threads()),
    )
    return out_TH


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
    """Gradients of the norm's input, added to `onto_TH` before it is rounded, and of its weight.

    `grad_TH` is float32 or of the type of `hidden_TH`, `onto_TH` (the residual's gradient, say) of
    that type. The weight's gradient is float32, None if not asked for.
    """
    grad_TH, hidden_TH = _tokens(grad_TH), _tokens(hidden_TH)
    onto_TH = None if onto_TH is None else _tokens(onto_TH)
    out_TH = workspace.empty(hidden_TH.shape, hidden_TH.dtype)
    grad_weight_H = torch.empty(hidden_TH.shape[-1], dtype=torch.float32) if weight_grad else None
    _rms_norm_backward(
        *(grad_TH, grad_TH.stride(0), grad_TH.dtype == torch.float32),
        *(hidden_TH, hidden_TH.stride(0), rstd_T1.contiguous(), _factors(weight_H)),
        *(onto_TH, 0 if onto_TH is None else onto_TH.stride(0), out_TH, out_TH.stride(0)),
        *(grad_weight_H, *_shape(hidden_TH), offset),
        *(hidden_TH.dtype == BF16, torch.get_num_threads()),
    )
    return out_TH, grad_weight_H


def _factors(weight_H: Tensor) -> Tensor:
    return weight_H.float().contiguous()


def _stack(stacked_TS: Tensor, query: Rows, key: Rows) -> tuple[int, ...]:
    """Tokens, rows and features of query and of key, and the features after them."""
    tokens, features = stacked_TS.shape
    rest = features - math.prod(query) - math.prod(key)
    assert rest >= 0, "query and key are wider than the stack"
    return tokens, *query, *key, rest


def query_key_norm(
    stacked_TS: Tensor,
    query: Rows,
    key: Rows,
    weights: tuple[Tensor, Tensor],
    eps: float,
    *,
    offset: float = 0.0,
    in_place: bool = False,
) -> tuple[Tensor, Tensor]:
    """RMSNorm of the rows of query, then of key, in a stacked [T, S]; what follows them stays as it is.

    `query` and `key` say how many rows of how many features each token has. Also the float32 factors that
    the backward needs. `in_place` writes over the stack, of which each token must lie in one piece.
    """
    assert not in_place or _tokens(stacked_TS) is stacked_TS
    stacked_TS = _tokens(stacked_TS)
    shape = _stack(stacked_TS, query, key)
    assert (weights[0].numel(), weights[1].numel()) == (query[1], key[1])
    out_TS = stacked_TS if in_place else workspace.empty(stacked_TS.shape, stacked_TS.dtype)
    rstd = torch.empty(len(stacked_TS) * (query[0] + key[0]), dtype=torch.float32)
    _query_key_norm(
        *(
            stacked_TS,
            stacked_TS.stride(0),
            _factors(weights[0]),
            _factors(weights[1]),
            out_TS,
            out_TS.stride(0),
            rstd,
        ),
        *(*shape, eps, offset, stacked_TS.dtype == BF16, torch.get_num_threads()),
    )
    return out_TS, rstd


def query_key_norm_backward(
    grad_TS: Tensor,
    stacked_TS: Tensor,
    rstd: Tensor,
    query: Rows,
    key: Rows,
    weights: tuple[Tensor, Tensor],
    offset: float = 0.0,
    weight_grads: tuple[bool, bool] = (False, False),
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of the stack before its norms and, where asked for, of both weights (float32)."""
    grad_TS, stacked_TS = _tokens(grad_TS), _tokens(stacked_TS)
    assert (grad_TS.shape, grad_TS.dtype) == (stacked_TS.shape, stacked_TS.dtype)
    shape = _stack(stacked_TS, query, key)
    out_TS = workspace.empty(stacked_TS.shape, stacked_TS.dtype)
    found = [
        torch.empty(size, dtype=torch.float32) if wanted else None
        for (_, size), wanted in zip((query, key), weight_grads, strict=True)
    ]
    _query_key_norm_backward(
        *(
            grad_TS,
            grad_TS.stride(0),
            stacked_TS,
            stacked_TS.stride(0),
            rstd,
            _factors(weights[0]),
            _factors(weights[1]),
        ),
        *(out_TS, out_TS.stride(0), *found),
        *(*shape, offset, stacked_TS.dtype == BF16, torch.get_num_threads()),
    )
    return out_TS, found[0], found[1]


def layer_norm(
    hidden_TH: Tensor, weight_H: Tensor, bias_H: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """LayerNorm over the last dimension of [T, H] or [T, N, D]; see reference.layer_norm.

    Also, float32, the mean and the factor of each row, [T, 2] or [T, N, 2], which the backward needs.
    """
    hidden_TH = _tokens(hidden_TH)
    out_TH = workspace.empty(hidden_TH.shape, hidden_TH.dtype)
    facts_T2 = torch.empty((*hidden_TH.shape[:-1], 2), dtype=torch.float32)
    _layer_norm(
        *(hidden_TH, hidden_TH.stride(0), _factors(weight_H), None if bias_H is None else _factors(bias_H)),
        *(out_TH, out_TH.stride(0), facts_T2, *_shape(hidden_TH), eps),
        *(hidden_TH.dtype == BF16, torch.get_num_threads()),
    )
    return out_TH, facts_T2


def layer_norm_apply(
    hidden_TH: Tensor, facts_T2: Tensor, weight_H: Tensor, bias_H: Tensor | None
) -> Tensor:
    """The normed states again from the saved mean and factor, bit for bit."""
    hidden_TH = _tokens(hidden_TH)
    out_TH = workspace.empty(hidden_TH.shape, hidden_TH.dtype)
    _layer_norm_apply(
        *(hidden_TH, hidden_TH.stride(0), facts_T2.contiguous()),
        *(_factors(weight_H), None if bias_H is None else _factors(bias_H)),
        *(out_TH, out_TH.stride(0), *_shape(hidden_TH)),
        *(hidden_TH.dtype == BF16, torch.get_num_threads()),
    )
    return out_TH


def layer_norm_backward(
    grad_TH: Tensor, hidden_TH: Tensor, facts_T2: Tensor, weight_H: Tensor, *, weight_grad: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of the norm's input and, if wanted, of its weight and bias (float32)."""
    grad_TH, hidden_TH = _tokens(grad_TH.to(hidden_TH.dtype)), _tokens(hidden_TH)
    out_TH = workspace.empty(hidden_TH.shape, hidden_TH.dtype)
    both_2H = torch.empty((2, hidden_TH.shape[-1]), dtype=torch.float32) if weight_grad else None
    _layer_norm_backward(
        *(grad_TH, grad_TH.stride(0), hidden_TH, hidden_TH.stride(0), facts_T2.contiguous()),
        *(_factors(weight_H), out_TH, out_TH.stride(0), both_2H, *_shape(hidden_TH)),
        *(hidden_TH.dtype == BF16, torch.get_num_threads()),
    )
    return (out_TH, None, None) if both_2H is None else (out_TH, both_2H[0], both_2H[1])


def rotate(states_TND: Tensor, cos_TF: Tensor, sin_TF: Tensor) -> Tensor:
    """Rotary position embedding on the first 2 F features of each head; see reference.rotate."""
    states_TND = _tokens(states_TND)
    out_TND = workspace.empty(states_TND.shape, states_TND.dtype)
    _turn(states_TND, cos_TF, sin_TF, out_TND, 1.0)
    return out_TND


def rotate_in_place(
    states_TND: Tensor, cos_TF: Tensor, sin_TF: Tensor, *, backward: bool = False
) -> Tensor:
    """The same where the states lie, which may be a part of a stacked buffer; `backward` turns back.

    cos and sin are float32 or of the states' type. Each token must lie in one piece.
    """
    assert _tokens(states_TND) is states_TND
    _turn(states_TND, cos_TF, sin_TF, states_TND, -1.0 if backward else 1.0)
    return states_TND


def _turn(states_TND: Tensor, cos_TF: Tensor, sin_TF: Tensor, out_TND: Tensor, sign: float) -> None:
    cos_TF, sin_TF = cos_TF.contiguous(), sin_TF.contiguous()
    _rotate(
        *(states_TND, states_TND.stride(0), cos_TF, sin_TF, cos_TF.dtype == torch.float32),
        *(out_TND, out_TND.stride(0), *_shape(states_TND), cos_TF.shape[-1]),
        *(sign, states_TND.dtype == BF16, torch.get_num_threads()),
    )


def gated(gate_up: Tensor, kind: Activation) -> Tensor:
    """activation(gate) * up for a stacked [T, 2I] input (arXiv 2002.05202): [T, I]."""
    gate_up = gate_up.contiguous()
    tokens, size = gate_up.shape[0], gate_up.shape[1] // 2
    out_TI = workspace.empty((tokens, size), gate_up.dtype)
    _gated(
        *(gate_up, out_TI, tokens, size),
        *(_KINDS[kind], gate_up.dtype == BF16, torch.get_num_threads()),
    )
    return out_TI


def gated_backward(
    grad_TI: Tensor,
    gate_up: Tensor,
    kind: Activation,
    *,
    again: bool = False,
    in_place: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Gradient of the stacked [T, 2I] input and, if asked for, the forward's result again.

    `in_place` writes the gradient over `gate_up`, which must be contiguous.
    """
    assert gate_up.is_contiguous() or not in_place
    grad_TI, gate_up = grad_TI.contiguous(), gate_up.contiguous()
    grad_gate_up = gate_up if in_place else workspace.empty(gate_up.shape, gate_up.dtype)
    again_TI = workspace.empty(grad_TI.shape, grad_TI.dtype) if again else None
    _gated_backward(
        *(grad_TI, gate_up, grad_gate_up, again_TI, *grad_TI.shape),
        *(_KINDS[kind], gate_up.dtype == BF16, torch.get_num_threads()),
    )
    return grad_gate_up, again_TI


def activate(states: Tensor, kind: Activation) -> Tensor:
    """The activation of a unit without a gate, of every number: see reference.activate."""
    states = states.contiguous()
    out = workspace.empty(states.shape, states.dtype)
    _activate(
        *(states, out, states.numel(), _KINDS[kind], states.dtype == BF16, torch.get_num_threads()),
    )
    return out


def activate_backward(
    grad: Tensor, states: Tensor, kind: Activation, *, again: bool = False
) -> tuple[Tensor, Tensor | None]:
    """The gradient of `activate`'s input and, if asked for, its result again."""
    grad, states = grad.to(states.dtype).contiguous(), states.contiguous()
    assert grad.shape == states.shape
    out = workspace.empty(states.shape, states.dtype)
    value = workspace.empty(states.shape, states.dtype) if again else None
    _activate_backward(
        *(grad, states, out, value, states.numel()),
        *(_KINDS[kind], states.dtype == BF16, torch.get_num_threads()),
    )
    return out, value


def add_scaled(residual: Tensor | None, states: Tensor, scale: float) -> Tensor:
    """residual + scale * states, or scale * states alone, rounded once."""
    states = states.contiguous()
    residual = None if residual is None else residual.contiguous()
    assert residual is None or (residual.shape, residual.dtype) == (states.shape, states.dtype)
    out = workspace.empty(states.shape, states.dtype)
    _add_scaled(
        *(residual, states, out, scale, states.numel()),
        *(states.dtype == BF16, torch.get_num_threads()),
    )
    return out


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

    The gradient times `grad_scale` is used, and zero afterwards. Only the first `decay_until`
    parameters decay. `step` counts from 1. The operations are those of torch.optim.AdamW(fused=True).
    """
    _adamw(
        *(param, grad, m, v, param.numel(), decay_until),
        *(1.0 - lr * weight_decay, 1.0 - beta1, beta2, 1.0 - beta2),
        *(lr / (1.0 - beta1**step), math.sqrt(1.0 - beta2**step), eps, grad_scale),
        torch.get_num_threads(),
    )


def squared_norm(values: Tensor) -> float:
    """The sum of squares of a flat float32 buffer, in float64."""
    result = torch.empty(1, dtype=torch.float64)
    _squared_norm(values, values.numel(), result, torch.get_num_threads())
    return float(result)


class ScaledCopies:
    """Copies of float32 matrices in the activations' type, each times a number, all in one call.

    A pair is a contiguous source, and a target whose rows lie each in one piece, perhaps within a
    wider matrix. All targets have one type. Addresses are noted once, so the tensors must stay where
    they are, as an adapter's factors do.
    """

    def __init__(self, copies: Sequence[tuple[Tensor, Tensor, float]]) -> None:
        for source, target, _ in copies:
            assert source.dtype == torch.float32
            assert source.is_contiguous()
            assert source.shape == target.shape
            assert target.stride(1) == 1
            assert target.dtype == copies[0][1].dtype
        self._kept = list(copies)
        self._places = torch.tensor(
            [
                [source.data_ptr(), target.data_ptr(), *source.shape, target.stride(0)]
                for source, target, _ in copies
            ],
            dtype=torch.int64,
        )
        self._scales = torch.tensor([scale for *_, scale in copies], dtype=torch.float32)

    def refresh(self) -> None:
        """Bring every target up to date with its source."""
        if self._kept:
            narrow = self._kept[0][1].dtype == BF16
            count = len(self._kept)
            _scaled_copies(self._places, self._scales, count, narrow, torch.get_num_threads())


def column_sums(grad_TO: Tensor) -> Tensor:
    """The sum over tokens, in float32: the gradient of a bias."""
    grad_TO = _tokens(grad_TO)
    out_O = torch.empty(grad_TO.shape[1], dtype=torch.float32)
    _column_sums(
        *(grad_TO, grad_TO.stride(0), out_O, *grad_TO.shape),
        *(grad_TO.dtype == BF16, torch.get_num_threads()),
    )
    return out_O
