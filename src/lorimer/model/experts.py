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
    # By expert, and within one by token: every choice of a token is one row, read once and put back once.
    order = chosen_TC.flatten().argsort(stable=True)
    token_of = order // experts.chosen
    counts = torch.bincount(chosen_TC.flatten(), minlength=len(experts.pairs)).tolist()
    rows = states_TH.index_select(0, token_of).split(counts)
    results = []
    for (up, down), own_nH, tokens_n in zip(experts.pairs, rows, token_of.split(counts), strict=True):
        if not len(tokens_n):
            continue
        masks = _masks_of(dropouts, tokens_n, len(states_TH))
        inner_nI = up(own_nH, before=None, residual_TO=None, adapted=adapted, dropouts=masks)
        results.append(down(inner_nI, before=gate, residual_TO=None, adapted=adapted, dropouts=masks))
    chosen_TCH = torch.cat(results).index_select(0, order.argsort()).unflatten(0, (-1, experts.chosen))
    # As a product: weighting and adding apart would write and read all choices once more, both ways.
    mixed_TH = torch.bmm(weights_TC.unsqueeze(1), chosen_TCH.float()).squeeze(1)
    return mixed_TH.to(states_TH.dtype)


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
