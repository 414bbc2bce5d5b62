"""A mixture of experts: a router chooses for each token the few gated units that compute it.

Tokens are brought together by expert, so that each expert is two products over its own tokens. The
router is frozen; through its weights the gradient still reaches the states.

Letters: T tokens, H hidden, E experts, C chosen of them, n tokens of one expert.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lorimer.kernels.dispatch import Dropout, Gate
from lorimer.model.parts import Dropouts, Experts


def mixture(
    experts: Experts, states_TH: Tensor, gate: Gate, *, adapted: bool, dropouts: Dropouts | None
) -> Tensor:
    """The chosen experts' results for normed states, weighted and added up: [T, H]."""
    weights_TC, chosen_TC = route(experts, states_TH)
    # By expert, and within one by token: the order in which tokens are added never changes.
    order = chosen_TC.flatten().argsort(stable=True)
    token_of = order // experts.chosen
    counts = torch.bincount(chosen_TC.flatten(), minlength=len(experts.pairs)).tolist()
    total_TH = torch.zeros_like(states_TH, dtype=torch.float32)
    weights = weights_TC.flatten().index_select(0, order).unsqueeze(1)
    start = 0
    for (up, down), count in zip(experts.pairs, counts, strict=True):
        if not count:
            continue
        tokens_n = token_of[start : start + count]
        masks = _masks_of(dropouts, tokens_n, len(states_TH))
        own_nH = states_TH.index_select(0, tokens_n)
        inner_nI = up(own_nH, before=None, residual_TO=None, adapted=adapted, dropouts=masks)
        result_nH = down(inner_nI, before=gate, residual_TO=None, adapted=adapted, dropouts=masks)
        total_TH = total_TH.index_add(0, tokens_n, result_nH * weights[start : start + count])
        start += count
    return total_TH.to(states_TH.dtype)


def route(experts: Experts, states_TH: Tensor) -> tuple[Tensor, Tensor]:
    """Which experts each token takes [T, C], and their float32 weights [T, C]."""
    logits_TE = states_TH @ experts.router_EH.to(states_TH.dtype).t()
    weights_TC, chosen_TC = logits_TE.float().softmax(-1).topk(experts.chosen, -1)
    if experts.renormalise:
        weights_TC = weights_TC / weights_TC.sum(-1, keepdim=True)
    return weights_TC, chosen_TC


def _masks_of(dropouts: Dropouts | None, tokens_n: Tensor, tokens: int) -> Dropouts | None:
    """The masks of these tokens alone."""
    if dropouts is None:
        return None

    def masks(number: int, inputs: int, _: int) -> Dropout:
        whole = dropouts(number, inputs, tokens)
        return Dropout(whole.pool_PI, whole.picks_T.index_select(0, tokens_n.to(whole.picks_T.device)))

    return masks
