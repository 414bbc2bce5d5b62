"""KL divergence and agreement of two decoders, against the same by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lorimer.config import QuantConfig
from lorimer.evaluate import agreement as agreement_module
from lorimer.evaluate.agreement import agreement
from lorimer.model.load import load_decoder
from tiny import FP32, example, make_tiny, our_logits, random_rows


def test_it_is_what_the_logits_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = make_tiny(tmp_path / "base")
    other = load_decoder(tiny.base, FP32, QuantConfig(kind="nf4"))
    rows = random_rows([9, 21, 5])
    monkeypatch.setattr(agreement_module, "CHUNK", 4)
    found = agreement(tiny.decoder, other, [example(row) for row in rows])
    kl, same = [], []
    for row in rows:
        p, q = (
            our_logits(decoder, [row])[0][1:-1].double().log_softmax(-1)
            for decoder in (tiny.decoder, other)
        )
        kl.append((p.exp() * (p - q)).sum(-1))
        same.append(p.argmax(-1) == q.argmax(-1))
    assert found.tokens == sum(len(row) - 2 for row in rows)
    assert found.kl == pytest.approx(float(torch.cat(kl).mean()), rel=1e-4)
    assert found.same == pytest.approx(float(torch.cat(same).double().mean()))
    assert agreement(tiny.decoder, tiny.decoder, [example(rows[0])]).kl < 1e-9
