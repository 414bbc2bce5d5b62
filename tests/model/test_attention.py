"""A prefix that rows share is computed once, and nothing but the time shows it."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from lorimer.data.pack import make_pack, shared_prefix, split_into_packs
from lorimer.kernels.dispatch import Scores
from lorimer.lora.layers import LoraSpec, inject
from lorimer.lora.targets import all_targets
from lorimer.model.attention import group_rows
from lorimer.model.loss import pack_loss
from tiny import FAMILIES, difference, example, make_tiny, random_rows, shake

CPU = torch.device("cpu")


def rows_behind(prefix: int, lengths: list[int]) -> list[list[int]]:
    head, *tails = random_rows([prefix, *lengths], seed=3)
    # The first own tokens differ, so the common prefix is exactly this long.
    return [[*head, 3 + number, *tail[1:]] for number, tail in enumerate(tails)]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("lengths", [[1, 2, 9], [6, 6, 6], [3, 30, 30, 17]], ids=str)
def test_losses_and_gradients_are_those_of_rows_computed_apart(
    tmp_path: Path, family: str, lengths: list[int]
) -> None:
    tiny = make_tiny(tmp_path, family)
    targets = all_targets(tiny.decoder)
    paths = [target.path for target in targets]
    adapter = inject(tiny.decoder, targets, LoraSpec(dict.fromkeys(paths, 2), dict.fromkeys(paths, 4.0)))
    shake(adapter)
    assert adapter.flat.grad is not None
    rows = rows_behind(13, lengths)
    examples = [example(row, [i >= 13 for i in range(len(row))]) for row in rows]
    assert shared_prefix(examples) == 13 if min(lengths) > 1 else 13
    seen: list[Any] = []
    for share in (False, True):
        adapter.flat.grad.zero_()
        pack = make_pack(examples, range(len(rows)), share=share)
        assert pack.tokens == sum(map(len, rows))
        loss, each = pack_loss(tiny.decoder, pack, weight=0.1)
        loss.backward()
        seen.append((pack.labels_M.tolist(), each, adapter.flat.grad.clone()))
    assert pack.computed_tokens == sum(map(len, rows)) - 13 * (len(rows) - 1)
    assert seen[0][0] == seen[1][0]
    assert difference(seen[1][1], seen[0][1]) < 1e-5
    assert difference(seen[1][2], seen[0][2]) < 1e-4


def test_the_prefix_ends_before_anything_that_is_trained() -> None:
    rows = rows_behind(20, [5, 5])
    first = example(rows[0], [i >= 12 for i in range(25)])
    second = example(rows[1], [i >= 22 for i in range(25)])
    assert shared_prefix([first, second]) == 12
    assert shared_prefix([first]) == 0
    assert shared_prefix([second, second]) == 22
    short = example(rows[0][:5], [False] * 4 + [True])
    assert shared_prefix([short, short]) == 0


def test_every_token_of_a_row_but_one_may_be_shared() -> None:
    row = random_rows([12])[0]
    examples = [example(row, [False] * 12), example([*row, 7, 8], [False] * 13 + [True])]
    assert shared_prefix(examples) == 11


def test_sharing_is_per_pack() -> None:
    examples = [example(row, [i > 13 for i in range(len(row))]) for row in rows_behind(13, [9, 9, 9, 9])]
    packs = split_into_packs(examples, 35, share=True)
    assert [pack.prefix for pack in packs] == [13, 13]
    assert sum(pack.tokens for pack in packs) == 4 * 22
    assert all(pack.prefix == 0 for pack in split_into_packs(examples, 50, share=True, together=False))


@pytest.mark.parametrize("prefix", [0, 9])
@pytest.mark.parametrize("lengths", [[5], [4, 4], [2, 7, 40], [16, 16, 17]], ids=str)
def test_a_grid_gives_every_token_back(prefix: int, lengths: list[int]) -> None:
    tokens = torch.randn(prefix + sum(lengths), 3, 4)
    back = tokens.clone()
    for group in group_rows(lengths, CPU, prefix):
        grid = group.grid(tokens)
        assert grid.shape == (group.rows, 3, prefix + group.longest, 4)
        assert torch.equal(grid[-1, :, :prefix].transpose(0, 1), tokens[:prefix])
        back[group.first : group.last] = 0
        back[group.first : group.last] = group.own_tokens(grid)
    assert torch.equal(back, tokens)


@pytest.mark.parametrize("window", [None, 12, 5])
def test_gradients_by_autograd_in_float64(window: int | None) -> None:
    """Windows that end within the prefix, and within the row's own tokens."""
    from lorimer.model.attention import attend

    groups = group_rows([3, 5, 5, 30], CPU, 9)
    leaves = [torch.randn(9 + 43, heads, 4, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2)]
    weight = torch.randn(9 + 43, 16, dtype=torch.float64)
    (attend(*leaves, groups, Scores(0.5, window)) * weight).sum().backward()
    mine = [leaf.grad.clone() for leaf in leaves if leaf.grad is not None]
    starts = [9, 12, 17, 22, 52]
    copies = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    total = torch.zeros((), dtype=torch.float64)
    for number, (first, last) in enumerate(itertools.pairwise(starts)):
        index = torch.cat([torch.arange(9), torch.arange(first, last)])
        grids = [copy[index].transpose(0, 1).unsqueeze(0) for copy in copies]
        seen = torch.ones(len(index), len(index), dtype=torch.bool).tril()
        if window is not None:
            seen &= ~seen.tril(-window)
        out = torch.nn.functional.scaled_dot_product_attention(*grids, seen, scale=0.5, enable_gqa=True)[
            0
        ].transpose(0, 1)
        flat = out.flatten(1) * weight[index]
        total = total + (flat if number == 0 else flat[9:]).sum()
    total.backward()
    for own, copy in zip(mine, copies, strict=True):
        assert copy.grad is not None
        assert difference(own, copy.grad) < 1e-5
