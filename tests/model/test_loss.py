"""The loss of a pack is torch's cross entropy of the trained positions, however the pack is computed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from lorimer.config import LoraConfig
from lorimer.data.pack import Pack, make_pack
from lorimer.lora.adapter import new_adapter
from lorimer.lora.layers import LoraDropout
from lorimer.model.decoder import Decoder
from lorimer.model.load import load_decoder
from lorimer.model.loss import SIZE_STEP, pack_loss, pack_losses
from tiny import FP32, example, make_tiny, our_logits, random_rows, shake


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return make_tiny(tmp_path_factory.mktemp("base") / "tiny").base


@pytest.fixture
def decoder(base: Any) -> Decoder:
    return load_decoder(base, FP32)


ROWS = random_rows([9, 14, 23])


def a_pack(rows: list[list[int]] = ROWS, *, share: bool = False) -> Pack:
    return make_pack([example(row) for row in rows], list(range(len(rows))), share=share)


def wanted(decoder: Decoder, rows: list[list[int]], smoothing: float = 0.0) -> torch.Tensor:
    """Each row alone: tokens from the third on, as `example` marks them."""
    each = [
        cross_entropy(
            our_logits(decoder, [row])[0][1:-1],
            torch.tensor(row[2:]),
            reduction="none",
            label_smoothing=smoothing,
        )
        for row in rows
    ]
    return torch.cat(each)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_it_is_torchs_cross_entropy_times_the_weight(decoder: Decoder, smoothing: float) -> None:
    loss, each_M = pack_loss(decoder, a_pack(), weight=0.25, smoothing=smoothing)
    expected_M = wanted(decoder, ROWS, smoothing)
    torch.testing.assert_close(each_M, expected_M, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loss, 0.25 * expected_M.sum(), rtol=1e-5, atol=1e-5)


def test_nothing_is_smoothed_if_nobody_asks(decoder: Decoder) -> None:
    _, each_M = pack_loss(decoder, a_pack(), weight=1.0)
    torch.testing.assert_close(each_M, wanted(decoder, ROWS), rtol=1e-5, atol=1e-5)


def test_logits_are_capped_where_the_model_caps_them(tmp_path: Path) -> None:
    decoder = make_tiny(tmp_path / "tiny", "gemma2", final_logit_softcapping=0.5).decoder
    each_M = pack_losses(decoder, a_pack())
    torch.testing.assert_close(each_M, wanted(decoder, ROWS), rtol=1e-5, atol=1e-5)
    uncapped = make_tiny(tmp_path / "other", "gemma2", final_logit_softcapping=None).decoder
    assert (pack_losses(uncapped, a_pack()) - each_M).abs().max() > 0.1


def test_rows_behind_a_shared_prefix_have_the_losses_they_have_alone(decoder: Decoder) -> None:
    """The prefix of ten tokens is not trained in any row."""
    prompt = random_rows([10], seed=5)[0]
    rows = [[*prompt, *row] for row in random_rows([4, 6, 9], seed=6)]
    packed = make_pack(
        [example(row, [i >= 10 for i in range(len(row))]) for row in rows], [0, 1, 2], share=True
    )
    assert packed.prefix == 10
    each_M = pack_losses(decoder, packed)
    alone = [
        cross_entropy(our_logits(decoder, [row])[0][9:-1], torch.tensor(row[10:]), reduction="none")
        for row in rows
    ]
    torch.testing.assert_close(each_M, torch.cat(alone), rtol=1e-5, atol=1e-5)


def test_the_losses_alone_need_no_graph(decoder: Decoder) -> None:
    new_adapter(decoder, LoraConfig(r=2), seed=0)
    pack = a_pack()
    loss, each_M = pack_loss(decoder, pack, weight=1.0)
    assert loss.requires_grad
    found_M = pack_losses(decoder, pack)
    assert not found_M.requires_grad
    torch.testing.assert_close(found_M, each_M.detach())


def test_dropout_reaches_the_layers(decoder: Decoder) -> None:
    adapter, _ = new_adapter(decoder, LoraConfig(r=4, dropout=0.5), seed=0)
    shake(adapter)
    pack = a_pack()
    masks = LoraDropout(0.5, 0, torch.float32, torch.device("cpu")).for_pack(0, pack.rows, pack.lengths)
    without = pack_loss(decoder, pack, weight=1.0)[1]
    dropped = pack_loss(decoder, pack, weight=1.0, dropouts=masks)[1]
    assert (without - dropped).abs().max() > 1e-3


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize(
    ("family", "changes"),
    [("llama", {}), ("gemma2", {"final_logit_softcapping": 0.5})],
    ids=["llama", "capped"],
)
def test_a_head_with_lora_by_hand(
    family: str, changes: dict[str, Any], smoothing: float, tmp_path: Path
) -> None:
    """Only the head is adapted, so what dropout takes away is a part of its input alone."""
    decoder = make_tiny(tmp_path / "tiny", family, **changes).decoder
    head_OI = decoder.head.weight.dequantise().float()
    rows = [[*ROWS[2][:10], *row] for row in ROWS]
    pack = make_pack(
        [example(row, [i >= 12 for i in range(len(row))]) for row in rows], [4, 0, 7], share=True
    )
    assert pack.prefix == 10
    with torch.no_grad():
        hidden_MH = decoder.finish(
            decoder.hidden(pack.ids_T, pack.lengths, prefix=pack.prefix, only_M=pack.predict_M)
        )
    settings = LoraConfig(r=2, alpha=6, dropout=0.5, target_modules=["lm_head"])
    adapter, _ = new_adapter(decoder, settings, seed=0)
    shake(adapter)
    a, b = (tensor.detach() for tensor in adapter.tensors.values())
    dropout = LoraDropout(0.5, 3, torch.float32, torch.device("cpu"))
    masks = dropout.for_pack(0, pack.rows, pack.lengths)
    ours = masks(len(decoder.projections()), hidden_MH.shape[1], pack.computed_tokens)
    kept_MH = ours.pool_PI[ours.picks_T[pack.predict_M]]
    assert 0.4 < float((kept_MH == 0).float().mean()) < 0.6
    for given, dropped_MH in ((masks, hidden_MH * kept_MH), (None, hidden_MH)):
        logits_MV = hidden_MH @ head_OI.T + 3.0 * (dropped_MH @ a.T @ b.T)
        if decoder.spec.logit_cap:
            logits_MV = 0.5 * torch.tanh(logits_MV / 0.5)
        expected_M = cross_entropy(logits_MV, pack.labels_M, reduction="none", label_smoothing=smoothing)
        loss, each_M = pack_loss(decoder, pack, weight=0.25, smoothing=smoothing, dropouts=given)
        torch.testing.assert_close(each_M, expected_M, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(loss, 0.25 * expected_M.sum(), rtol=1e-5, atol=1e-5)


def test_own_rows_of_a_head_lose_nothing_by_dropout(decoder: Decoder) -> None:
    adapter, _ = new_adapter(
        decoder, LoraConfig(r=2, dropout=0.5, target_modules=["o_proj"]), seed=0, tokens=[ROWS[0][4], 99]
    )
    with torch.no_grad():
        for name, tensor in adapter.tensors.items():
            if "o_proj" not in name:
                tensor.add_(0.3)
    pack = a_pack()
    masks = LoraDropout(0.5, 0, torch.float32, torch.device("cpu")).for_pack(0, pack.rows, pack.lengths)
    # B of o_proj is still zero: the masks have nothing to take.
    torch.testing.assert_close(
        pack_loss(decoder, pack, weight=1.0, dropouts=masks)[1], pack_losses(decoder, pack)
    )


@pytest.mark.parametrize(
    ("tokens", "native", "computed", "lengths"),
    [
        (SIZE_STEP, False, SIZE_STEP, (SIZE_STEP,)),
        (SIZE_STEP - 1, False, SIZE_STEP, (SIZE_STEP - 1, 1)),
        (SIZE_STEP + 1, False, 2 * SIZE_STEP, (SIZE_STEP + 1, SIZE_STEP - 1)),
        (SIZE_STEP + 1, True, SIZE_STEP + 1, (SIZE_STEP + 1,)),
    ],
)
def test_a_pack_is_filled_to_a_round_size_where_the_matrix_library_wants_it(
    decoder: Decoder,
    monkeypatch: pytest.MonkeyPatch,
    tokens: int,
    native: bool,
    computed: int,
    lengths: tuple[int, ...],
) -> None:
    seen: list[Any] = []
    real = Decoder.hidden

    def hidden(self: Decoder, ids_T: Any, given: Any, **named: Any) -> Any:
        seen.append((ids_T, given))
        return real(self, ids_T, given, **named)

    rows = random_rows([tokens])
    expected_M = wanted(decoder, rows)
    monkeypatch.setattr(Decoder, "native", native)
    monkeypatch.setattr(Decoder, "hidden", hidden)
    each_M = pack_losses(decoder, a_pack(rows))
    ((ids_T, given),) = seen
    assert (len(ids_T), given) == (computed, lengths)
    assert ids_T.dtype == torch.int64
    assert ids_T[tokens:].tolist() == [0] * (computed - tokens)
    torch.testing.assert_close(each_M, expected_M, rtol=1e-5, atol=1e-5)
