"""Packs: no token lost, no row split, labels where they belong."""

from __future__ import annotations

import random

import numpy as np
import pytest

from lorimer.data.pack import LEAST_PREFIX, Pack, make_pack, shared_prefix, split_into_packs
from tiny import example


def made(lengths: list[int]) -> list:
    """Rows whose tokens say where they are from: row * 1000 + position; some trained, some not."""
    draw = random.Random(sum(lengths))
    return [
        example([row * 1000 + i for i in range(n)], [i > 0 and draw.random() < 0.6 for i in range(n)])
        for row, n in enumerate(lengths)
    ]


def contents(pack: Pack) -> dict[int, tuple[list[int], list[int], list[int]]]:
    """row -> (tokens, positions in the row that predict, labels)"""
    found = {}
    start = 0
    for place, (row, length) in enumerate(zip(pack.rows, pack.lengths, strict=True)):
        mine = pack.owner_M == place
        found[row] = (
            pack.ids_T[start : start + length].tolist(),
            (pack.predict_M[mine] - start).tolist(),
            pack.labels_M[mine].tolist(),
        )
        start += length
    assert start == pack.tokens
    return found


def test_by_hand() -> None:
    rows = [example([5, 6, 7], [False, True, True]), example([8, 9], [False, True])]
    pack = make_pack(rows, [0, 1])
    assert pack.ids_T.tolist() == [8, 9, 5, 6, 7]
    assert pack.lengths == (2, 3)
    assert pack.rows == (1, 0)
    assert pack.predict_M.tolist() == [0, 2, 3]
    assert pack.labels_M.tolist() == [9, 6, 7]
    assert pack.owner_M.tolist() == [0, 1, 1]
    assert (pack.tokens, pack.trained_tokens) == (5, 3)
    assert {str(t.dtype) for t in (pack.ids_T, pack.predict_M, pack.labels_M, pack.owner_M)} == {
        "torch.int64"
    }


@pytest.mark.trap(18)
def test_the_first_token_of_a_row_is_never_predicted() -> None:
    rows = [example([5, 6], [True, True]), example([7, 8], [True, False])]
    pack = make_pack(rows, [0, 1])
    assert pack.labels_M.tolist() == [6]


def test_rows_keep_their_numbers() -> None:
    pack = make_pack([example([5, 6, 7]), example([8, 9])], [40, 7])
    assert pack.rows == (7, 40)


@pytest.mark.trap(20)
@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("seed", range(40))
def test_every_row_is_whole_in_exactly_one_pack(seed: int, together: bool) -> None:
    draw = random.Random(seed)
    lengths = [draw.randint(1, 40) for _ in range(draw.randint(1, 25))]
    most = draw.randint(1, 80)
    examples = made(lengths)
    packs = split_into_packs(examples, most, together=together)
    assert sorted(row for pack in packs for row in pack.rows) == list(range(len(lengths)))
    assert sum(pack.tokens for pack in packs) == sum(lengths)
    for pack in packs:
        assert len(pack.rows) == 1 or (together and pack.tokens <= most)
        assert list(pack.lengths) == sorted(pack.lengths)
        for row, (tokens, predict, labels) in contents(pack).items():
            assert tokens == examples[row].ids.tolist()
            trained = [i for i in range(1, len(tokens)) if examples[row].trained[i]]
            assert [i + 1 for i in predict] == trained
            assert labels == [tokens[i] for i in trained]


def test_first_fit_decreasing_by_hand() -> None:
    """Room for 10: 7 + 3, 6 + 4, then 2 beside nothing."""
    packs = split_into_packs(made([2, 3, 7, 4, 6]), 10)
    assert [pack.rows for pack in packs] == [(1, 2), (3, 4), (0,)]
    assert [pack.rows for pack in split_into_packs(made([12, 5, 5]), 10)] == [(0,), (1, 2)]


def test_the_split_is_a_function_of_the_lengths() -> None:
    lengths = [int(n) for n in np.random.default_rng(0).integers(1, 50, 60)]
    first, second = (
        [(pack.rows, pack.ids_T.tolist()) for pack in split_into_packs(made(lengths), 100)]
        for _ in range(2)
    )
    assert first == second


def test_trimmed_rows_end_where_the_last_prediction_is_made() -> None:
    """Row 0: token 8 predicts the trained 9, and neither 9 nor 4 is seen. Row 1 is trained at its end."""
    rows = [
        example([5, 8, 9, 4], [False, False, True, False]),
        example([5, 6, 7, 1, 2], [False, False, False, False, True]),
    ]
    pack = make_pack(rows, [0, 1], trim=True)
    assert pack.ids_T.tolist() == [5, 8, 5, 6, 7, 1]
    assert (pack.lengths, pack.predict_M.tolist(), pack.labels_M.tolist()) == ((2, 4), [1, 5], [9, 2])
    assert (pack.tokens, pack.computed_tokens) == (9, 6)


def test_a_trimmed_row_keeps_a_token_of_its_own_behind_a_prefix() -> None:
    shared = list(range(10, 20))
    rows = [example([*shared, n], [False] * 10 + [True]) for n in (1, 2)]
    pack = make_pack(rows, [0, 1], share=True, trim=True)
    assert pack.prefix == 10
    assert (pack.lengths, pack.predict_M.tolist(), pack.labels_M.tolist()) == ((1, 1), [9, 9], [1, 2])


def test_a_shared_prefix_fills_a_pack_once() -> None:
    """Sixteen rows of 60 tokens behind one prompt of 500 are one pack of 1,460, not six packs."""
    prompt = list(range(500))
    rows = [
        example(prompt + [1000 + 60 * n + i for i in range(60)], [False] * 520 + [True] * 40)
        for n in range(16)
    ]
    packs = split_into_packs(rows, 1460, share=True)
    assert [pack.computed_tokens for pack in packs] == [1460]
    packs = split_into_packs(rows, 1459, share=True)
    assert sorted(row for pack in packs for row in pack.rows) == list(range(16))
    assert [pack.computed_tokens for pack in packs] == [500 + 15 * 60, 560]
    assert len(split_into_packs(rows, 1460)) == 8


LONG = list(range(20, 32))


@pytest.mark.parametrize(
    ("rows", "wanted"),
    [
        ([[*LONG, 1]], 0),
        ([[*LONG, 1], [*LONG, 2]], 12),
        ([[*LONG, 1], [*LONG, 2], [*LONG[:9], 3, 4]], 9),
        ([[*LONG[:9], 3, 4], [*LONG, 1], [*LONG, 2]], 9),
        ([[*LONG, 1], [*LONG[:8], 3]], LEAST_PREFIX),
        ([[*LONG, 1], [*LONG[:7], 3]], 0),
        # A row that is the prefix keeps its last token for itself.
        ([[*LONG, 1], LONG], 11),
        ([LONG, LONG], 11),
    ],
)
def test_what_rows_have_in_common(rows: list[list[int]], wanted: int) -> None:
    assert shared_prefix([example(ids, [False] * len(ids)) for ids in rows]) == wanted


@pytest.mark.parametrize(("first", "wanted"), [(9, 9), (10, 10), (11, 11), (8, 8), (5, 0)])
def test_what_is_trained_is_not_shared(first: int, wanted: int) -> None:
    """The first trained token of any row ends what is shared; a mark on a row's first token is none."""
    plain = example([*LONG, 1], [False] * 13)
    marked = example([*LONG, 2], [i >= first or i == 0 for i in range(13)])
    assert shared_prefix([plain, marked]) == shared_prefix([marked, plain]) == wanted


def test_nothing_is_shared_or_trimmed_if_nobody_asks() -> None:
    rows = [example([*LONG, n, 9], [False] * 12 + [True, False]) for n in (1, 2)]
    pack = make_pack(rows, [0, 1])
    assert (pack.prefix, pack.lengths) == (0, (14, 14))
    (pack,) = split_into_packs(rows, 99)
    assert (pack.prefix, pack.lengths) == (0, (14, 14))
    (pack,) = split_into_packs(rows, 99, trim=True)
    assert (pack.prefix, pack.lengths) == (0, (12, 12))


def test_rows_behind_a_prefix_predict_from_where_they_lie() -> None:
    """Two rows of three own tokens behind twelve: the last two of each are trained."""
    rows = [example([*LONG, n, n, n], [False] * 13 + [True] * 2) for n in (1, 2)]
    pack = make_pack(rows, [0, 1], share=True)
    assert pack.ids_T.tolist() == [*LONG, 1, 1, 1, 2, 2, 2]
    assert (pack.predict_M.tolist(), pack.labels_M.tolist()) == ([12, 13, 15, 16], [1, 1, 2, 2])


def test_a_row_that_trains_nothing_is_not_trimmed() -> None:
    rows = [example([5, 6, 7], [False] * 3), example([8, 9, 10, 11], [False, True, False, False])]
    pack = make_pack(rows, [0, 1], trim=True)
    assert (pack.rows, pack.lengths) == ((0, 1), (3, 1))
